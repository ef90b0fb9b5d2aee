# SPDX-License-Identifier: Apache-2.0
"""Draw the expert histogram, without pyplot's global state."""

from __future__ import annotations

import contextlib
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from expert_profiler import files
from expert_profiler.log.expert_counts import Counts
from expert_profiler.metrics import usage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from expert_profiler.log.route_log import RouteLog

_WIDTH = 13.0  # inches
_PLOT_HEIGHT = 5.0
_LINE = 0.21  # one line of small text
_DPI = 150
_LEFT, _RIGHT = 0.068, 0.924  # the axes' edges, as shares of the width
_INK, _QUIET, _ALARM = "#222222", "#555555", "#a40000"
# Okabe-Ito colours, told apart by lightness too; decode is hatched besides.
_STYLE = {
    "prefill": ("#0072b2", "", "prefill (prompt tokens)"),
    "decode": ("#f5b041", "////", "decode (generated tokens)"),
    "unknown": ("#7a8fa3", "", "phase not recorded"),
}
# With more, bars are too narrow for hatching to be read; lightness alone tells them apart then.
_MAX_HATCHED_EXPERTS = 150
_CHARS = 150  # of small text across the figure


def expert_histogram(
    counts: Counts,
    *,
    model_id: str,
    requests: int,
    id_space: str | None = None,
    cautions: Sequence[str] = (),
) -> Figure:
    """Each expert's share of all choices, split by phase, against even use.

    id_space: "logical" or "physical", where the log says so; cautions: why not to trust it.
    """
    from matplotlib.figure import Figure

    warning = _wrapped(cautions)
    banner = _LINE * len(warning) + 0.2 if warning else 0.0
    height = _PLOT_HEIGHT + 1.75 + (banner + 0.12 if banner else 0)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    top = height - 0.12

    def write(y: float, text: str, **style: Any) -> None:
        figure.text(0.014, y / height, text, parse_math=False, **{"va": "top"} | style)

    if warning:
        _banner(figure, warning, top=top / height, size=banner / height)
        top -= banner + 0.12
    write(top, "Which experts do the tokens go to?", size=17, weight="bold", color=_INK)
    write(top - 0.37, _subtitle(counts, model_id, requests), size=10.5, color=_QUIET)
    write(0.12, _caption(counts.per_expert), size=10.5, color=_INK, va="bottom")

    bottom = 0.92 / height
    axes = figure.add_axes((_LEFT, bottom, _RIGHT - _LEFT, (top - 0.98) / height - bottom))
    _bars(axes, counts)
    label = f"expert id ({id_space})" if id_space else "expert id"
    axes.set_xlabel(label, size=11, color=_INK)
    return figure


def of_log(log: RouteLog, counts: Counts) -> Figure:
    """The histogram of some of a log's counts, with what speaks against them above it."""
    return expert_histogram(
        counts,
        model_id=log.meta.model_id,
        requests=log.requests,
        id_space=log.meta.raw.get("expert_ids"),
        cautions=log.lost_rows + log.suspicions,
    )


def load_ahead() -> None:
    """Import matplotlib, half a second's work, while something else is waited for."""

    def load() -> None:
        # Drawing imports it again, and that import's error reaches the user.
        with contextlib.suppress(ImportError):
            import matplotlib.backends.backend_agg
            import matplotlib.figure  # noqa: F401

    threading.Thread(target=load, daemon=True).start()


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure whole or not at all."""
    with files.replacing(path) as scratch:
        figure.savefig(scratch, format="png")


def _bars(axes: Axes, counts: Counts) -> None:
    total = counts.per_expert.sum()
    experts = counts.num_experts
    ids = np.arange(experts)
    base = np.zeros(experts)
    for phase, chosen in zip(counts.phases, counts.per_phase, strict=True):
        colour, hatch, label = _STYLE[phase]
        percent = 100.0 * chosen / max(total, 1)
        axes.bar(
            ids,
            percent,
            bottom=base,
            width=0.82,
            color=colour,
            hatch=hatch if experts <= _MAX_HATCHED_EXPERTS else "",
            edgecolor="#8a5a00" if hatch else colour,
            linewidth=0,
            label=f"{label}: {chosen.sum() / max(total, 1):.1%} of choices",
        )
        base += percent
    even = 100.0 / experts
    axes.axhline(
        even, color=_INK, linewidth=1.3, linestyle=(0, (6, 3)), label=f"even use: {even:.3g}%"
    )
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.005, 1.0),
        ncols=4,
        frameon=False,
        fontsize=10.5,
        handlelength=2.2,
        borderaxespad=0.2,
    )
    peak = max(float(base.max()), even)
    axes.set_ylim(0, peak * 1.28)  # room for the labels of _mark_top
    axes.set_xlim(-0.8, experts - 0.2)
    _mark_top(axes, counts.per_expert, base)
    _scale_axes(axes, experts, float(total))


def _mark_top(axes: Axes, per_expert: npt.NDArray[np.int64], heights: Any) -> None:
    """Label the three busiest experts side by side, in the order in which their bars stand.

    A leader first rises straight above all bars, then leans to its label: it crosses nothing.
    """
    low, high = axes.get_xlim()
    ceiling = axes.get_ylim()[1]
    leaders = usage.top(per_expert, 3)
    order = sorted(leaders)
    width = 0.115 * (high - low)  # of one label
    for expert, x in zip(order, _spread(order, width, low, high), strict=True):
        height = float(heights[expert])
        axes.plot(
            [expert, expert, x],
            [height, 0.805 * ceiling, 0.865 * ceiling],
            color=_QUIET,
            linewidth=0.9,
        )
        axes.text(
            x,
            0.875 * ceiling,
            f"#{leaders.index(expert) + 1}  expert {expert}\n{height:.3g}%",
            ha="center",
            va="bottom",
            size=10.5,
            weight="bold",
            color=_INK,
            linespacing=1.25,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to ascending ``wanted`` (least squares) that are ``gap`` apart.

    Labels of width ``gap`` then neither touch each other nor leave low..high.
    """
    clusters: list[list[float]] = []  # of places less their own rank's share of the gaps
    for rank, x in enumerate(wanted):
        clusters.append([x - rank * gap])
        while len(clusters) > 1 and np.mean(clusters[-2]) > np.mean(clusters[-1]):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    flat = [float(np.mean(cluster)) for cluster in clusters for _ in cluster]
    first, last = low + gap / 2, high - gap / 2 - (len(wanted) - 1) * gap
    return [min(max(x, first), last) + rank * gap for rank, x in enumerate(flat)]


def _scale_axes(axes: Axes, experts: int, total: float) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

    step = next(step for step in (1, 5, 10, 20, 50, 100, 500, 10**6) if experts / step <= 33)
    axes.xaxis.set_major_locator(MultipleLocator(step))
    if step > 1 and experts <= 150:
        axes.xaxis.set_minor_locator(MultipleLocator(1))
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.set_ylabel("share of expert choices (%)", size=11, color=_INK)
    axes.yaxis.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=10)
    per_percent = max(total, 1.0) / 100

    def to_choices(percent: Any) -> Any:
        return percent * per_percent

    def to_percent(choices: Any) -> Any:
        return choices / per_percent

    number = axes.secondary_yaxis("right", functions=(to_choices, to_percent))
    number.set_ylabel("expert choices", size=11, color=_INK)
    number.yaxis.set_major_locator(MaxNLocator(7))
    size, suffix = _unit(to_choices(axes.get_ylim()[1]))
    number.yaxis.set_major_formatter(
        FuncFormatter(lambda n, _: f"{n / size:,.4g}{suffix}" if n else "0")
    )
    number.tick_params(colors=_INK, labelsize=10)


def _unit(largest: float) -> tuple[float, str]:
    """One unit for a whole axis, so that its numbers stay short."""
    units = ((1e9, "G"), (1e6, "M"), (1e4, "k"))
    size, suffix = next(((size, unit) for size, unit in units if largest >= size), (1.0, ""))
    return (1e3, suffix) if suffix == "k" else (size, suffix)


def _banner(figure: Figure, lines: list[str], *, top: float, size: float) -> None:
    from matplotlib.patches import Rectangle

    figure.add_artist(
        Rectangle(
            (0.014, top - size),
            0.972,
            size,
            transform=figure.transFigure,
            facecolor="#fdecea",
            edgecolor=_ALARM,
            linewidth=1.6,
        )
    )
    figure.text(
        0.022,
        top - size / 2,
        "\n".join(lines),
        va="center",
        size=10.5,
        weight="bold",
        color=_ALARM,
        linespacing=1.3,
        parse_math=False,
    )


def _wrapped(cautions: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for caution in cautions:
        lines += textwrap.wrap(
            f"CAUTION: {caution}",
            _CHARS - 20,
            subsequent_indent="    ",
            max_lines=2,
            placeholder=" …",
        )
    return lines


def _subtitle(counts: Counts, model_id: str, requests: int) -> str:
    if len(counts.layers) == 1:
        layers = f"layer {counts.layers[0]}"
    else:
        layers = f"{len(counts.layers)} layers added up"
    rows = int(counts.rows.sum())
    plural = "" if requests == 1 else "s"
    facts = [layers, f"{rows:,} rows (a token and layer each)", f"{requests:,} request{plural}"]
    tail = "  ·  ".join(facts)
    return f"{_shortened(model_id, _CHARS - len(tail) - 6)}  ·  {tail}"


def _shortened(name: str, limit: int) -> str:
    """The end of a long path tells more than its start."""
    return name if len(name) <= limit else "…" + name[1 - limit :]


def _caption(per_expert: npt.NDArray[np.int64]) -> str:
    experts = len(per_expert)
    idle = len(usage.never_used(per_expert))
    return "   ·   ".join(
        [
            f"entropy {usage.entropy_bits(per_expert):.3f} of at most "
            f"{usage.max_entropy_bits(experts):.3f} bits "
            f"(normalised {usage.normalised_entropy(per_expert):.3f})",
            f"effective experts {usage.effective_experts(per_expert):.1f} of {experts}",
            f"max/mean {usage.max_over_mean(per_expert):.2f}",
            f"never used: {idle}",
        ]
    )
