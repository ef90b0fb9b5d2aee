# SPDX-License-Identifier: Apache-2.0
"""The verdict on a recording, and the checks that it adds up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vllm.moe_routes.counts import Shape, count_choices, lost_choices
from vllm.moe_routes.writing.verdicts import (
    Verdict,
    check_counts,
    check_layers,
    check_none,
    merged,
    verdict,
)

from tests.recorder.test_counts import counted, filled
from tests.support.build import a_layer


def _verdict(
    counts: np.ndarray, tokens: int, shape: Shape, dropped: int = 0, unfinished: int = 0
) -> Verdict:
    return verdict(check_counts(counts, tokens, shape, dropped, unfinished))


@pytest.mark.parametrize(("dropped", "unfinished"), [(1, 0), (0, 1)])
def test_dropped_and_unfinished_passes_fail_the_check(dropped: int, unfinished: int) -> None:
    layers = [a_layer(0)]
    counts = np.zeros((1, 9), dtype=np.int64)
    assert _verdict(counts, 0, Shape.of(layers))["verdict"] == "pass"
    assert _verdict(counts, 0, Shape.of(layers), dropped, unfinished)["verdict"] == "fail"


@pytest.mark.parametrize("experts", [8, 300])
def test_a_layer_that_did_not_fire_is_lost_and_fails_the_check(experts: int) -> None:
    layers = [a_layer(i, 2, experts) for i in (3, 5)]
    shape, buffer = Shape.of(layers), filled(layers, 4, seed=2)
    buffer.ids[1, 1] = buffer.not_an_id
    array = counted(buffer, 4, shape).cpu().numpy()
    assert lost_choices(array, 4, shape).tolist() == [0, 2]
    found = _verdict(array, 4, shape)
    assert found["verdict"] == "fail"
    assert [c["detail"] for c in found["checks"][:2]] == ["off by 2 choices, in layers 5"] * 2


def test_an_id_past_a_smaller_layers_experts_is_lost() -> None:
    layers = [a_layer(0, 2, 4), a_layer(1, 2, 8)]
    shape = Shape.of(layers)
    counts = count_choices(np.array([[[0, 6], [6, 7]]], dtype=np.uint8), shape)
    assert lost_choices(counts, 1, shape).tolist() == [1, 0]
    assert _verdict(counts, 1, shape)["verdict"] == "fail"


def test_one_failed_check_fails_the_verdict() -> None:
    good, bad = check_none("a", 0, "lost"), check_none("b", 3, "lost")
    assert verdict([good]) == {"verdict": "pass", "checks": [good]}
    assert verdict([good, bad])["verdict"] == "fail"
    assert bad == {"name": "b", "verdict": "fail", "detail": "3 lost"}


def test_a_check_of_layers_names_the_first_of_those_that_are_off() -> None:
    layers = [a_layer(i) for i in range(1, 13)]
    off = np.zeros(12, dtype=np.int64)
    found = check_layers("a", off, layers, 7, "{} rows")
    assert (found["verdict"], found["detail"]) == ("pass", "7 tokens x 12 layers")
    off[:] = -1
    found = check_layers("a", off, layers, 7, "{} rows")
    assert (found["verdict"], found["detail"]) == ("fail", "12 rows, in layers 1,2,3,4,5,6,7,8,…")


def test_several_logs_say_of_every_check_what_failed_it_first() -> None:
    def one(*found: int) -> dict[str, Any]:
        return verdict([check_none(name, n, "lost") for name, n in zip("ab", found, strict=True)])

    assert merged([one(0, 1)]) == one(0, 1)
    assert merged([one(0, 0), one(0, 0)]) == one(0, 0)
    several = merged([one(0, 0), one(0, 2), one(0, 3)])
    assert several["verdict"] == "fail"
    assert [check["detail"] for check in several["checks"]] == ["0 lost", "2 lost"]
