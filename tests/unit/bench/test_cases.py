# SPDX-License-Identifier: Apache-2.0
"""The bench's order of passes, and how much is measured."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from expert_profiler.bench.cases import (
    AA,
    BASE,
    FULL,
    HEADLINE_MODES,
    MATRIX_MODES,
    MODES,
    QUICK,
    YARDSTICK,
    schedule,
)
from tests.unit.bench.passes import CASE


@given(
    modes=st.lists(st.sampled_from([m for m in MODES if m != BASE]), unique=True, max_size=8),
    number=st.integers(0, 40),
)
def test_every_mode_runs_once_a_round_right_beside_its_baseline(
    modes: list[str], number: int
) -> None:
    slots = schedule(modes, number)
    assert sorted(slot.mode for slot in slots if slot.mode != BASE) == sorted(modes)
    for i, slot in enumerate(slots):
        assert slots[slot.base].mode == BASE
        assert abs(slot.base - i) == (slot.mode != BASE)


def test_over_rounds_no_mode_keeps_a_side_of_its_baseline() -> None:
    modes = list(HEADLINE_MODES)
    before = dict.fromkeys(modes, 0)
    rounds = 2 * len(modes)
    for number in range(rounds):
        for i, slot in enumerate(schedule(modes, number)):
            if slot.mode != BASE:
                before[slot.mode] += i < slot.base
    assert all(0.3 <= count / rounds <= 0.7 for count in before.values()), before


def test_the_plan_has_its_cases_its_pairs_and_its_targets() -> None:
    assert [(cell.case.prompt_tokens, cell.case.batch) for cell in FULL.matrix] == [
        (prompt, batch) for prompt in (16, 128, 512) for batch in (1, 8, 32)
    ]
    assert all({"parquet", "jsonl"} <= set(cell.modes) <= set(MATRIX_MODES) for cell in FULL.matrix)
    assert (FULL.headline.batch, FULL.headline_pairs) == (25, 20)
    assert {AA, YARDSTICK, "armed"} < set(HEADLINE_MODES)
    targets = {name: MODES[name].target for name in HEADLINE_MODES if MODES[name].target}
    assert targets == {
        "armed": 1.003, "stat": 1.005, "per_pass": 1.008, "parquet": 1.01, "jsonl": 1.02
    }  # fmt: skip
    assert {"parquet_layer0", "jsonl_layer0"} < set(MATRIX_MODES)


def test_a_requests_last_token_is_no_routed_token() -> None:
    assert CASE.routed_tokens == 2 * (4 + 3 - 1)


def test_the_quick_form_has_every_part_but_the_other_processes() -> None:
    assert QUICK.processes == 0
    assert QUICK.headline_pairs >= 2
    assert QUICK.matrix and QUICK.fit and QUICK.synthetic_rows and QUICK.simulated_minutes
