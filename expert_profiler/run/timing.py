# SPDX-License-Identifier: Apache-2.0
"""Throughput of repeats, and what recording costs, from paired repeats. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

BOOTSTRAP_DRAWS = 10_000


class Repeat(NamedTuple):
    """One timed pass over all prompts.

    Attributes:
        wall_time_sec: seconds.
        tokens_generated: output tokens over all requests.
    """

    wall_time_sec: float
    tokens_generated: int

    @property
    def tokens_per_sec(self) -> float:
        """Output tokens a second of wall time."""
        return self.tokens_generated / self.wall_time_sec

    def as_dict(self) -> dict[str, float]:
        return {**self._asdict(), "tokens_per_sec": self.tokens_per_sec}


def summarise(repeats: Sequence[Repeat]) -> dict[str, Any]:
    """One mode's entry in ``timing.json``.

    The three metrics at the top are those of the repeat with the (lower) median wall time, so they
    belong together; ``median_wall_time_sec`` is the usual median.
    """
    import numpy as np

    order = sorted(repeats)
    times = np.array([item.wall_time_sec for item in order])
    low, high = np.percentile(times, [25, 75])
    return {
        **order[(len(order) - 1) // 2].as_dict(),
        "repeats": [item.as_dict() for item in repeats],
        "median_wall_time_sec": float(np.median(times)),
        "spread_wall_time_sec": {
            "min": float(times[0]),
            "max": float(times[-1]),
            "iqr": float(high - low),
        },
    }


def paired_ratio(baseline: Sequence[float], treated: Sequence[float]) -> dict[str, Any]:
    """Median over pairs of treated / baseline, with its uncertainty.

    The interval is the 2.5 and 97.5 percentiles of the medians of bootstrap resamples of the pairs.

    Args:
        baseline: one measurement a pair, above 0.
        treated: its partner, same length.
    """
    import numpy as np

    ratios = np.array([b / a for a, b in zip(baseline, treated, strict=True)])
    draws = np.random.default_rng(0).choice(ratios, size=(BOOTSTRAP_DRAWS, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {
        "paired_ratio_median": float(np.median(ratios)),
        "paired_ratio_ci95": [float(low), float(high)],
        "paired_ratios": ratios.tolist(),
        "pairs": len(ratios),
    }


def overhead(no_log: Sequence[Repeat], log: Sequence[Repeat]) -> dict[str, Any]:
    """Cost of recording from pairs that ran next to each other in one engine.

    ratio = wall time with recording / wall time without, per pair; see :func:`paired_ratio`.

    Args:
        no_log: one repeat a pair.
        log: its partner, same length.
    """
    without, with_it = ([item.wall_time_sec for item in each] for each in (no_log, log))
    return {
        **paired_ratio(without, with_it),
        "method": (
            "wall time with recording / without, pairs run back to back in one engine, order "
            f"alternating; median, percentile bootstrap of it with {BOOTSTRAP_DRAWS} draws"
        ),
    }
