# SPDX-License-Identifier: Apache-2.0
"""From passes to ratios, intervals and verdicts, against cases worked out by hand."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_profiler.bench import pass_metrics
from expert_profiler.bench.cases import AA, BASE, MODES, YARDSTICK
from expert_profiler.bench.pass_metrics import Pair
from tests.unit.bench.passes import CASE, a_pass, pairs


def test_a_mode_is_compared_with_its_own_baseline_passes() -> None:
    record = pass_metrics.compare("jsonl", pairs("jsonl", [1.01, 1.02, 1.03]))
    assert record["ratios"]["wall"]["paired_ratio_median"] == pytest.approx(1.02)
    assert record["ratios"]["wall"]["pairs"] == 3
    assert record["seconds"]["wall"]["base"]["values"] == [1.0, 2.0, 3.0]
    assert record["seconds"]["wall"]["base"]["iqr"] == [1.5, 2.5]
    assert record["seconds"]["ttft"]["base"]["median"] == pytest.approx(0.4)
    assert record["seconds"]["inter_token"]["base"]["median"] == pytest.approx(0.4)
    assert (record["target"], record["meets_target"]) == (1.02, "open")


@pytest.mark.parametrize(
    ("ratios", "told"),
    [([1.001, 1.002, 1.003], "yes"), ([1.004, 1.005, 1.006], "open"), ([1.006, 1.007], "no")],
)
def test_a_target_is_met_or_missed_only_where_the_interval_tells(
    ratios: list[float], told: str
) -> None:
    assert pass_metrics.compare("stat", pairs("stat", ratios))["meets_target"] == told
    assert pass_metrics.compare(YARDSTICK, pairs(YARDSTICK, [1.2]))["meets_target"] is None


@pytest.mark.parametrize(("ratios", "holds"), [([0.99, 1.0, 1.01], True), ([1.02] * 9, False)])
def test_the_baseline_against_itself_must_hold_1(ratios: list[float], holds: bool) -> None:
    assert pass_metrics.aa_holds({AA: pass_metrics.compare(AA, pairs(AA, ratios))}) is holds


def test_a_clean_case_has_no_problems() -> None:
    found = {mode: pairs(mode, [1.0, 1.1]) for mode in MODES if mode != BASE}
    assert pass_metrics.problems("c", found, CASE.routed_tokens) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokens": "other"}, "2 different outputs"),
        ({"verdict": "fail"}, "verdict fail"),
        ({"dropped": 3}, "3 dropped"),
        ({"rows": 25}, "25 rows, expected 288"),
        ({"rows": 276}, "276 rows"),
        ({"rows": 576}, "576 rows"),
        ({"rows": 0}, "0 rows"),
    ],
)
def test_what_makes_a_case_untrue_is_told(changes: dict[str, Any], told: str) -> None:
    (pair,) = pairs("jsonl", [1.0])
    found = pass_metrics.problems("c", {"jsonl": [Pair(pair.base, {**pair.own, **changes})]}, 12)
    assert len(found) == 1
    assert told in found[0]


@settings(max_examples=30)
@given(a=st.floats(1e-5, 1), b=st.floats(1e-8, 1e-3), seed=st.integers(0, 99))
def test_a_cost_that_is_linear_is_found_to_be_linear(a: float, b: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps, rows = rng.integers(1, 100, 9), rng.integers(1, 100_000, 9)
    fit = pass_metrics.fit(rows.tolist(), steps.tolist(), (a * steps + b * rows).tolist())
    assert fit["seconds_per_step"] == pytest.approx(a, rel=1e-4)
    assert fit["seconds_per_row"] == pytest.approx(b, rel=1e-4)
    assert fit["r2"] == pytest.approx(1)


def test_memory_is_held_against_buffer_queue_and_allowance() -> None:
    record = {
        "buffer_bytes": 100,
        "queue_bytes": 1000,
        "samples": [[1, 10], [2, 500], [3, 520], [4, 540]],
    }
    figured = pass_metrics.memory(record, allowance=50)
    assert (figured["recorder_bytes"], figured["bound_bytes"]) == (640, 1150)
    assert figured["within_bound"]
    assert figured["growth_bytes"] == pytest.approx(20)
    assert not pass_metrics.memory({**record, "queue_bytes": 400}, allowance=50)["within_bound"]


def test_a_profile_adds_up_by_step() -> None:
    parts = {
        "hook ops": {"seconds": 0.004, "calls": 48},
        "begin": {"seconds": 0.001, "calls": 2},
        "end": {"seconds": 0.003, "calls": 2},
        "enqueue": {"seconds": 0.001, "calls": 2},
        "writer": {"seconds": 0.02, "calls": 4},
    }
    assert pass_metrics.parts_per_step(parts, 2) == pytest.approx(
        {"hook ops": 2000, "begin": 500, "end": 1500, "enqueue": 500}
    )
    assert pass_metrics.engine_seconds(parts) == pytest.approx(0.008)
    assert pass_metrics.seconds_of(parts, "writer") == 0.02
    assert pass_metrics.seconds_of({}, "writer") == 0
    counts_at_the_end = {**parts, "stop": {"seconds": 0.01, "calls": 1}}
    assert pass_metrics.engine_seconds(counts_at_the_end) == pytest.approx(0.008), "its writer's"
    del counts_at_the_end["writer"]
    assert pass_metrics.engine_seconds(counts_at_the_end) == pytest.approx(0.018)


def test_what_recording_adds_is_accounted_for_by_its_own_clocks() -> None:
    """0.008 s of the engine thread, 0.02 s of the writer, beside passes of 2 s."""
    parts = {
        "hook ops": {"seconds": 0.004, "calls": 48},
        "begin": {"seconds": 0.001, "calls": 2},
        "end": {"seconds": 0.003, "calls": 2},
        "start": {"seconds": 0.5, "calls": 1},
        "writer": {"seconds": 0.02, "calls": 4},
    }
    slow = {name: {**part, "seconds": 9.0} for name, part in parts.items()}
    passes = [a_pass(2.0, 1200, parts=item) for item in (parts, slow, parts)]
    told = pass_metrics.profile(passes, base_wall=2.0)
    assert told["accounted"] == pytest.approx({"least": 1.004, "most": 1.014})
    assert told["start_stop_seconds"] == {"start": 0.5, "stop": 0.0}
    assert told["writer_seconds_per_million_rows"] == pytest.approx(0.02 / 1200 * 1e6)
    assert (told["passes"], told["steps"], told["rows_per_step"]) == (3, 2, 600)


def test_the_spread_keeps_every_value() -> None:
    values = [3.0, 1.0, 2.0]
    assert pass_metrics.spread(values)["values"] == values
    assert pass_metrics.spread(values)["median"] == statistics.median(values)
