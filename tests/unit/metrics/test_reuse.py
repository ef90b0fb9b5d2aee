# SPDX-License-Identifier: Apache-2.0
"""Reuse of experts by the next token, against sets."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_profiler.metrics import reuse
from tests.support.routing import requests_of, routings


def test_examples_of_the_docstrings() -> None:
    ids = np.array([[0, 1], [1, 2], [2, 1]])
    pairs = reuse.neighbours(np.array([0, 0, 0]), np.array([0, 1, 2]))
    assert reuse.overlaps(ids, pairs).tolist() == [1, 2]
    assert reuse.chance_reuse(np.array([1, 3, 2]), 3) == pytest.approx(2 / 3)
    gaps = reuse.neighbours(np.array([0, 0, 0, 1]), np.array([0, 1, 3, 4]))
    assert gaps.tolist() == [True, False, False]


def test_one_hot_set_is_always_reused_and_two_alternating_blocks_never() -> None:
    pairs = np.ones(9, dtype=bool)
    assert (reuse.overlaps(np.array([[3, 5]] * 10), pairs) == 2).all()
    blocks = np.array([[0, 1], [2, 3]] * 5)
    assert not reuse.overlaps(blocks, pairs).any()
    # 4 of the 9 other tokens are of the same block.
    assert reuse.chance_reuse(np.bincount(blocks.ravel()), 10) == pytest.approx(4 / 9)


def test_an_even_router_has_the_even_reuse_by_chance() -> None:
    assert reuse.chance_reuse(np.full(60, 10**6), 15 * 10**6) == pytest.approx(
        reuse.even_reuse(60, 4), rel=1e-5
    )


def test_without_a_pair_there_is_no_reuse() -> None:
    assert len(reuse.overlaps(np.array([[0, 1]]), np.zeros(0, dtype=bool))) == 0
    assert math.isnan(reuse.chance_reuse(np.array([1, 1]), 1))


@settings(derandomize=True, deadline=None)
@given(routings(), st.integers(0, 99))
def test_reuse_equals_sets_and_dictionaries(routing, seed: int) -> None:  # type: ignore[no-untyped-def]
    ids, experts = routing
    request, position = requests_of(len(ids), seed)
    sets = {
        (int(r), int(p)): set(row)
        for r, p, row in zip(request, position, ids.tolist(), strict=True)
    }
    shared = [len(now & sets[r, p + 1]) for (r, p), now in sets.items() if (r, p + 1) in sets]
    pairs = reuse.neighbours(request, position)
    assert reuse.overlaps(ids, pairs).tolist() == shared
    k = ids.shape[1]
    rows = [set(row) for row in ids.tolist()]
    others = [len(a & b) / k for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    counts = Counter(e for row in rows for e in row)
    chance = reuse.chance_reuse(np.array([counts[e] for e in range(experts)]), len(rows))
    assert chance == pytest.approx(sum(others) / len(others)) if others else math.isnan(chance)
