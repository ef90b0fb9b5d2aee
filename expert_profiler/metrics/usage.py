# SPDX-License-Identifier: Apache-2.0
"""How unevenly a router uses its experts: pure functions of counts.

``counts`` is always [experts], non-negative, one entry an expert *including* the experts that
were never chosen; any numeric dtype. A layer without choices has no distribution, so the metrics
that need one are NaN then.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Counts1D: TypeAlias = "npt.NDArray[Any]"
Floats: TypeAlias = "npt.NDArray[np.float64]"


def shares(counts: Counts1D) -> npt.NDArray[np.float64]:
    """p_i = c_i / sum(c). [experts] float64, each 0 to 1, sum 1; NaN without counts."""
    total = counts.sum()
    if total == 0:
        return np.full(counts.shape, np.nan)
    return np.asarray(counts / total, dtype=np.float64)


def entropy_bits(counts: Counts1D) -> float:
    """H = -sum(p_i * log2(p_i)) with 0 * log2(0) = 0. Bits, 0 to log2(experts)."""
    p = shares(counts)
    p = p[p != 0]
    return float(-(p * np.log2(p)).sum()) + 0.0  # + 0.0 turns -0.0 into 0.0


def max_entropy_bits(num_experts: int) -> float:
    """log2(experts): the entropy of perfectly even use. Bits."""
    return math.log2(num_experts)


def normalised_entropy(counts: Counts1D) -> float:
    """H / log2(experts). No unit, 0 (one expert takes all) to 1 (even); 1 for a single expert."""
    most = max_entropy_bits(len(counts))
    return entropy_bits(counts) / most if most else 1.0


def effective_experts(counts: Counts1D) -> float:
    """2^H: how many evenly used experts have the same entropy. Experts, 1 to experts."""
    return float(2.0 ** entropy_bits(counts))


def max_over_mean(counts: Counts1D) -> float:
    """max(c) / mean(c): the busiest expert's load over an even load. No unit, 1 to experts."""
    mean = float(counts.mean())
    return float(counts.max()) / mean if mean else math.nan


def top(counts: Counts1D, n: int) -> list[int]:
    """The ids of the n largest counts, largest first, ties by id; never-chosen ones left out."""
    order = np.argsort(-counts, kind="stable")[:n]
    return [int(expert) for expert in order if counts[expert] > 0]


def never_used(counts: Counts1D) -> list[int]:
    """The ids of experts with count 0, ascending."""
    return [int(expert) for expert in np.flatnonzero(counts == 0)]


def gini(counts: Counts1D) -> float:
    """G = sum((2*i - n - 1) * c_i) / (n * sum(c)), c ascending, i = 1..n, n = experts.

    No unit, 0 (even) to 1 - 1/n (one expert takes all); NaN without counts.
    gini([4, 2, 1, 1]) = (-3*1 - 1*1 + 1*2 + 3*4) / (4 * 8) = 10/32 = 0.3125.
    """
    n, total = len(counts), float(counts.sum())
    if total == 0:
        return math.nan
    ranks = 2 * np.arange(1, n + 1) - n - 1
    return float((ranks * np.sort(counts).astype(np.float64)).sum()) / (n * total)


def coefficient_of_variation(counts: Counts1D) -> float:
    """std(c) / mean(c), the population's standard deviation (divided by n, not n - 1).

    No unit, 0 (even) to sqrt(experts - 1) (one expert takes all); NaN without counts.
    coefficient_of_variation([4, 2, 1, 1]) = sqrt((4 + 0 + 1 + 1) / 4) / 2 = 0.6124.
    """
    mean = float(counts.mean())
    return float(counts.std()) / mean if mean else math.nan


def coverage(counts: Counts1D) -> npt.NDArray[np.float64]:
    """The share of the load that the n hottest experts hold, for n = 1..experts.

    [experts] float64, entry n - 1 = sum(the n largest p_i); rises to 1, at least n / experts;
    NaN without counts. coverage([1, 4, 1, 2]) = [0.5, 0.75, 0.875, 1].
    """
    held = np.cumsum(np.sort(counts)[::-1])
    if held[-1] == 0:
        return np.full(counts.shape, np.nan)
    # Cumulated before dividing, and by its own last entry: exact for integers, and it ends at 1.
    return np.asarray(held / held[-1], dtype=np.float64)


def share_of_top(counts: Counts1D, n: int) -> float:
    """The share of the load that the n hottest experts hold: ``coverage`` at n.

    No unit, n / experts to 1; 0 for n = 0, 1 for n above the number of experts.
    share_of_top([1, 4, 1, 2], 2) = (4 + 2) / 8 = 0.75.
    """
    if n <= 0:
        return 0.0 if counts.sum() else math.nan
    return float(coverage(counts)[min(n, len(counts)) - 1])


def experts_to_cover(counts: Counts1D, share: float) -> int:
    """The fewest experts that together hold at least ``share`` (0 to 1) of the load.

    Experts, 0 to experts; 0 without counts. experts_to_cover([1, 4, 1, 2], 0.75) = 2.
    """
    if share <= 0 or counts.sum() == 0:
        return 0
    return int(np.searchsorted(coverage(counts), min(share, 1.0))) + 1


def weight_mass(topk_ids: Counts1D, topk_weights: Counts1D, num_experts: int) -> Floats:
    """m_e = sum of the router weights with which expert e was chosen.

    topk_ids, topk_weights: same shape, such as [tokens, K]. [experts] float64 in units of
    weight, 0 up; where the weights of a token sum to 1, sum(m) = tokens. Mass by count
    (m_e / c_e) is the mean weight of e when chosen: experts with large counts and a small mean
    weight are often picked but little heard.
    weight_mass([[0, 2], [2, 1]], [[.75, .25], [.5, .5]], 4) = [.75, .5, .75, 0].
    """
    weights = topk_weights.ravel().astype(np.float64)
    mass = np.bincount(topk_ids.ravel(), weights, minlength=num_experts)
    return mass.astype(np.float64)  # it is int64 for no rows
