# SPDX-License-Identifier: Apache-2.0
"""The hit rate of a cache of n experts a layer that evicts the least recently used one.

Mattson's way: the stack distance of an access is the number of different experts accessed since the
same expert was accessed last, itself included. A cache of n experts has it exactly when the
distance is at most n, so one pass gives the whole curve over n.

An access is one choice. A token accesses its K experts one after another in router order (the
order of ``topk_ids``), so a cache of fewer than K experts can evict within a token. The rows'
order is the serving order: sorted by (request, position), it is one request after another, as with
one user.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Ids: TypeAlias = "npt.NDArray[Any]"
Ints: TypeAlias = "npt.NDArray[np.int64]"


def stack_distances(accesses: Ids, num_experts: int) -> Ints:
    """The LRU stack distance of each access.

    accesses: [n] expert ids in serving order.
    [n] int64, 1 (the same expert again) to experts; 0 for a first access, which always misses.
    stack_distances([0, 1, 0, 0, 2, 1], 3) = [0, 0, 2, 1, 0, 3].
    """
    n = len(accesses)
    when = np.arange(n, dtype=np.int64)
    previous = np.full(n, -1, dtype=np.int64)
    for expert in range(num_experts):
        mine = np.flatnonzero(accesses == expert)
        previous[mine[1:]] = mine[:-1]
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

    [experts] int64, entry n - 1; never falls.
    hits([0, 0, 2, 1, 0, 3], 3) = [1, 2, 3].
    """
    of_distance = np.bincount(distances, minlength=num_experts + 1)
    return np.cumsum(of_distance[1 : num_experts + 1])
