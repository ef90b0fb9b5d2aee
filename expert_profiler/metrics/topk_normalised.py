# SPDX-License-Identifier: Apache-2.0
"""Unevenness that compares between models of different top_k and expert counts.

A token chooses K *different* experts of E, so no expert can hold more than 1/K of the choices:
the worst that a router can do is K experts for every token, the best is even use. Each metric here
is (plain - best) / (worst - best): 0 for even use, 1 for the worst at this K and E. All four plain
metrics are monotone in how concentrated the counts are, so nothing lies outside these two ends.

``counts`` is [experts], of one layer or summed over layers with the same K. Where K = E there is
one possible routing, even use, and the metrics are 0.
"""

from __future__ import annotations

import math

import numpy as np

from expert_profiler.metrics import usage
from expert_profiler.metrics.usage import Counts1D, Floats


def entropy_lack(counts: Counts1D, top_k: int) -> float:
    """(log2(E) - H) / (log2(E) - log2(K)): how much of the possible entropy is missing.

    No unit, 0 (even) to 1 (K experts take all: H = log2(K)); NaN without counts.
    entropy_lack([4, 2, 1, 1], 2) = (2 - 1.75) / (2 - 1) = 0.25.
    """
    _check(counts, top_k)
    even = usage.max_entropy_bits(len(counts))
    return _between(usage.entropy_bits(counts), best=even, worst=math.log2(top_k))


def excess_peak(counts: Counts1D, top_k: int) -> float:
    """(max/mean - 1) / (E/K - 1): the busiest expert between an even load and every token.

    No unit, 0 (even) to 1 (some expert is chosen by every token); NaN without counts.
    excess_peak([4, 2, 1, 1], 2) = (2 - 1) / (4/2 - 1) = 1: all 4 tokens choose expert 0.
    """
    _check(counts, top_k)
    return _between(usage.max_over_mean(counts), best=1.0, worst=len(counts) / top_k)


def gini(counts: Counts1D, top_k: int) -> float:
    """G / (1 - K/E), as K experts that take all have G = 1 - K/E.

    No unit, 0 (even) to 1 (K experts take all); NaN without counts.
    gini([4, 2, 1, 1], 2) = 0.3125 / 0.5 = 0.625.
    """
    _check(counts, top_k)
    return _between(usage.gini(counts), best=0.0, worst=1 - top_k / len(counts))


def coefficient_of_variation(counts: Counts1D, top_k: int) -> float:
    """CV / sqrt(E/K - 1), as K experts that take all have CV = sqrt(E/K - 1).

    No unit, 0 (even) to 1 (K experts take all); NaN without counts.
    coefficient_of_variation([4, 2, 1, 1], 2) = 0.6124 / sqrt(4/2 - 1) = 0.6124.
    """
    _check(counts, top_k)
    worst = math.sqrt(len(counts) / top_k - 1)
    return _between(usage.coefficient_of_variation(counts), best=0.0, worst=worst)


def coverage_at(counts: Counts1D, fractions: Floats) -> Floats:
    """The share of the load that the hottest fraction of the experts holds.

    fractions: [points], 0 to 1, of E experts; between whole experts the curve is straight.
    [points] float64, 0 to 1, never below ``fractions`` (even use); NaN without counts. One x axis
    for any number of experts. coverage_at([4, 2, 1, 1], [0, .25, .375]) = [0, .5, .625].
    """
    curve = np.concatenate([[0.0], usage.coverage(counts)])
    if np.isnan(curve[-1]):
        return np.full(np.shape(fractions), np.nan)
    return np.asarray(np.interp(fractions, np.linspace(0, 1, len(curve)), curve))


def _between(value: float, best: float, worst: float) -> float:
    """0 at best, 1 at worst; 0 where the two are one."""
    if math.isnan(value):
        return math.nan
    # Rounding may leave a last bit outside, or -0.0.
    return min(1.0, max(0.0, (value - best) / (worst - best))) + 0.0 if worst != best else 0.0


def _check(counts: Counts1D, top_k: int) -> None:
    if not 1 <= top_k <= len(counts):
        raise ValueError(f"top_k is {top_k}, not 1 to {len(counts)} experts")
    if counts.max() * top_k > counts.sum() * (1 + 1e-9):
        raise ValueError(
            f"an expert holds {counts.max()} of {counts.sum()} choices, more than 1/{top_k}: "
            f"these are not counts at top_k {top_k}"
        )
