# SPDX-License-Identifier: Apache-2.0
"""How far two distributions over the same experts lie apart: pure functions of counts.

``a`` and ``b`` are counts, [..., experts], non-negative, of the same experts in both.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from expert_profiler.metrics.usage import Counts1D, Floats

Array: TypeAlias = "npt.NDArray[Any]"


def js_divergence_bits(a: Counts1D, b: Counts1D) -> Floats:
    """JSD = H(m) - (H(p) + H(q)) / 2 with p = a / sum(a), q = b / sum(b), m = (p + q) / 2.

    [...] float64, bits, 0 (the same shares) to 1 (no expert in common); symmetric; NaN where either
    has no counts. Sampling alone makes it positive: see ``resampling.divergence_test``.
    js_divergence_bits([1, 0], [0, 1]) = 1; of [3, 1] and [1, 3]: H(.5) - H(.25) = 0.1887.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        p = a / a.sum(axis=-1, keepdims=True)
        q = b / b.sum(axis=-1, keepdims=True)
    bits = _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2
    return np.where(np.isnan(bits), np.nan, np.clip(bits, 0, 1))  # rounding only


def rank_correlation(a: Counts1D, b: Counts1D) -> float:
    """Spearman's rho: Pearson's correlation of the ranks, ties with their mean rank.

    a, b: [experts]. No unit, -1 (the order is reversed) to 1 (the same order); NaN where all counts
    of one are equal. rank_correlation([9, 5, 1], [3, 1, 2]) = 0.5.
    """
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / size if size else float("nan")


def top_overlap(a: Counts1D, b: Counts1D, n: int) -> float:
    """|top n of a & top n of b| / n; ties go to the lower id. n / experts is chance.

    a, b: [experts]; n: 1 to experts. No unit, 0 to 1; NaN where either has no counts.
    top_overlap([9, 5, 1], [3, 1, 2], 2) = 1/2.
    """
    if not a.any() or not b.any():
        return float("nan")
    first = set(np.argsort(-a, kind="stable")[:n].tolist())
    second = set(np.argsort(-b, kind="stable")[:n].tolist())
    return len(first & second) / n


def share_difference(a: Counts1D, b: Counts1D) -> Floats:
    """E * (q_e - p_e): how much more load b puts on each expert, in units of an even load.

    [..., experts] float64, -E to E, sum 0; NaN where either has no counts.
    share_difference([1, 1], [3, 1]) = [0.5, -0.5].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        p = a / a.sum(axis=-1, keepdims=True)
        q = b / b.sum(axis=-1, keepdims=True)
    return np.asarray(a.shape[-1] * (q - p), dtype=np.float64)


def _entropy(p: Array) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p == 0, 0.0, p * np.log2(p))
    return np.asarray(-terms.sum(axis=-1), dtype=np.float64)


def _ranks(values: Counts1D) -> Floats:
    _, place, number = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(number)
    return np.asarray((last - (number - 1) / 2)[place.ravel()], dtype=np.float64)
