# SPDX-License-Identifier: Apache-2.0
"""Draw a comparison's charts: each answers the question in its title."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from expert_profiler.report import charts
from expert_profiler.report.charts import Grid, Series
from expert_profiler.report.comparison import Run, coverage_by_fraction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = len(charts.STYLES)  # series that one chart tells apart


def by_depth(data: dict[str, Any]) -> Figure:
    """Two top-k-normalised metrics of every run, over the depth in the model."""
    figure, panels = charts.new_figure(4.0, 2)
    for axes, name, title, label in (
        (panels[0], "topk_entropy_lack", "Which concentrates its load more?", "lack of entropy"),
        (panels[1], "topk_excess_peak", "Which has the busier busiest expert?", "excess peak"),
    ):
        series = []
        for run in data["runs"][:_MOST]:
            values = [entry["all"].get(name, math.nan) for entry in run["layers"]]
            depth = 100 * np.arange(len(values)) / max(1, len(values) - 1)
            series.append(Series(run["name"], np.array(values), x=depth))
        charts.lines(
            axes, (), series, title=title, xlabel="depth in the model (%)",
            ylabel=f"{label} (0 even to 1)", bottom=0,
        )  # fmt: skip
    return figure


def coverage(runs: list[Run], phase: str) -> Figure:
    """The share of the choices that the hottest experts hold, by their share of the experts."""
    percent = np.linspace(0, 100, 51)
    figure, [axes] = charts.new_figure(3.9)
    series = [
        Series(run.name, 100 * coverage_by_fraction(run, phase, percent / 100))
        for run in runs[: _MOST - 1]
    ]
    charts.lines(
        axes, percent.tolist(), [*series, Series("even use", percent)],
        title="How much of the load does the hottest part of the experts hold?",
        xlabel="hottest experts (% of the experts)", ylabel="share of the choices (%)", bottom=0,
    )  # fmt: skip
    return figure


def distances(known: list[dict[str, Any]]) -> Figure:
    """Divergence, rank correlation and overlap by layer. known: compared expert by expert."""
    figure, [left, right] = charts.new_figure(4.2, 2)
    layers = known[0]["layers"]
    bits, agreement = [], []
    for found in known[: _MOST // 2]:
        if found["layers"] == layers:
            b, hottest = found["b"], f"{found['b']}: top {found['hottest']} in common"
            chance = np.asarray(found["js_divergence_by_chance_p95_bits"])
            bits += [
                Series(b, np.asarray(found["js_divergence_bits"])),
                Series(f"{b}: 95% of chance", chance),
            ]
            agreement += [
                Series(f"{b}: rank correlation", np.array(found["rank_correlation"])),
                Series(hottest, np.array(found["top_overlap"])),
            ]
    charts.lines(
        left, layers, bits, title=f"How far from {known[0]['a']}?",
        xlabel="layer (index)", ylabel="Jensen-Shannon divergence (bits)", bottom=0,
    )  # fmt: skip
    charts.lines(
        right, layers, agreement, title="Are the same experts hot?",
        xlabel="layer (index)", ylabel="agreement (rho and share, 1 = the same)",
    )  # fmt: skip
    for axes in (left, right):
        charts.by_layer_axis(axes, layers)
    return figure


def difference_map(found: dict[str, Any]) -> Figure:
    """The difference of load of every expert in every layer."""
    values = np.asarray(found["load_difference"])
    bound = float(np.nanquantile(np.abs(values), 0.995)) if np.isfinite(values).any() else 0.0
    bound = max(bound, 0.05)
    figure, [axes] = charts.new_figure(charts.map_height(len(values)) + 0.35)
    grid = Grid(
        f"{found['b']} minus {found['a']} (dark: busier in {found['b']})",
        values,
        "expert (id)",
        "layer (index)",
        rows=found["layers"],
    )
    charts.heat_map(
        figure, axes, grid, unit="difference of load (even loads)", low=-bound, high=bound
    )
    return figure
