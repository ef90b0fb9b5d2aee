# SPDX-License-Identifier: Apache-2.0
"""Metrics that compare between top_k: their ends, and a second implementation."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings

from expert_profiler.metrics import topk_normalised as tn
from tests.support.routing import routings

CASES = [(8, 1), (8, 2), (60, 4), (256, 8)]


def metrics(counts, top_k):  # type: ignore[no-untyped-def]
    return [
        tn.entropy_lack(counts, top_k),
        tn.excess_peak(counts, top_k),
        tn.gini(counts, top_k),
        tn.coefficient_of_variation(counts, top_k),
    ]


def test_hand_computed_metrics() -> None:
    counts = np.array([4, 2, 1, 1])
    assert tn.entropy_lack(counts, 2) == 0.25
    assert tn.excess_peak(counts, 2) == 1
    assert tn.gini(counts, 2) == 0.625
    assert tn.coefficient_of_variation(counts, 2) == pytest.approx(math.sqrt(1.5) / 2)
    assert tn.coverage_at(counts, np.array([0, 0.25, 0.375, 1])).tolist() == [0, 0.5, 0.625, 1]


@pytest.mark.parametrize(("experts", "top_k"), CASES)
def test_even_use_is_0_and_k_experts_for_every_token_is_1(experts: int, top_k: int) -> None:
    hot = np.where(np.arange(experts) < top_k, 9, 0)
    assert metrics(np.full(experts, 3), top_k) == pytest.approx([0] * 4, abs=1e-9)
    assert metrics(hot, top_k) == pytest.approx([1] * 4)


@pytest.mark.parametrize(("experts", "top_k"), CASES)
def test_two_blocks_have_closed_forms(experts: int, top_k: int) -> None:
    blocks = np.repeat([6, 0], experts // 2)  # half of the experts share all
    ratio = experts / top_k
    assert tn.entropy_lack(blocks, top_k) == pytest.approx(1 / math.log2(ratio))
    assert tn.excess_peak(blocks, top_k) == pytest.approx(1 / (ratio - 1))
    assert tn.gini(blocks, top_k) == pytest.approx(0.5 / (1 - 1 / ratio))
    assert tn.coefficient_of_variation(blocks, top_k) == pytest.approx(1 / math.sqrt(ratio - 1))


def test_where_every_token_takes_every_expert_nothing_is_uneven() -> None:
    assert metrics(np.full(4, 7), 4) == [0] * 4


def test_nothing_counted_has_no_figure() -> None:
    counts = np.zeros(4, dtype=np.int64)
    assert all(map(math.isnan, metrics(counts, 2)))
    assert np.isnan(tn.coverage_at(counts, np.array([0.5]))).all()


def test_counts_that_this_top_k_cannot_give_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 1/2"):
        tn.gini(np.array([3, 1, 0]), 2)
    with pytest.raises(ValueError, match="top_k is 0"):
        tn.gini(np.array([3, 1]), 0)


@settings(derandomize=True, deadline=None)
@given(routings())
def test_figures_equal_a_naive_second_implementation(routing) -> None:  # type: ignore[no-untyped-def]
    ids, experts = routing
    k = ids.shape[1]
    found = Counter(int(e) for row in ids for e in row)
    counts = np.array([found[e] for e in range(experts)])

    # The ends are measured on built counts here, not taken from formulas.
    def scaled(plain) -> float:  # type: ignore[no-untyped-def]
        even, worst = [1] * experts, [1] * k + [0] * (experts - k)
        return 0 if k == experts else (plain(counts) - plain(even)) / (plain(worst) - plain(even))

    def entropy(c) -> float:  # type: ignore[no-untyped-def]
        return -sum(n / sum(c) * math.log(n / sum(c)) for n in c if n)

    def gini(c) -> float:  # type: ignore[no-untyped-def]
        return sum(abs(a - b) for a in map(int, c) for b in map(int, c)) / sum(c)

    def peak(c) -> float:  # type: ignore[no-untyped-def]
        return max(c) / sum(c)

    def deviation(c) -> float:  # type: ignore[no-untyped-def]
        return math.sqrt(sum((n / sum(c) - 1 / len(c)) ** 2 for n in c))

    same = {"abs": 1e-6}  # square roots near 0
    assert tn.entropy_lack(counts, k) == pytest.approx(scaled(entropy), **same)
    assert tn.gini(counts, k) == pytest.approx(scaled(gini), **same)
    assert tn.excess_peak(counts, k) == pytest.approx(scaled(peak), **same)
    assert tn.coefficient_of_variation(counts, k) == pytest.approx(scaled(deviation), **same)
