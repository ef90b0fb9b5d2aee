# SPDX-License-Identifier: Apache-2.0
"""What a profiling run measured, in a few lines."""

from __future__ import annotations

from typing import Any

from expert_profiler.run.run_folder import MODES

#: What a model's text and routing are worth, by its kind.
WORTH = {
    "random weights": "; its text and its routing mean nothing",
    "small demo model": (
        " of this project, trained on Python's library and word problems; "
        "its experts have specialised, its answers are guesses"
    ),
}


def lines(timing: dict[str, Any]) -> list[str]:
    """Model, prompts, speed of each mode and what recording costs, from ``timing.json``."""
    model, prompts = timing["provenance"]["model"], timing["provenance"]["prompts"]
    found = [
        f"model      {model['id']} ({model['kind']}{WORTH.get(model['kind'], '')})",
        f"prompts    {prompts['count']} ({prompts['set']})",
    ]
    for mode in MODES:
        if mode in timing:
            metrics = timing[mode]
            found.append(
                f"{mode:<10} {metrics['tokens_per_sec']:.1f} tokens/s, "
                f"{metrics['median_wall_time_sec']:.2f} s, median of {len(metrics['repeats'])}"
            )
    if cost := timing.get("overhead"):
        ratio, (low, high) = cost["paired_ratio_median"], cost["paired_ratio_ci95"]
        told = "" if low > 1 or high < 1 else "; within this machine's noise"
        found.append(
            f"overhead   {ratio - 1:+.1%} wall time (95% interval {low - 1:+.1%} to "
            f"{high - 1:+.1%}, {cost['pairs']} pairs{told})"
        )
    return found
