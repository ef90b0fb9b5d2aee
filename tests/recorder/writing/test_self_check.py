# SPDX-License-Identifier: Apache-2.0
"""What is checked of every recorded row."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.writing.self_check import SelfCheck
from vllm.moe_routes.writing.verdicts import check_unfinished, verdict

from tests.support.build import QUICK, a_layer, clean_routes

FIRED = "every layer fired in every pass"
RANGE = "expert ids in range"
DISTINCT = "expert ids distinct within a row"
WEIGHTS = "weights finite and not negative"
ENDED = "every pass that began ended"
ROWS = "rows = scheduled tokens"

#: Dense layers leave gaps, so a slot is not a layer; and two layers choose more experts.
LAYERS = [a_layer(1), a_layer(3, top_k=4, num_experts=16), a_layer(5), a_layer(9, top_k=4)]


def _failed(check: SelfCheck) -> dict[str, str]:
    checks = [*check.checks(), check_unfinished(0)]  # as a log of tokens lists them
    failed = {c["name"]: c["detail"] for c in checks if c["verdict"] == "fail"}
    assert verdict(checks)["verdict"] == ("fail" if failed else "pass")
    assert [c["name"] for c in checks] == [FIRED, RANGE, DISTINCT, WEIGHTS, ROWS, ENDED]
    return failed


def _spoil(
    slot: int, column: int = 1, expert: int | None = None, weight: float | None = None
) -> tuple[SelfCheck, np.ndarray]:
    """Check five clean tokens, with one place of token 2 overwritten in one slot."""
    routes = clean_routes(LAYERS, 5)
    if expert is not None:
        routes.topk_ids[2, slot, column] = expert
    if weight is not None:
        routes.topk_weights[2, slot, column] = weight
    check = SelfCheck(LAYERS, 255)
    return check, check.step(len(routes.topk_ids), routes.topk_ids, routes.topk_weights)


def _only_bad(slot: int) -> np.ndarray:
    good = np.ones((5, len(LAYERS)), dtype=bool)
    good[2, slot] = False
    return good


@QUICK
@given(st.lists(st.integers(0, 6), max_size=5), st.sampled_from([255, -1]))
def test_clean_routes_pass_every_check(sizes: list[int], not_an_id: int) -> None:
    check = SelfCheck(LAYERS, not_an_id)
    for i, n in enumerate(sizes):
        routes = clean_routes(LAYERS, n, seed=i, not_an_id=not_an_id)
        good = check.step(len(routes.topk_ids), routes.topk_ids, routes.topk_weights)
        assert good.shape == (n, len(LAYERS))
        assert good.all()
    assert _failed(check) == {}
    assert check.rows_not_captured == 0
    tokens = {c["detail"] for c in check.checks()}
    assert tokens == {f"{sum(sizes)} tokens x 4 layers"}


SLOTS = pytest.mark.parametrize("slot", range(len(LAYERS)))


@SLOTS
@pytest.mark.parametrize("column", [0, 1])
def test_a_layer_that_did_not_fire_is_named(slot: int, column: int) -> None:
    check, good = _spoil(slot=slot, column=column, expert=255)
    told = f"1 rows, in layers {LAYERS[slot].layer}"
    assert _failed(check) == {FIRED: told, ROWS: told}
    assert np.array_equal(good, _only_bad(slot))
    assert check.rows_not_captured == 1


@SLOTS
def test_an_expert_that_does_not_exist_is_named_with_its_layer(slot: int) -> None:
    check, good = _spoil(slot=slot, expert=LAYERS[slot].num_experts)
    told = f"1 rows, in layers {LAYERS[slot].layer}"
    assert _failed(check) == {RANGE: told, ROWS: told}
    assert np.array_equal(good, _only_bad(slot))
    assert check.rows_not_captured == 1


def test_every_layer_is_held_to_its_own_number_of_experts() -> None:
    """15 exists in layer 3 only; 8 is one past the end of the others."""
    routes = clean_routes(LAYERS, 1)
    routes.topk_ids[0, :, :2] = [15, 8]
    check = SelfCheck(LAYERS, 255)
    assert check.step(len(routes.topk_ids), routes.topk_ids, routes.topk_weights).tolist() == [
        [False, True, False, False]
    ]
    assert _failed(check)[RANGE] == "3 rows, in layers 1,5,9"


def test_a_negative_id_is_out_of_range_or_not_an_id() -> None:
    routes = clean_routes(LAYERS, 1, not_an_id=-1)
    routes.topk_ids[0, 0, 0] = -2
    routes.topk_ids[0, 1, 0] = -1
    check = SelfCheck(LAYERS, -1)
    check.step(len(routes.topk_ids), routes.topk_ids, routes.topk_weights)
    failed = _failed(check)
    assert failed[RANGE] == "1 rows, in layers 1"
    assert failed[FIRED] == "1 rows, in layers 3"


@SLOTS
def test_an_expert_chosen_twice_in_a_row_is_named_with_its_layer(slot: int) -> None:
    clean = clean_routes(LAYERS, 5)
    check, good = _spoil(slot=slot, column=1, expert=int(clean.topk_ids[2, slot, 0]))
    assert _failed(check) == {DISTINCT: f"1 rows, in layers {LAYERS[slot].layer}"}
    assert good.all()


def test_experts_repeated_far_apart_are_found_too() -> None:
    routes = clean_routes(LAYERS, 1)
    routes.topk_ids[0, 1] = [5, 1, 2, 5]
    check = SelfCheck(LAYERS, 255)
    check.step(len(routes.topk_ids), routes.topk_ids, routes.topk_weights)
    assert set(_failed(check)) == {DISTINCT}


@SLOTS
@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, -0.25])
def test_a_weight_that_is_none_is_named_with_its_layer(slot: int, weight: float) -> None:
    check, good = _spoil(slot=slot, weight=weight)
    assert _failed(check) == {WEIGHTS: f"1 rows, in layers {LAYERS[slot].layer}"}
    assert good.all()


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_weights_of_zero_and_above_one_are_fine(weight: float) -> None:
    check, good = _spoil(slot=0, weight=weight)
    assert _failed(check) == {}
    assert good.all()


def test_columns_past_a_layers_top_k_are_not_looked_at() -> None:
    routes = clean_routes(LAYERS, 3)
    routes.topk_ids[:, 0, 2:] = [200, 200]
    routes.topk_weights[:, 0, 2:] = [math.nan, -1]
    check = SelfCheck(LAYERS, 255)
    assert check.step(len(routes.topk_ids), routes.topk_ids, routes.topk_weights).all()
    assert _failed(check) == {}


def test_a_layer_that_did_not_fire_is_told_once_and_not_as_repeated_or_bad() -> None:
    """What stands in its cells is the same marker twice, and weights of a pass before."""
    routes = clean_routes(LAYERS, 3)
    routes.topk_ids[:, 1] = 255
    routes.topk_weights[:, 1] = math.nan
    check = SelfCheck(LAYERS, 255)
    check.step(len(routes.topk_ids), routes.topk_ids, routes.topk_weights)
    told = "3 rows, in layers 3"
    assert _failed(check) == {FIRED: told, ROWS: told}


def test_a_dropped_pass_fails_the_row_count_and_nothing_else() -> None:
    check = SelfCheck(LAYERS, 255)
    check.dropped(6)
    assert _failed(check) == {ROWS: "24 rows, in layers 1,3,5,9"}
    assert check.rows_not_captured == 0


def test_violations_of_many_passes_add_up() -> None:
    check = SelfCheck(LAYERS, 255)
    for _ in range(3):
        routes = clean_routes(LAYERS, 2)
        routes.topk_ids[0, 0, 0] = 255
        routes.topk_ids[1, 2, 0] = 99
        check.step(len(routes.topk_ids), routes.topk_ids, routes.topk_weights)
    failed = _failed(check)
    assert failed[FIRED] == "3 rows, in layers 1"
    assert failed[RANGE] == "3 rows, in layers 5"
    assert failed[ROWS] == "6 rows, in layers 1,5"
    assert check.rows_not_captured == 6


def test_a_long_list_of_layers_is_cut_short() -> None:
    layers: list[MoELayer] = [a_layer(i) for i in range(12)]
    routes = clean_routes(layers, 1)
    routes.topk_ids[:] = 255
    check = SelfCheck(layers, 255)
    check.step(len(routes.topk_ids), routes.topk_ids, routes.topk_weights)
    assert _failed(check)[FIRED] == "12 rows, in layers 0,1,2,3,4,5,6,7,…"


@QUICK
@given(st.data())
def test_any_single_corruption_is_found_in_its_layer_and_no_other(data: st.DataObject) -> None:
    routes = clean_routes(LAYERS, 4, seed=data.draw(st.integers(0, 50)))
    slot = data.draw(st.integers(0, len(LAYERS) - 1))
    token = data.draw(st.integers(0, 3))
    column = data.draw(st.integers(0, LAYERS[slot].top_k - 1))
    if data.draw(st.booleans()):
        wrong = data.draw(
            st.integers(0, 255).filter(lambda i: i != routes.topk_ids[token, slot, column])
        )
        others = np.delete(routes.topk_ids[token, slot, : LAYERS[slot].top_k], column)
        routes.topk_ids[token, slot, column] = wrong
        harmless = wrong < LAYERS[slot].num_experts and wrong not in others
    else:
        weight = data.draw(st.floats(width=32))
        routes.topk_weights[token, slot, column] = weight
        harmless = math.isfinite(weight) and weight >= 0
    check = SelfCheck(LAYERS, 255)
    check.step(len(routes.topk_ids), routes.topk_ids, routes.topk_weights)
    failed = _failed(check)
    assert bool(failed) != harmless
    assert all(detail == f"1 rows, in layers {LAYERS[slot].layer}" for detail in failed.values())


def test_a_pass_with_fewer_rows_than_were_scheduled_fails_the_row_count_and_nothing_else() -> None:
    check = SelfCheck(LAYERS, 255)
    routes = clean_routes(LAYERS, 3)
    check.step(4, routes.topk_ids, routes.topk_weights)
    assert _failed(check).keys() == {ROWS}
