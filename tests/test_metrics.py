"""The figures, against hand-computed values and a second, naive implementation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_profiler import metrics

some_counts = st.lists(st.integers(0, 10**6), min_size=1, max_size=256).filter(any)


def test_hand_computed_figures_of_an_uneven_router() -> None:
    counts = np.array([4, 2, 1, 1])  # shares 1/2, 1/4, 1/8, 1/8
    assert metrics.shares(counts).tolist() == [0.5, 0.25, 0.125, 0.125]
    assert metrics.entropy_bits(counts) == 1.75  # 1/2*1 + 1/4*2 + 2 * 1/8*3
    assert metrics.max_entropy_bits(4) == 2.0
    assert metrics.normalised_entropy(counts) == 0.875
    assert metrics.effective_experts(counts) == pytest.approx(2**1.75)
    assert metrics.max_over_mean(counts) == 2.0
    assert metrics.top(counts, 3) == [0, 1, 2]
    assert metrics.never_used(counts) == []


def test_even_use_reaches_every_bound() -> None:
    counts = np.full(60, 7)
    assert metrics.entropy_bits(counts) == pytest.approx(math.log2(60))
    assert metrics.normalised_entropy(counts) == pytest.approx(1.0)
    assert metrics.effective_experts(counts) == pytest.approx(60)
    assert metrics.max_over_mean(counts) == pytest.approx(1.0)


def test_one_expert_taking_all_reaches_the_other_bound() -> None:
    counts = np.array([0, 9, 0])
    assert str(metrics.entropy_bits(counts)) == "0.0"  # not -0.0
    assert metrics.normalised_entropy(counts) == 0.0
    assert metrics.effective_experts(counts) == 1.0
    assert metrics.max_over_mean(counts) == 3.0
    assert metrics.top(counts, 3) == [1]
    assert metrics.never_used(counts) == [0, 2]


def test_a_single_expert_is_evenly_used() -> None:
    assert metrics.normalised_entropy(np.array([5])) == 1.0


def test_nothing_counted_has_no_distribution() -> None:
    counts = np.zeros(4, dtype=np.int64)
    assert np.isnan(metrics.shares(counts)).all()
    assert math.isnan(metrics.entropy_bits(counts))
    assert math.isnan(metrics.effective_experts(counts))
    assert math.isnan(metrics.max_over_mean(counts))
    assert metrics.top(counts, 3) == []
    assert metrics.never_used(counts) == [0, 1, 2, 3]


def test_ties_go_to_the_lower_id() -> None:
    assert metrics.top(np.array([1, 3, 3, 3]), 2) == [1, 2]


@given(some_counts)
def test_figures_equal_a_naive_second_implementation(values: list[int]) -> None:
    counts = np.array(values)
    total = sum(values)
    entropy = 0.0
    for value in values:
        if value:
            entropy += value / total * math.log2(total / value)
    assert metrics.entropy_bits(counts) == pytest.approx(entropy, abs=1e-9)
    assert metrics.effective_experts(counts) == pytest.approx(2**entropy)
    assert metrics.max_over_mean(counts) == pytest.approx(
        float(Fraction(max(values)) / Fraction(total, len(values)))
    )
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert metrics.top(counts, 3) == [i for i in ranked[:3] if values[i]]
    assert metrics.never_used(counts) == [i for i, value in enumerate(values) if value == 0]


@given(some_counts, st.randoms(use_true_random=False))
def test_figures_stay_in_range_and_ignore_the_experts_order(values: list[int], random) -> None:  # type: ignore[no-untyped-def]
    counts = np.array(values)
    shuffled = counts.copy()
    random.shuffle(shuffled)
    assert metrics.shares(counts).sum() == pytest.approx(1.0)
    assert -1e-9 <= metrics.entropy_bits(counts) <= metrics.max_entropy_bits(len(values)) + 1e-9
    assert 1 - 1e-9 <= metrics.effective_experts(counts) <= len(values) + 1e-6
    assert 1 - 1e-9 <= metrics.max_over_mean(counts) <= len(values) + 1e-9
    assert metrics.entropy_bits(shuffled) == pytest.approx(metrics.entropy_bits(counts))
