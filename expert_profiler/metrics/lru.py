"""The hit rate of a cache of n experts a layer that evicts the least recently used one.

Mattson's way: the stack distance of an access is the number of different experts accessed since the
same expert was accessed last, itself included. A cache of n experts has it exactly when the
distance is at most n, so one pass gives the whole curve over n.

An access is one choice. A token accesses its K experts one after another in router order (the
order of ``topk_ids``), so a cache of fewer than K experts can evict within a token. The rows'
order is the serving order, and the caller's choice:

- sorted by (request, position): one request after another, as with one user;
- as written (the log's order): as batched, forward pass by forward pass. There each pass loads an
  expert once for all its tokens: count that with ``pass_accesses``.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from expert_profiler.metrics.usage import Floats

Ids: TypeAlias = "npt.NDArray[Any]"
Ints: TypeAlias = "npt.NDArray[np.int64]"


def stack_distances(accesses: Ids, num_experts: int, session: Ids | None = None) -> Ints:
    """The LRU stack distance of each access.

    accesses: [n] expert ids in serving order. session: [n] integers, equal neighbours share a
    cache, and each change starts with an empty one; None: one cache for all.
    [n] int64, 1 (the same expert again) to experts; 0 for a first access, which always misses.
    stack_distances([0, 1, 0, 0, 2, 1], 3) = [0, 0, 2, 1, 0, 3].
    """
    n = len(accesses)
    when = np.arange(n, dtype=np.int64)
    start = _session_starts(session, n)
    previous = np.full(n, -1, dtype=np.int64)
    for expert in range(num_experts):
        mine = np.flatnonzero(accesses == expert)
        previous[mine[1:]] = mine[:-1]
    previous[previous < start] = -1
    distances = np.ones(n, dtype=np.int64)
    last = np.empty(n, dtype=np.int64)
    for expert in range(num_experts):
        # last[t] is the latest access of this expert before t, -1 if none.
        last[:1] = -1
        np.maximum.accumulate(np.where(accesses == expert, when, -1)[:-1], out=last[1:])
        distances += last > previous
    distances[previous < 0] = 0
    return distances


def hits(distances: Ints, num_experts: int) -> Ints:
    """How many accesses a cache of n experts serves, for n = 1..experts.

    [experts] int64, entry n - 1; never falls. Those of several sessions add up.
    hits([0, 0, 2, 1, 0, 3], 3) = [1, 2, 3].
    """
    of_distance = np.bincount(distances, minlength=num_experts + 1)
    return np.cumsum(of_distance[1 : num_experts + 1])


def hit_rates(topk_ids: Ids, num_experts: int, session: Ids | None = None) -> Floats:
    """hits / choices of a cache of n experts, for n = 1..experts.

    topk_ids: [tokens, K] of one layer, in serving order. session: [tokens] integers as in
    ``stack_distances``, such as the request's index for a cache that starts empty for each request;
    None: it stays warm. [experts] float64, 0 to 1, entry n - 1; never falls; the last entry is
    1 - the share of first accesses; NaN without tokens.
    hit_rates([[0, 1], [0, 2], [0, 1]], 3) = [0, 2/6, 3/6].
    """
    if topk_ids.size == 0:
        return np.full(num_experts, np.nan)
    sessions = None if session is None else np.repeat(session, topk_ids.shape[1])
    distances = stack_distances(topk_ids.ravel(), num_experts, sessions)
    return np.asarray(hits(distances, num_experts) / topk_ids.size, dtype=np.float64)


def pass_accesses(topk_ids: Ids, forward_pass: Ids, num_experts: int) -> Ints:
    """The experts that each forward pass needs, once each: accesses for ``stack_distances``.

    topk_ids: [tokens, K] of one layer; forward_pass: [tokens] integers, never negative.
    [n] int64, by pass, then by expert id.
    pass_accesses([[2, 1], [1, 0], [1, 2]], [4, 4, 5], 3) = [0, 1, 2, 1, 2].
    """
    keys = np.asarray(forward_pass, dtype=np.int64)[:, None] * num_experts + topk_ids
    needed: Ints = np.unique(keys) % num_experts
    return needed


def _session_starts(session: Ids | None, n: int) -> Ints:
    """The index of the first access of each access's session. [n] int64."""
    if session is None:
        return np.zeros(n, dtype=np.int64)
    changes = np.flatnonzero(np.diff(session)) + 1
    starts = np.concatenate([[0], changes]).astype(np.int64)
    return np.repeat(starts, np.diff(np.append(starts, n)))
