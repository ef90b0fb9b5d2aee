# SPDX-License-Identifier: Apache-2.0
"""The cache curve, against a cache that is really kept, and closed forms."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from expert_profiler.metrics import lru
from tests.support.routing import routings


def kept_cache(accesses: list[int], size: int) -> int:
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in accesses:
        if expert in cache:
            hits += 1
            cache.move_to_end(expert)
            continue
        if len(cache) == size:
            cache.popitem(last=False)
        cache[expert] = None
    return hits


def hit_rates(ids: Any, experts: int) -> Any:
    return lru.hits(lru.stack_distances(ids.ravel(), experts), experts) / ids.size


def test_examples_of_the_docstrings() -> None:
    distances = lru.stack_distances(np.array([0, 1, 0, 0, 2, 1]), 3)
    assert distances.tolist() == [0, 0, 2, 1, 0, 3]
    assert lru.hits(distances, 3).tolist() == [1, 2, 3]
    rates = hit_rates(np.array([[0, 1], [0, 2], [0, 1]]), 3)
    assert rates == pytest.approx([0, 2 / 6, 3 / 6])


def test_one_hot_expert_misses_once_and_a_cycle_until_all_fit() -> None:
    assert hit_rates(np.zeros((10, 1), dtype=int), 4).tolist() == [0.9] * 4
    cycle = np.tile(np.arange(4), 5)[:, None]
    assert hit_rates(cycle, 4).tolist() == [0, 0, 0, 0.8]


def test_two_blocks_need_room_for_both() -> None:
    alternating = np.array([[0, 1], [2, 3]] * 5)
    assert hit_rates(alternating, 4).tolist() == [0, 0, 0, 0.8]
    in_turn = np.array([[0, 1]] * 5 + [[2, 3]] * 5)
    assert hit_rates(in_turn, 4) == pytest.approx([0, 0.8, 0.8, 0.8])


def test_an_even_router_hits_in_proportion_to_the_cache() -> None:
    accesses = np.random.default_rng(0).integers(0, 8, (40_000, 1))
    assert hit_rates(accesses, 8) == pytest.approx(np.arange(1, 9) / 8, abs=0.01)


def test_no_access_is_no_hit() -> None:
    assert lru.hits(lru.stack_distances(np.zeros(0, dtype=int), 3), 3).tolist() == [0, 0, 0]


@settings(derandomize=True, deadline=None)
@given(routings())
def test_hit_rates_equal_a_kept_cache(routing) -> None:  # type: ignore[no-untyped-def]
    ids, experts = routing
    accesses = ids.ravel().tolist()
    expected = [kept_cache(accesses, n) / ids.size for n in range(1, experts + 1)]
    assert hit_rates(ids, experts) == pytest.approx(expected)
