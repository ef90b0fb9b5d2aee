# SPDX-License-Identifier: Apache-2.0
"""Experts chosen together, against dictionaries and closed forms."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_profiler.metrics import coactivation as co
from tests.support.routing import routings


def test_examples_of_the_docstrings() -> None:
    pairs = co.pair_counts(np.array([[0, 1], [1, 0], [0, 2]]), 3)
    assert pairs.tolist() == [[3, 2, 1], [2, 2, 0], [1, 0, 1]]
    lift = co.lift(pairs, 3)
    assert lift[0, 1] == 1 and lift[1, 2] == 0 and math.isnan(lift[0, 0])
    assert co.top_pairs(pairs, 5) == [(0, 1), (0, 2)]
    moves = co.transition_counts(np.array([[0], [0], [1]]), np.array([[1], [0], [1]]), 2, 2)
    assert moves.tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize(("experts", "top_k"), [(5, 2), (6, 3), (4, 1), (3, 3)])
def test_all_sets_once_have_the_even_lift(experts: int, top_k: int) -> None:
    sets = np.array(list(itertools.combinations(range(experts), top_k)))
    lift = co.lift(co.pair_counts(sets, experts), len(sets))
    off_diagonal = lift[~np.eye(experts, dtype=bool)]
    even = experts * (top_k - 1) / (top_k * (experts - 1))
    assert off_diagonal == pytest.approx(even)


def test_two_blocks_never_mix() -> None:
    ids = np.array([[0, 1], [2, 3]] * 10)
    lift = co.lift(co.pair_counts(ids, 4), 20)
    assert lift[0, 1] == lift[2, 3] == 2  # each half of the tokens: 1/2 / (1/2 * 1/2)
    assert (lift[:2, 2:] == 0).all()
    moves = co.transition_counts(ids, ids, 4, 4)
    assert moves.tolist() == [[10, 10, 0, 0]] * 2 + [[0, 0, 10, 10]] * 2


def test_a_single_expert_has_no_pairs() -> None:
    assert co.top_pairs(co.pair_counts(np.zeros((3, 1), dtype=int), 1), 3) == []


@settings(derandomize=True, deadline=None)
@given(routings())
def test_pairs_and_lift_equal_dictionaries(routing) -> None:  # type: ignore[no-untyped-def]
    ids, experts = routing
    together: Counter[tuple[int, int]] = Counter()
    alone: Counter[int] = Counter()
    for row in ids.tolist():
        alone.update(row)
        together.update(itertools.permutations(row, 2))
    pairs = co.pair_counts(ids, experts)
    lift = co.lift(pairs, len(ids))
    for i, j in itertools.product(range(experts), repeat=2):
        assert pairs[i, j] == (alone[i] if i == j else together[i, j])
        if i == j or not alone[i] or not alone[j]:
            assert math.isnan(lift[i, j])
        else:
            p = together[i, j] / len(ids)
            assert lift[i, j] == pytest.approx(p / (alone[i] / len(ids) * alone[j] / len(ids)))
    ranked = sorted((-n, pair) for pair, n in together.items() if pair[0] < pair[1])
    assert co.top_pairs(pairs, 4) == [pair for _, pair in ranked[:4]]


@settings(derandomize=True, deadline=None)
@given(routings(), routings(min_tokens=30), st.integers(0, 30))
def test_transitions_equal_loops_and_batches_add_up(first, second, cut: int) -> None:  # type: ignore[no-untyped-def]
    (ids, experts), (after, next_experts) = first, second
    after = after[: len(ids)]
    moves = co.transition_counts(ids, after, experts, next_experts)
    parts = [
        co.transition_counts(ids[part], after[part], experts, next_experts)
        for part in (slice(cut), slice(cut, None))
    ]
    assert (parts[0] + parts[1] == moves).all()
    rows = list(zip(ids.tolist(), after.tolist(), strict=True))
    for i, j in itertools.product(range(experts), range(next_experts)):
        assert moves[i, j] == sum(i in now and j in then for now, then in rows)


def test_fixed_teams_have_closed_information_and_even_experts_what_sampling_gives() -> None:
    teams = co.pair_counts(np.array([[0, 1], [2, 3]] * 5), 4)
    assert co.pair_information_bits(teams) == pytest.approx(math.log2(3))
    even = np.array([[a, b] for a in range(4) for b in range(4) if a != b])
    assert co.pair_information_bits(co.pair_counts(even, 4)) == 0
    rng = np.random.default_rng(0)
    found, expected = [], []
    for _ in range(40):
        ids = np.argsort(rng.random((500, 12)), axis=1)[:, :2]
        pairs = co.pair_counts(ids, 12)
        found.append(co.pair_information_bits(pairs))
        expected.append(co.pair_chance_bits(pairs))
    assert np.mean(found) == pytest.approx(np.mean(expected), rel=0.1)
    single = co.pair_counts(np.array([[0], [1]]), 2)
    assert math.isnan(co.pair_information_bits(single))
    assert math.isnan(co.pair_chance_bits(single))


@settings(derandomize=True, deadline=None)
@given(routings())
def test_information_in_pairs_equals_a_plain_sum(routing) -> None:  # type: ignore[no-untyped-def]
    ids, experts = routing
    met = Counter(frozenset(p) for row in ids.tolist() for p in itertools.combinations(row, 2))
    single = Counter(e for row in ids.tolist() for e in row)
    found = co.pair_information_bits(co.pair_counts(ids, experts))
    if not met:
        assert math.isnan(found)
        return
    popular = {frozenset(p): single[p[0]] * single[p[1]] for p in itertools.combinations(single, 2)}
    n, all_popular = sum(met.values()), sum(popular.values())
    bits = sum(m / n * math.log2(m / n / (popular[p] / all_popular)) for p, m in met.items())
    assert found == pytest.approx(max(0, bits), abs=1e-9)
