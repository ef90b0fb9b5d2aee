"""The figures of timing.json, against hand-computed cases and a plain second implementation."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_profiler.run.timing import Repeat, overhead, summarise

seconds = st.floats(0.01, 1000)


def test_the_figures_at_the_top_belong_to_one_repeat() -> None:
    record = summarise([Repeat(4.0, 400), Repeat(2.0, 100), Repeat(3.0, 330)])
    assert (record["wall_time_sec"], record["tokens_generated"]) == (3.0, 330)
    assert record["tokens_per_sec"] == pytest.approx(110)
    assert [item["wall_time_sec"] for item in record["repeats"]] == [4.0, 2.0, 3.0]
    assert record["spread_wall_time_sec"] == {"min": 2.0, "max": 4.0, "iqr": 1.0}


@given(st.lists(seconds, min_size=1, max_size=9))
def test_the_median_is_the_median(times: list[float]) -> None:
    record = summarise([Repeat(time, 10) for time in times])
    assert record["median_wall_time_sec"] == pytest.approx(statistics.median(times))
    assert record["wall_time_sec"] in times


def test_overhead_is_the_median_of_paired_ratios() -> None:
    no_log = [Repeat(1.0, 1), Repeat(2.0, 1), Repeat(4.0, 1)]
    log = [Repeat(1.1, 1), Repeat(2.1, 1), Repeat(6.0, 1)]
    record = overhead(no_log, log)
    assert record["paired_ratio_median"] == pytest.approx(1.1)
    assert record["paired_ratios"] == pytest.approx([1.1, 1.05, 1.5])
    assert record["pairs"] == 3


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=9))
def test_the_interval_holds_the_median_and_lies_within_the_ratios(
    pairs: list[tuple[float, float]],
) -> None:
    record = overhead([Repeat(a, 1) for a, _ in pairs], [Repeat(b, 1) for _, b in pairs])
    low, high = record["paired_ratio_ci95"]
    ratios = [b / a for a, b in pairs]
    assert min(ratios) <= low * (1 + 1e-9)
    assert low <= record["paired_ratio_median"] * (1 + 1e-9)
    assert record["paired_ratio_median"] <= high * (1 + 1e-9)
    assert high <= max(ratios) * (1 + 1e-9)


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        overhead([Repeat(1.0, 1)], [])
