"""The cache curve, against a cache that is really kept, and closed forms."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_profiler.metrics import lru
from tests.support.routing import requests_of, routings


def kept_cache(accesses: list[int], size: int, sessions: list[int]) -> int:
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for i, expert in enumerate(accesses):
        if i and sessions[i] != sessions[i - 1]:
            cache.clear()
        if expert in cache:
            hits += 1
            cache.move_to_end(expert)
            continue
        if len(cache) == size:
            cache.popitem(last=False)
        cache[expert] = None
    return hits


def test_examples_of_the_docstrings() -> None:
    distances = lru.stack_distances(np.array([0, 1, 0, 0, 2, 1]), 3)
    assert distances.tolist() == [0, 0, 2, 1, 0, 3]
    assert lru.hits(distances, 3).tolist() == [1, 2, 3]
    rates = lru.hit_rates(np.array([[0, 1], [0, 2], [0, 1]]), 3)
    assert rates == pytest.approx([0, 2 / 6, 3 / 6])
    ids = np.array([[2, 1], [1, 0], [1, 2]])
    assert lru.pass_accesses(ids, np.array([4, 4, 5]), 3).tolist() == [0, 1, 2, 1, 2]


def test_one_hot_expert_misses_once_and_a_cycle_until_all_fit() -> None:
    assert lru.hit_rates(np.zeros((10, 1), dtype=int), 4).tolist() == [0.9] * 4
    cycle = np.tile(np.arange(4), 5)[:, None]
    assert lru.hit_rates(cycle, 4).tolist() == [0, 0, 0, 0.8]


def test_two_blocks_need_room_for_both() -> None:
    alternating = np.array([[0, 1], [2, 3]] * 5)
    assert lru.hit_rates(alternating, 4).tolist() == [0, 0, 0, 0.8]
    in_turn = np.array([[0, 1]] * 5 + [[2, 3]] * 5)
    assert lru.hit_rates(in_turn, 4) == pytest.approx([0, 0.8, 0.8, 0.8])


def test_an_even_router_hits_in_proportion_to_the_cache() -> None:
    accesses = np.random.default_rng(0).integers(0, 8, (40_000, 1))
    assert lru.hit_rates(accesses, 8) == pytest.approx(np.arange(1, 9) / 8, abs=0.01)


def test_no_tokens_have_no_rate() -> None:
    assert np.isnan(lru.hit_rates(np.zeros((0, 2), dtype=int), 3)).all()
    assert lru.hits(lru.stack_distances(np.zeros(0, dtype=int), 3), 3).tolist() == [0, 0, 0]


@settings(derandomize=True, deadline=None)
@given(routings(), st.booleans(), st.integers(0, 99))
def test_hit_rates_equal_a_kept_cache(routing, cold: bool, seed: int) -> None:  # type: ignore[no-untyped-def]
    ids, experts = routing
    request, _ = requests_of(len(ids), seed)
    session = request if cold else np.zeros_like(request)
    rates = lru.hit_rates(ids, experts, request if cold else None)
    accesses, sessions = ids.ravel().tolist(), np.repeat(session, ids.shape[1]).tolist()
    expected = [kept_cache(accesses, n, sessions) / ids.size for n in range(1, experts + 1)]
    assert rates == pytest.approx(expected)
    # Cold sessions can be counted apart and added.
    apart = sum(
        lru.hits(lru.stack_distances(ids[request == r].ravel(), experts), experts) for r in range(3)
    )
    if cold:
        assert rates == pytest.approx(apart / ids.size)


@settings(derandomize=True, deadline=None)
@given(routings(), st.integers(0, 99))
def test_a_pass_needs_each_expert_once(routing, seed: int) -> None:  # type: ignore[no-untyped-def]
    ids, experts = routing
    passes, _ = requests_of(len(ids), seed)
    expected = []
    for number in sorted(set(passes.tolist())):
        expected += sorted({e for row in ids[passes == number].tolist() for e in row})
    assert lru.pass_accesses(ids, passes, experts).tolist() == expected
