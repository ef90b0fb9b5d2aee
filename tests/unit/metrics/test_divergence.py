# SPDX-License-Identifier: Apache-2.0
"""Distance of two logs and what chance makes of it: by hand, closed forms, plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_profiler.metrics import divergence as dv
from expert_profiler.metrics import resampling, usage

PAIRS = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        *[st.lists(st.integers(0, 9), min_size=n, max_size=n).map(np.array) for _ in "ab"]
    )
)


def test_examples_of_the_docstrings() -> None:
    assert float(dv.js_divergence_bits(np.array([1, 0]), np.array([0, 1]))) == 1
    found = dv.js_divergence_bits(np.array([3, 1]), np.array([1, 3]))
    assert float(found) == pytest.approx(1 - usage.entropy_bits(np.array([3, 1])))
    assert float(found) == pytest.approx(0.1887, abs=1e-4)
    a, b = np.array([9, 5, 1]), np.array([3, 1, 2])
    assert dv.rank_correlation(a, b) == pytest.approx(0.5)
    assert dv.top_overlap(a, b, 2) == 0.5
    assert dv.share_difference(np.array([1, 1]), np.array([3, 1])).tolist() == [0.5, -0.5]


def test_closed_forms() -> None:
    even, hot = np.full(8, 3), np.eye(8)[0]
    blocks, others = np.repeat([1, 0], 4), np.repeat([0, 1], 4)
    assert float(dv.js_divergence_bits(even, 7 * even)) == 0
    assert float(dv.js_divergence_bits(blocks, others)) == 1
    # p on half of the experts, q on all: H(m) = .75*log2(16/3) + .25*log2(16), H(p)=2, H(q)=3
    expected = 0.75 * math.log2(16 / 3) + 0.25 * 4 - 2.5
    assert float(dv.js_divergence_bits(blocks, even)) == pytest.approx(expected)
    assert float(dv.js_divergence_bits(hot, np.eye(8)[1])) == 1
    assert dv.rank_correlation(np.arange(8), np.arange(8) ** 2) == pytest.approx(1)
    assert dv.rank_correlation(np.arange(8), -np.arange(8)) == pytest.approx(-1)
    assert math.isnan(dv.rank_correlation(even, hot))
    assert dv.top_overlap(blocks, others, 4) == 0


def test_nothing_counted_has_no_distance() -> None:
    none, some = np.zeros(3), np.ones(3)
    assert math.isnan(float(dv.js_divergence_bits(none, some)))
    assert math.isnan(dv.top_overlap(none, some, 1))
    both = dv.js_divergence_bits(np.stack([none, some]), np.stack([some, some]))
    assert math.isnan(both[0]) and both[1] == 0


@settings(derandomize=True, deadline=None, max_examples=50)
@given(PAIRS)
def test_distances_equal_plain_loops(pair) -> None:  # type: ignore[no-untyped-def]
    a, b = pair
    n = len(a)

    def ranks(values):  # type: ignore[no-untyped-def]
        return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]

    def pearson(x, y):  # type: ignore[no-untyped-def]
        mx, my = sum(x) / n, sum(y) / n
        size = math.sqrt(sum((v - mx) ** 2 for v in x) * sum((v - my) ** 2 for v in y))
        return sum((v - mx) * (w - my) for v, w in zip(x, y, strict=True)) / size if size else None

    expected = pearson(ranks(a.tolist()), ranks(b.tolist()))
    found = dv.rank_correlation(a, b)
    assert found == pytest.approx(expected) if expected is not None else math.isnan(found)
    if not a.any() or not b.any():
        return
    p, q = (a / a.sum()).tolist(), (b / b.sum()).tolist()
    # By the two Kullback-Leibler divergences instead of entropies.
    kl = [
        sum(x * math.log2(2 * x / (x + y)) for x, y in zip(one, two, strict=True) if x)
        for one, two in ((p, q), (q, p))
    ]
    assert float(dv.js_divergence_bits(a, b)) == pytest.approx(sum(kl) / 2, abs=1e-9)
    assert dv.share_difference(a, b) == pytest.approx(
        [n * (y - x) for x, y in zip(p, q, strict=True)]
    )
    for size in range(1, n + 1):
        tops = [sorted(range(n), key=lambda e, c=c: (-c[e], e))[:size] for c in (a, b)]  # type: ignore[misc]
        shared = len(set(tops[0]) & set(tops[1]))
        assert dv.top_overlap(a, b, size) == shared / size


# ---- resampling --------------------------------------------------------------------------------


def requests(seed: int, n: int, skew: float) -> np.ndarray:  # type: ignore[type-arg]
    """[n, 2 layers, 6 experts]: layer 1 the same in all, layer 0 moved by ``skew``."""
    rng = np.random.default_rng(seed)
    even, bent = np.ones(6) / 6, (np.arange(6) * skew + 1) / (np.arange(6) * skew + 1).sum()
    return np.stack([rng.multinomial(200, [bent, even]) for _ in range(n)])


def entropy(counts: np.ndarray) -> float:  # type: ignore[type-arg]
    return usage.entropy_bits(counts.ravel())


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = np.array([0.5, 0.25, 0.125, 0.125])
    hits = 0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(30, rng.dirichlet(200 * truth, size=40))
        low, high = resampling.bootstrap_interval(counts, entropy, draws=200, seed=seed)
        assert low < high
        hits += low <= 1.75 <= high
    assert 70 <= hits <= 80


def test_alike_requests_leave_no_doubt_and_one_request_gives_no_interval() -> None:
    alike = np.tile([4, 2, 1, 1], (5, 1))
    assert resampling.bootstrap_interval(alike, entropy) == pytest.approx((1.75, 1.75))
    assert all(map(math.isnan, resampling.bootstrap_interval(alike[:1], entropy)))
    spread = np.eye(4, dtype=int) * 9
    assert resampling.bootstrap_interval(spread, entropy, bounds=(0, 2))[1] == 2


@pytest.mark.parametrize("paired", [False, True])
def test_a_layer_that_differs_is_found_and_one_that_does_not_is_left(paired: bool) -> None:
    found = resampling.divergence_test(
        requests(0, 20, 0.0), requests(1, 20, 0.4), paired=paired, draws=99
    )
    assert found.p_value[0] == 0.01 == found.mean_p_value
    assert found.p_value[1] > 0.05
    assert found.observed[0] > found.null_p95[0] > found.null_mean[0]


def test_a_log_does_not_differ_from_itself() -> None:
    one = requests(0, 10, 0.3)
    found = resampling.divergence_test(one, one, paired=True, draws=50)
    assert found.observed.tolist() == [0, 0] and found.p_value.tolist() == [1, 1]


def test_splits_of_one_log_are_called_different_as_rarely_as_the_p_value_says() -> None:
    values = [
        resampling.divergence_test(requests(i, 8, 0.3), requests(1000 + i, 6, 0.3), draws=19)
        for i in range(120)
    ]
    assert np.mean([v.mean_p_value <= 0.05 for v in values]) < 0.1
    assert np.mean([v.p_value[0] <= 0.05 for v in values]) < 0.1


def test_pairing_finds_what_differs_within_pairs_only() -> None:
    # Prompts differ far more from each other than one prompt does between the two runs.
    rng = np.random.default_rng(5)
    base = rng.multinomial(400, rng.dirichlet(np.ones(6) * 0.3, size=12))
    moved = np.stack([np.roll(row, 0) for row in base])
    moved[:, 0] += 30
    a, b = base[:, None], moved[:, None]
    assert resampling.divergence_test(a, b, paired=True, draws=99).mean_p_value == 0.01
    assert resampling.divergence_test(a, b, paired=False, draws=99).mean_p_value > 0.05
