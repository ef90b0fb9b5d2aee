# SPDX-License-Identifier: Apache-2.0
"""The figures, against hand-computed values and a second, naive implementation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_profiler.metrics import usage
from tests.support.routing import routings

some_counts = st.lists(st.integers(0, 10**6), min_size=1, max_size=256).filter(any)


def test_hand_computed_figures_of_an_uneven_router() -> None:
    counts = np.array([4, 2, 1, 1])  # shares 1/2, 1/4, 1/8, 1/8
    assert usage.shares(counts).tolist() == [0.5, 0.25, 0.125, 0.125]
    assert usage.entropy_bits(counts) == 1.75  # 1/2*1 + 1/4*2 + 2 * 1/8*3
    assert usage.max_entropy_bits(4) == 2.0
    assert usage.normalised_entropy(counts) == 0.875
    assert usage.effective_experts(counts) == pytest.approx(2**1.75)
    assert usage.max_over_mean(counts) == 2.0
    assert usage.top(counts, 3) == [0, 1, 2]
    assert usage.never_used(counts) == []


def test_even_use_reaches_every_bound() -> None:
    counts = np.full(60, 7)
    assert usage.entropy_bits(counts) == pytest.approx(math.log2(60))
    assert usage.normalised_entropy(counts) == pytest.approx(1.0)
    assert usage.effective_experts(counts) == pytest.approx(60)
    assert usage.max_over_mean(counts) == pytest.approx(1.0)


def test_one_expert_taking_all_reaches_the_other_bound() -> None:
    counts = np.array([0, 9, 0])
    assert str(usage.entropy_bits(counts)) == "0.0"  # not -0.0
    assert usage.normalised_entropy(counts) == 0.0
    assert usage.effective_experts(counts) == 1.0
    assert usage.max_over_mean(counts) == 3.0
    assert usage.top(counts, 3) == [1]
    assert usage.never_used(counts) == [0, 2]


def test_a_single_expert_is_evenly_used() -> None:
    assert usage.normalised_entropy(np.array([5])) == 1.0


def test_nothing_counted_has_no_distribution() -> None:
    counts = np.zeros(4, dtype=np.int64)
    assert np.isnan(usage.shares(counts)).all()
    assert math.isnan(usage.entropy_bits(counts))
    assert math.isnan(usage.effective_experts(counts))
    assert math.isnan(usage.max_over_mean(counts))
    assert usage.top(counts, 3) == []
    assert usage.never_used(counts) == [0, 1, 2, 3]


def test_ties_go_to_the_lower_id() -> None:
    assert usage.top(np.array([1, 3, 3, 3]), 2) == [1, 2]


@given(some_counts)
def test_figures_equal_a_naive_second_implementation(values: list[int]) -> None:
    counts = np.array(values)
    total = sum(values)
    entropy = 0.0
    for value in values:
        if value:
            entropy += value / total * math.log2(total / value)
    assert usage.entropy_bits(counts) == pytest.approx(entropy, abs=1e-9)
    assert usage.effective_experts(counts) == pytest.approx(2**entropy)
    assert usage.max_over_mean(counts) == pytest.approx(
        float(Fraction(max(values)) / Fraction(total, len(values)))
    )
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert usage.top(counts, 3) == [i for i in ranked[:3] if values[i]]
    assert usage.never_used(counts) == [i for i, value in enumerate(values) if value == 0]


@given(some_counts, st.randoms(use_true_random=False))
def test_figures_stay_in_range_and_ignore_the_experts_order(values: list[int], random) -> None:  # type: ignore[no-untyped-def]
    counts = np.array(values)
    shuffled = counts.copy()
    random.shuffle(shuffled)
    assert usage.shares(counts).sum() == pytest.approx(1.0)
    assert -1e-9 <= usage.entropy_bits(counts) <= usage.max_entropy_bits(len(values)) + 1e-9
    assert 1 - 1e-9 <= usage.effective_experts(counts) <= len(values) + 1e-6
    assert 1 - 1e-9 <= usage.max_over_mean(counts) <= len(values) + 1e-9
    assert usage.entropy_bits(shuffled) == pytest.approx(usage.entropy_bits(counts))


def test_hand_computed_inequality_and_coverage() -> None:
    counts = np.array([1, 4, 1, 2])
    assert usage.gini(counts) == 10 / 32
    assert usage.coefficient_of_variation(counts) == pytest.approx(math.sqrt(6 / 4) / 2)
    assert usage.coverage(counts).tolist() == [0.5, 0.75, 0.875, 1.0]
    assert [usage.share_of_top(counts, n) for n in (0, 1, 2, 9)] == [0, 0.5, 0.75, 1]
    assert [usage.experts_to_cover(counts, s) for s in (0, 0.5, 0.51, 0.75, 1)] == [0, 1, 2, 2, 4]


def test_uniform_one_hot_expert_and_two_blocks_have_closed_forms() -> None:
    n = 8
    even, hot, blocks = np.full(n, 5), np.eye(n, dtype=np.int64)[3] * 7, np.repeat([6, 0], n // 2)
    assert [usage.gini(c) for c in (even, hot, blocks)] == pytest.approx([0, 1 - 1 / n, 1 / 2])
    cv = [usage.coefficient_of_variation(c) for c in (even, hot, blocks)]
    assert cv == pytest.approx([0, math.sqrt(n - 1), 1])
    assert usage.coverage(even) == pytest.approx(np.arange(1, n + 1) / n)
    assert usage.coverage(hot).tolist() == [1.0] * n
    assert usage.coverage(blocks).tolist() == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert usage.experts_to_cover(hot, 1.0) == 1


def test_nothing_counted_has_no_inequality_either() -> None:
    counts = np.zeros(4, dtype=np.int64)
    assert math.isnan(usage.gini(counts))
    assert math.isnan(usage.coefficient_of_variation(counts))
    assert np.isnan(usage.coverage(counts)).all()
    assert math.isnan(usage.share_of_top(counts, 0))
    assert math.isnan(usage.share_of_top(counts, 2))
    assert usage.experts_to_cover(counts, 0.5) == 0


@settings(derandomize=True, deadline=None)
@given(some_counts, st.integers(1, 300))
def test_inequality_equals_a_naive_second_implementation(values: list[int], n: int) -> None:
    counts, size, total = np.array(values), len(values), sum(values)
    # Gini: half the mean absolute difference over the mean.
    apart = sum(abs(a - b) for a in values for b in values)
    assert usage.gini(counts) == pytest.approx(apart / (2 * size * total), abs=1e-12)
    mean = Fraction(total, size)
    variance = sum((v - mean) ** 2 for v in values) / size
    assert usage.coefficient_of_variation(counts) == pytest.approx(
        math.sqrt(variance) / float(mean), abs=1e-9
    )
    ranked = sorted(values, reverse=True)
    assert usage.share_of_top(counts, n) == pytest.approx(sum(ranked[:n]) / total)
    assert usage.coverage(counts) == pytest.approx(
        [sum(ranked[: i + 1]) / total for i in range(size)]
    )
    needed = usage.experts_to_cover(counts, 0.9)
    assert sum(ranked[:needed]) / total >= 0.9 > sum(ranked[: needed - 1]) / total


@settings(derandomize=True, deadline=None)
@given(routings(), st.integers(0, 9))
def test_weight_mass_equals_loops(routing, seed: int) -> None:  # type: ignore[no-untyped-def]
    ids, experts = routing
    weights = np.random.default_rng(seed).random(ids.shape)
    mass = [0.0] * experts
    for row, row_weights in zip(ids, weights, strict=True):
        for expert, weight in zip(row, row_weights, strict=True):
            mass[expert] += weight
    assert usage.weight_mass(ids, weights, experts) == pytest.approx(mass)


def test_weight_mass_of_the_docstring() -> None:
    ids, weights = np.array([[0, 2], [2, 1]]), np.array([[0.75, 0.25], [0.5, 0.5]])
    assert usage.weight_mass(ids, weights, 4).tolist() == [0.75, 0.5, 0.75, 0]
