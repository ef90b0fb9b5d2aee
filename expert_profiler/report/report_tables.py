"""The report's tables: hot experts, experts never used, and how every figure is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from expert_profiler.metrics import token_types
from expert_profiler.report import histogram, summary
from expert_profiler.report.page import Html, element, section, table

if TYPE_CHECKING:
    from expert_profiler.log.token_counts import Gathered

_LISTED = 24  # layers with never-used experts shown on the page


def hot(data: dict[str, Any]) -> Html:
    rows = [
        (
            h["layer"],
            h["expert"],
            h["choices"],
            100 * h["share"],
            h["times_even"],
            100 * h["share_of_weight"],
            h["mean_weight"],
        )
        for h in data["hot_experts"]
    ]
    header = (
        "layer", "expert", "choices", "share of its layer's choices (%)", "times an even load",
        "share of its layer's weight (%)", "mean weight when chosen",
    )  # fmt: skip
    return section("The hottest experts", table(header, rows))


def dead(data: dict[str, Any], found: Gathered) -> Html:
    dead = data["never_used_experts"]
    total = sum(map(len, dead.values()))
    if not total:
        return section("Never used", element("p", "Every expert of every layer was used."))
    rows = [(layer, len(ids), histogram.listed(ids)) for layer, ids in list(dead.items())[:_LISTED]]
    more = len(dead) - len(rows)
    return section(
        "Never used",
        element(
            "p",
            f"{total:,} of {found.per_layer.size:,} experts took no choice in this log. Few tokens "
            f"leave experts unused by chance: an even router leaves out {_by_chance(found)} of "
            "them with so many rows.",
        ),
        table(("layer", "experts", "ids"), rows),
        element("p", f"and {more} more layers, in report.json") if more > 0 else "",
    )


def _by_chance(found: Gathered) -> str:
    """E * (1 - K/E)^rows, added over layers: experts that even use would leave out."""
    rows = found.rows.sum(axis=1)
    keep = 1 - np.array(found.top_k) / found.num_experts
    left = float((found.num_experts * keep**rows).sum())
    return f"about {left:.2g}" if left >= 0.01 else "fewer than 0.01"


def formulas(data: dict[str, Any]) -> Html:
    rows = [(f["name"], f["formula"], f["range"]) for f in data["key_figures"]]
    rows += [
        ("Gini", "sum((2i - n - 1) c_i) / (n sum(c)), c ascending", "0 to 1 - 1/n"),
        ("top-k-normalised x", "(x - x of even use) / (x of k experts for all - x of even use)",
         "0 (even) to 1"),
        ("information in pairs", "sum q_ij log2(q_ij / r_ij); q: shares of pairs, r: by popularity",
         "0 up, bits"),
        ("mutual information", "sum p_xy log2(p_xy / (p_x p_y))", "0 up, bits"),
        ("next-token reuse", "mean of |experts of t and of t + 1| / k, in one request", "0 to 1"),
        ("token classes", ", ".join(token_types.CLASSES), ""),
    ]  # fmt: skip
    method = data["methods"]
    return section(
        "How the figures are made",
        table(("figure", "formula", "range"), rows),
        element(
            "p",
            f"Intervals: {method['bootstrap']} ({method['requests_resampled_in_groups']} groups), "
            "because tokens of one request route alike. The hottest tenth is "
            f"{summary.TOP_SHARE:.0%} of the experts, at least one. Flagged rows (recomputed, "
            "overrun) are left out. All numbers: report.json.",
            cls="quiet",
        ),
    )
