# SPDX-License-Identifier: Apache-2.0
"""How sure a metric is: resampling whole requests, because tokens of one text route alike.

``by_request`` is [requests, ...]: counts of each request (or of each group of requests), which add
up to the log's counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from expert_profiler.metrics.divergence import js_divergence_bits
from expert_profiler.metrics.usage import Floats

Array: TypeAlias = "npt.NDArray[Any]"

DRAWS = 400


def bootstrap_interval(
    by_request: Array,
    metric: Callable[[Array], float],
    *,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95% interval of ``metric(sum of the requests' counts)``: basic bootstrap over requests.

    With q the quantiles of the metric over resamples of as many requests, drawn with replacement:
    [2 * metric - q(0.975), 2 * metric - q(0.025)], kept inside ``bounds``. A resample is a little
    more uneven than its source, by about as much as the log is than the traffic behind it; the
    basic interval takes that out, the percentile interval would double it.

    (nan, nan) for fewer than two requests, or where the metric has no value.
    """
    n = len(by_request)
    flat = by_request.reshape(n, -1).astype(np.float64)
    whole = metric(by_request.sum(axis=0))
    if n < 2 or np.isnan(whole):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    found = np.empty(draws)
    for draw in range(draws):
        times = np.bincount(rng.integers(0, n, n), minlength=n)
        found[draw] = metric((times @ flat).reshape(by_request.shape[1:]))
    low, high = np.nanquantile(found, [0.025, 0.975])
    return (
        float(np.clip(2 * whole - high, *bounds)),
        float(np.clip(2 * whole - low, *bounds)),
    )


@dataclass(frozen=True)
class DivergenceTest:
    """Jensen-Shannon divergence of two logs beside what splitting alike requests gives.

    observed, null_mean, null_p95, p_value: [layers] float64, the first three in bits;
    mean_observed, mean_null, mean_p_value: of the mean over layers.
    p = (1 + draws at least as large as observed) / (1 + draws), 1 / (1 + draws) to 1.
    """

    observed: Floats
    null_mean: Floats
    null_p95: Floats
    p_value: Floats
    mean_observed: float
    mean_null: float
    mean_p_value: float


def divergence_test(
    a: Array, b: Array, *, paired: bool = False, draws: int = DRAWS, seed: int = 0
) -> DivergenceTest:
    """Whether the requests of two logs route differently.

    a: [requests of a, layers, experts] counts; b: [requests of b, layers, experts]. Each draw deals
    the requests of both to two groups of the same sizes at random. paired: row i of both is the
    same prompt, and each draw swaps a random half of the pairs instead.
    """
    rng = np.random.default_rng(seed)
    pool = np.concatenate([a, b]).astype(np.float64)
    shape, flat = pool.shape[1:], pool.reshape(len(pool), -1)
    total = flat.sum(axis=0)
    observed = js_divergence_bits(a.sum(axis=0), b.sum(axis=0))
    null = np.empty((draws, shape[0]))
    for draw in range(draws):
        if paired:
            swap = rng.integers(0, 2, len(a)).astype(np.float64)
            first = np.concatenate([1 - swap, swap]) @ flat
        else:
            chosen = np.zeros(len(pool))
            chosen[rng.permutation(len(pool))[: len(a)]] = 1
            first = chosen @ flat
        null[draw] = js_divergence_bits(first.reshape(shape), (total - first).reshape(shape))
    # The unchanged deal is one of the possible draws, and must count as "as large".
    reached = (null >= observed - 1e-12).sum(axis=0)
    means, mean = np.nanmean(null, axis=1), float(np.nanmean(observed))
    return DivergenceTest(
        observed=observed,
        null_mean=null.mean(axis=0),
        null_p95=np.quantile(null, 0.95, axis=0),
        p_value=np.where(np.isnan(observed), np.nan, (1 + reached) / (1 + draws)),
        mean_observed=mean,
        mean_null=float(means.mean()),
        mean_p_value=float((1 + (means >= mean - 1e-12).sum()) / (1 + draws)),
    )
