# SPDX-License-Identifier: Apache-2.0
"""Expert parallel placement: by hand, closed forms, and against vLLM's own balancer."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_profiler.metrics import placement as pl


def test_examples_of_the_docstrings() -> None:
    assert pl.linear(5, 2).tolist() == [0, 0, 0, 1, 1]
    assert pl.round_robin(5, 2).tolist() == [0, 1, 0, 1, 0]
    loads = pl.rank_loads(np.array([4, 2, 1]), np.array([0, 1, 1]), 2)
    assert loads.tolist() == [4, 3]
    assert float(pl.balance(loads)) == 0.875
    assert pl.copies(np.array([8, 3, 1]), 5).tolist() == [3, 1, 1]
    assert (pl.fewest_extra(60, 8), pl.fewest_extra(256, 8)) == (12, 8)


def test_even_load_is_balanced_and_one_hot_expert_is_one_ranks_work() -> None:
    even, hot = np.full(8, 5), np.eye(8)[3] * 40
    for place in (pl.linear, pl.round_robin):
        assert float(pl.balance(pl.rank_loads(even, place(8, 4), 4))) == 1
        assert float(pl.balance(pl.rank_loads(hot, place(8, 4), 4))) == 0.25
    # A copy of the hot expert on every rank: each takes a quarter.
    spread = pl.replicated(hot, 4, 4)
    assert spread.copies.tolist() == [1, 1, 1, 5, 1, 1, 1, 1]
    assert float(pl.balance(spread.loads(hot))) == pytest.approx(10 / 16)  # 5 copies on 4 ranks


def test_two_blocks_suit_round_robin_and_not_linear() -> None:
    blocks = np.repeat([6, 0], 4)
    assert float(pl.balance(pl.rank_loads(blocks, pl.linear(8, 2), 2))) == 0.5
    assert float(pl.balance(pl.rank_loads(blocks, pl.round_robin(8, 2), 2))) == 1


def test_no_load_has_no_balance_and_uneven_slots_are_refused() -> None:
    assert math.isnan(float(pl.balance(np.zeros(3))))
    with pytest.raises(ValueError, match="no multiple of 4 ranks"):
        pl.replicated(np.ones(6), 4, 1)


COUNTS = st.integers(1, 10).flatmap(
    lambda n: st.lists(st.integers(0, 30), min_size=n, max_size=n).map(np.array)
)


@settings(derandomize=True, deadline=None)
@given(COUNTS, st.integers(1, 5))
def test_placements_equal_plain_loops(counts, ranks: int) -> None:  # type: ignore[no-untyped-def]
    experts = len(counts)
    for place in (pl.linear, pl.round_robin):
        rank_of = place(experts, ranks)
        sizes = [rank_of.tolist().count(rank) for rank in range(ranks)]
        assert max(sizes) - min(sizes) <= 1
        loads = [0] * ranks
        for expert, count in enumerate(counts.tolist()):
            loads[rank_of[expert]] += count
        found = pl.rank_loads(counts, rank_of, ranks)
        assert found.tolist() == loads
        if sum(loads):
            assert float(pl.balance(found)) == pytest.approx(sum(loads) / ranks / max(loads))
    plan = pl.replicated(counts, ranks, pl.fewest_extra(experts, ranks))
    flat = plan.expert.ravel().tolist()
    assert [flat.count(e) for e in range(experts)] == plan.copies.tolist()
    by_slot = [sum(counts[e] / flat.count(e) for e in row) for row in plan.expert.tolist()]
    assert plan.loads(counts) == pytest.approx(by_slot)
    assert sum(by_slot) == pytest.approx(counts.sum())
    # Counts of several layers at once are those of each.
    assert plan.loads(np.stack([counts, counts]))[1] == pytest.approx(by_slot)


def vllm_policy():  # type: ignore[no-untyped-def]
    """vLLM's DefaultEplbPolicy by path: importing all of vllm takes long."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no vllm here")
    pytest.importorskip("torch")
    package = types.ModuleType("eplb_policy")
    # Other tests put this checkout's overlay in front of the installed package.
    package.__path__ = [
        str(Path(root) / "distributed" / "eplb" / "policy")
        for root in spec.submodule_search_locations
    ]
    sys.modules["eplb_policy"] = package
    return importlib.import_module("eplb_policy.default").DefaultEplbPolicy


def test_vllms_own_balancer_gives_as_many_copies_and_the_same_loads() -> None:
    torch = pytest.importorskip("torch")
    policy = vllm_policy()
    rng = np.random.default_rng(0)
    for experts, ranks, extra in [(60, 4, 4), (60, 8, 12), (64, 8, 8), (256, 16, 32)]:
        counts = np.unique(rng.integers(1, 10**6, 4 * experts))[:experts]  # no ties
        counts = rng.permutation(counts)
        answer = policy.rebalance_experts(
            torch.tensor(counts[None]).float(), experts + extra, 1, 1, ranks
        )
        physical, numbers = np.asarray(answer[0][0]), np.asarray(answer[-1][0])
        plan = pl.replicated(counts, ranks, extra)
        assert plan.copies.tolist() == numbers.tolist()
        theirs = (counts / numbers)[physical.reshape(ranks, -1)].sum(axis=1)
        assert sorted(plan.loads(counts)) == pytest.approx(sorted(theirs), rel=1e-5)
