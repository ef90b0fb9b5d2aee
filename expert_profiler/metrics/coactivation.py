# SPDX-License-Identifier: Apache-2.0
"""Which experts are chosen together: in one layer, and from a layer to the next.

``topk_ids`` is [tokens, K], any integer dtype, the ids of a token all different. Counts of batches
of tokens add up, so a log of any size can be counted piece by piece.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from expert_profiler.metrics.usage import Floats

Ids: TypeAlias = "npt.NDArray[Any]"
Ints: TypeAlias = "npt.NDArray[np.int64]"


def pair_counts(topk_ids: Ids, num_experts: int) -> Ints:
    """n_ij = tokens that choose both i and j in this layer; n_ii = tokens that choose i.

    [experts, experts] int64, symmetric, 0 to tokens. Each row sums to K * n_ii.
    pair_counts([[0, 1], [1, 0], [0, 2]], 3) = [[3, 2, 1], [2, 2, 0], [1, 0, 1]].
    """
    return transition_counts(topk_ids, topk_ids, num_experts, num_experts)


def lift(pairs: Ints, tokens: int) -> Floats:
    """L_ij = P(i and j) / (P(i) * P(j)) = n_ij * tokens / (n_ii * n_jj).

    pairs: [experts, experts] from ``pair_counts``; tokens: how many tokens it counts.
    [experts, experts] float64, 0 (never together) up, 1 where i and j are independent; NaN on the
    diagonal and where i or j was never chosen. As a token's K ids are different, a router without
    any preference lies a little below 1, at E * (K - 1) / (K * (E - 1)).
    lift(the example of pair_counts, 3)[0, 1] = 2 * 3 / (3 * 2) = 1.
    """
    single = np.diagonal(pairs).astype(np.float64)
    expected = np.outer(single, single)
    np.fill_diagonal(expected, 0)
    found = np.full(pairs.shape, np.nan)
    quotient: Floats = np.divide(pairs * float(tokens), expected, out=found, where=expected != 0)
    return quotient


def pair_information_bits(pairs: Ints) -> float:
    """D = sum_{i<j} q_ij * log2(q_ij / r_ij): how far the pairs are from independent experts.

    q_ij = n_ij / sum of n over i < j; r_ij = n_ii * n_jj, scaled to sum 1 over i < j. pairs:
    [experts, experts] from ``pair_counts``. Bits, 0 (pairs as popularity gives them) up; NaN
    without a pair. A sample is above 0 by chance: ``pair_chance_bits``.
    Of the tokens [[0, 1], [2, 3]] * 5 and 4 experts: both pairs have q = 1/2, all six have r = 1/6,
    D = log2(3) = 1.585.
    """
    first, second = np.triu_indices(len(pairs), k=1)
    found = pairs[first, second].astype(np.float64)
    single = np.diagonal(pairs).astype(np.float64)
    expected = single[first] * single[second]
    if not found.any():
        return float("nan")
    q, r = found / found.sum(), expected / expected.sum()
    seen = q > 0
    return max(0.0, float((q[seen] * np.log2(q[seen] / r[seen])).sum()))


def pair_chance_bits(pairs: Ints) -> float:
    """What ``pair_information_bits`` has by sampling alone, about: cells / (2 * ln 2 * pairs).

    cells = E * (E - 1) / 2 - E, with E the experts that occur, is the number of values that pairs
    have beyond popularity. Bits; NaN without a pair. Of four experts and 100 pairs:
    2 / (2 * 0.6931 * 100) = 0.0144.
    """
    number = (int(pairs.sum()) - int(np.trace(pairs))) // 2
    used = int((np.diagonal(pairs) > 0).sum())
    if number == 0:
        return float("nan")
    return max(0, used * (used - 3) // 2) / (2 * math.log(2) * number)


def top_pairs(scores: Floats | Ints, n: int) -> list[tuple[int, int]]:
    """The n pairs i < j with the highest score, highest first, ties by ids; NaN and 0 left out.

    scores: [experts, experts], symmetric, such as lift or pair counts.
    """
    first, second = np.triu_indices(len(scores), k=1)
    values = np.nan_to_num(scores[first, second].astype(np.float64), nan=0.0)
    order = np.argsort(-values, kind="stable")[:n]
    return [(int(first[o]), int(second[o])) for o in order if values[o] > 0]


def transition_counts(
    topk_ids: Ids, next_topk_ids: Ids, num_experts: int, next_num_experts: int
) -> Ints:
    """n_ij = tokens that choose i in a layer and j in the next one.

    topk_ids: [tokens, K] of the layer, next_topk_ids: [tokens, K'] of the next, row by row the same
    tokens. [experts, next experts] int64, 0 to tokens; row i sums to K' * tokens with i.
    transition_counts([[0], [0], [1]], [[1], [0], [1]], 2, 2) = [[1, 1], [0, 1]].
    """
    cells = num_experts * next_num_experts
    total = np.zeros(cells, dtype=np.int64)
    # One column pair at a time: no array is larger than [tokens].
    for column in topk_ids.T.astype(np.int64):
        for next_column in next_topk_ids.T:
            total += np.bincount(column * next_num_experts + next_column, minlength=cells)
    return total.reshape(num_experts, next_num_experts)
