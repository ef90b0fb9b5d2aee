"""How unevenly a router uses its experts: pure functions of counts.

``counts`` is always [experts], non-negative, one entry an expert *including* the experts that
were never chosen; any numeric dtype. A layer without choices has no distribution, so the figures
that need one are NaN then.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Counts1D: TypeAlias = "npt.NDArray[Any]"


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
