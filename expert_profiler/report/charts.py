# SPDX-License-Identifier: Apache-2.0
"""Draw lines, bars and heat maps for report and comparison, without pyplot's global state.

Colours run from light (little) to dark (much), so that they read in greyscale; lines differ by
marker and dash besides colour, bars by hatching.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.6  # inches; on A4 paper it shrinks to 7.3, and the smallest text to 6.5 points
_DPI = 110
_TEXT = 9.5
_INK = "#222222"
_QUIET = "#555555"
_CELLS = "cividis_r"

Array = npt.NDArray[Any]

#: (colour, marker, dash, hatch) of the n-th series.
STYLES: tuple[tuple[str, str, Any, str], ...] = (
    ("#0072b2", "o", "-", ""),
    ("#d55e00", "s", (0, (5, 2)), "////"),
    ("#222222", "^", (0, (1, 1.2)), "...."),
    ("#8c8c8c", "D", (0, (6, 2, 1, 2)), "xxxx"),
    ("#009e73", "v", (0, (3, 1, 1, 1, 1, 1)), "\\\\\\\\"),
    ("#cc79a7", "P", (0, (8, 3)), "||||"),
)


@dataclass(frozen=True)
class Series:
    """One line or one set of bars. y, low, high, x: [points].

    low and high draw a band; x: the line's own, where lines differ in it.
    """

    label: str
    y: Array
    low: Array | None = None
    high: Array | None = None
    x: Array | None = None


@dataclass(frozen=True)
class Grid:
    """One heat map. values: [rows, columns], NaN for no value."""

    title: str
    values: Array
    x: str
    y: str
    rows: Sequence[object] | None = None  # labels of the rows; None: their numbers
    most_columns: int = 26  # labelled ones; half a page has room for 11


def png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def new_figure(
    height: float, columns: int = 1, widths: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """(figure, [axes]) of one row of panels that keep clear of each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=_DPI, facecolor="white", layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, width_ratios=widths)[0]
    return figure, list(axes)


def lines(
    axes: Axes,
    x: Sequence[float],
    series: Sequence[Series],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    bottom: float | None = None,
) -> None:
    """Lines with markers where there are few points."""
    for style, one in zip(STYLES, series, strict=False):
        colour, marker, dash, _ = style
        at = x if one.x is None else one.x
        axes.plot(
            at,
            one.y,
            color=colour,
            linestyle=dash,
            linewidth=1.6,
            marker=marker,
            markersize=4.5,
            markevery=max(1, len(at) // 12),
            markerfacecolor="white",
            label=one.label,
        )
        if one.low is not None and one.high is not None:
            axes.fill_between(at, one.low, one.high, color=colour, alpha=0.18, linewidth=0)
            if len(at) == 1:  # a band has no width then
                axes.vlines(at, one.low, one.high, color=colour, linewidth=3, alpha=0.4)
    if bottom is not None:
        axes.margins(y=0.08)
        axes.set_ylim(bottom=bottom)
    _label_axes(axes, title, xlabel, ylabel)
    _legend(axes)


def bars(
    axes: Axes,
    groups: Sequence[object],
    series: Sequence[Series],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
) -> None:
    """Grouped bars; ``low`` is marked with a line across the bar."""
    width = 0.84 / len(series)
    places = np.arange(len(groups))
    for n, (style, one) in enumerate(zip(STYLES, series, strict=False)):
        colour, _, _, hatch = style
        at = places + (n - (len(series) - 1) / 2) * width
        axes.bar(
            at,
            one.y,
            width=width * 0.92,
            color=_tint(colour),
            edgecolor=colour,
            hatch=hatch,
            linewidth=0.9,
            label=one.label,
        )
        if one.low is not None:
            axes.hlines(one.low, at - width * 0.46, at + width * 0.46, color=_INK, linewidth=2)
    axes.set_xticks(places, [str(group) for group in groups])
    _label_axes(axes, title, xlabel, ylabel)
    _legend(axes)


def heat_map(
    figure: Figure,
    axes: Axes,
    grid: Grid,
    *,
    unit: str,
    low: float,
    high: float,
    ticks: Mapping[float, str] | None = None,
) -> None:
    """A grid of cells, light for ``low`` and dark for ``high``; no value is white.

    ticks: labels of the colour bar where the numbers themselves would mislead.
    """
    from matplotlib import colormaps

    colours = colormaps[_CELLS].copy()
    colours.set_bad("white")
    known = grid.values[~np.isnan(grid.values)]
    extend = {(False, False): None, (False, True): "max", (True, False): "min"}.get(
        (bool((known < low).any()), bool((known > high).any())), "both"
    )
    image = axes.imshow(
        grid.values,
        cmap=colours,
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
        origin="upper",
    )
    _label_axes(axes, grid.title, grid.x, grid.y, grid=False)
    _ticks(axes.xaxis, None, grid.values.shape[1], grid.most_columns)
    _ticks(axes.yaxis, grid.rows, grid.values.shape[0], 22)
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05, extend=extend)
    bar.set_label(unit, size=_TEXT, color=_INK)
    bar.ax.tick_params(labelsize=_TEXT - 1, colors=_INK)
    if ticks is not None:
        bar.set_ticks(list(ticks), labels=list(ticks.values()))


def _label_axes(axes: Axes, title: str, xlabel: str, ylabel: str, *, grid: bool = True) -> None:
    axes.set_title(title, size=_TEXT + 1.5, color=_INK, loc="left", parse_math=False, wrap=True)
    axes.set_xlabel(xlabel, size=_TEXT, color=_INK, parse_math=False)
    axes.set_ylabel(ylabel, size=_TEXT, color=_INK, parse_math=False)
    axes.tick_params(labelsize=_TEXT - 1, colors=_INK)
    if grid:
        axes.grid(True, color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    """Put the legend under the panel, where no line runs through it, and not wider than that."""
    labels = axes.get_legend_handles_labels()[1]
    columns = 4 if len(axes.figure.axes) == 1 else 2 if max(map(len, labels)) <= 30 else 1
    found = axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=min(len(labels), columns),
        frameon=False,
        fontsize=_TEXT - 0.5,
        handlelength=3.2,
        columnspacing=1.6,
    )
    for text in found.get_texts():
        text.set_parse_math(False)


def by_layer_axis(axes: Axes, layers: Sequence[int]) -> None:
    """Whole layer numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=14, integer=True))
    if len(layers) == 1:
        axes.set_xlim(layers[0] - 1, layers[0] + 1)


def map_height(rows: int) -> float:
    """Inches of a heat map with so many rows."""
    return float(np.clip(1.3 + 0.085 * rows, 1.9, 6.2))


def _ticks(axis: Any, labels: Sequence[object] | None, size: int, most: int) -> None:
    """At most so many ticks, on whole cells."""
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 10**6) if size / s <= most)
    at = list(range(0, size, step))
    axis.set_ticks(at, labels=[str(n if labels is None else labels[n]) for n in at])


def _tint(colour: str) -> tuple[float, ...]:
    """The colour mixed with white: hatching in the full colour stays visible on it."""
    from matplotlib.colors import to_rgb

    return tuple(1 - 0.55 * (1 - part) for part in to_rgb(colour))
