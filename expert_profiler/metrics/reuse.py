# SPDX-License-Identifier: Apache-2.0
"""What a cache of offloaded experts lives on: that the next token chooses the same experts again.

``topk_ids`` is [tokens, K] of one layer, the ids of a token all different, rows sorted by (request,
position); ``request`` and ``position`` are [tokens] integers. ``expert_profiler.metrics.lru`` has
what a cache makes of it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from expert_profiler.metrics.usage import Counts1D

Ids: TypeAlias = "npt.NDArray[Any]"


def neighbours(request: Ids, position: Ids) -> npt.NDArray[np.bool_]:
    """Whether row t + 1 is the next position of the same request as row t. [tokens - 1] bool.

    Where positions are missing (left out, or served by the prefix cache), there is no pair.
    neighbours([0, 0, 0, 1], [0, 1, 3, 4]) = [True, False, False].
    """
    return np.asarray((np.diff(request) == 0) & (np.diff(position) == 1), dtype=np.bool_)


def overlaps(topk_ids: Ids, pairs: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """|S_t & S_t+1| of each neighbouring pair, S_t = the experts of token t.

    pairs: [tokens - 1] bool, from ``neighbours``. [pairs that are True] int64, 0 to K experts.
    overlaps([[0, 1], [1, 2], [2, 1]], [True, True]) = [1, 2].
    """
    before, after = topk_ids[:-1][pairs], topk_ids[1:][pairs]
    shared = np.zeros(len(before), dtype=np.int64)
    for column in before.T:
        shared += (after == column[:, None]).any(axis=1)
    return shared


def chance_reuse(counts: Counts1D, tokens: int) -> float:
    """The reuse of two different tokens drawn at random: what popularity alone gives.

    sum_e(c_e * (c_e - 1)) / (T * (T - 1) * K) with c_e = tokens that choose e, T = tokens and
    K = sum(c) / T: the exact mean of |S_a & S_b| / K over all pairs of different tokens.
    counts: [experts]. No unit, 0 to 1, about K/E for an even router; NaN below two tokens.
    chance_reuse([1, 3, 2], 3) = (0 + 3*2 + 2*1) / (3 * 2 * 2) = 0.667, of [[0, 1], [1, 2], [2, 1]].
    """
    if tokens < 2:
        return float("nan")
    c = counts.astype(np.float64)
    return float((c * (c - 1)).sum()) / ((tokens - 1) * float(c.sum()))


def even_reuse(num_experts: int, top_k: int) -> float:
    """K / E: the reuse when every token draws any K of the E experts. No unit, 1/E to 1."""
    return top_k / num_experts
