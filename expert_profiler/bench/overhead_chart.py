# SPDX-License-Identifier: Apache-2.0
"""``overhead.png``: what each mode costs, with its interval. Drawn without pyplot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _QUIET, _TARGET = "#222222", "#555555", "#a40000"
#: Okabe-Ito colours and markers, by mode: told apart without colour too.
_STYLE = {
    "armed": ("#555555", "o"),
    "stat": ("#0072b2", "s"),
    "per_pass": ("#009e73", "^"),
    "parquet_layer0": ("#cc79a7", "<"),
    "parquet": ("#cc79a7", "D"),
    "jsonl_layer0": ("#d55e00", ">"),
    "jsonl": ("#d55e00", "v"),
}


def draw(record: Mapping[str, Any]) -> Figure:
    """Headline on the left, every case of the matrix on the right; cost in percent of wall time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 6.2), dpi=150, facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.25))
    _headline(left, record["headline"])
    _matrix(right, record["matrix"])
    facts = record["provenance"]
    figure.suptitle("What does recording cost?", x=0.014, ha="left", size=17, weight="bold")
    figure.text(
        0.014,
        0.905,
        f"{facts['model']} on {facts['device']}, vLLM {facts['vllm']}; added wall time against the "
        "same engine without a recorder, median of pairs, bars: 95% interval",
        size=10,
        color=_QUIET,
        parse_math=False,
    )
    figure.subplots_adjust(left=0.085, right=0.985, bottom=0.13, top=0.83, wspace=0.2)
    return figure


def percent(ratio: float) -> float:
    """A ratio of times as added time: 1.02 is 2 percent."""
    return (ratio - 1) * 100


def _bar(axes: Axes, x: float, y: float, ratio: Mapping[str, Any], **style: Any) -> None:
    """A point at (median, y) or (x, median) with its interval, both in percent."""
    middle = percent(ratio["paired_ratio_median"])
    known = ratio["pairs"] > 2  # fewer have no interval to speak of
    low, high = (percent(x) for x in ratio["paired_ratio_ci95"]) if known else (middle, middle)
    error = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
    if x != x:  # NaN: a horizontal bar
        axes.errorbar([middle], [y], xerr=error, capsize=3 * known, linestyle="none", **style)
    else:
        axes.errorbar([x], [middle], yerr=error, capsize=2 * known, linestyle="none", **style)


def _headline(axes: Axes, section: Mapping[str, Any]) -> None:
    modes = section["modes"]
    for i, (name, item) in enumerate(modes.items()):
        colour, marker = _STYLE.get(name, (_INK, "o"))
        _bar(axes, float("nan"), -i, item["ratios"]["wall"], color=colour, marker=marker)
        if item["target"] is not None:
            at = percent(item["target"])
            axes.plot([at, at], [-i - 0.3, -i + 0.3], color=_TARGET, linewidth=1.6)
    axes.plot([], [], color=_TARGET, linewidth=1.6, label="target")
    axes.axvline(0, color=_QUIET, linewidth=0.8)
    axes.set_yticks([-i for i in range(len(modes))], list(modes))
    axes.set_xscale("symlog", linthresh=3.0)
    ticks = [-3, -2, -1, 0, 1, 2, 3, 10, 30]
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.set_xlabel("added wall time in percent (logarithmic beyond 3)")
    axes.set_title(f"{section['case']['name']}, {section['pairs']} pairs", size=11, loc="left")
    # The yardstick stands at the bottom and far to the right: this corner is free.
    axes.legend(frameon=False, loc="lower left")
    axes.grid(axis="x", alpha=0.25)


def _matrix(axes: Axes, section: list[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for item in section for name in item["modes"]))
    shown: set[str] = set()
    for i, item in enumerate(section):
        for j, name in enumerate(names):
            if name not in item["modes"]:
                continue
            colour, marker = _STYLE.get(name, (_INK, "o"))
            half = name.endswith("layer0")
            _bar(
                axes,
                i + (j - (len(names) - 1) / 2) * 0.1,
                0.0,
                item["modes"][name]["ratios"]["wall"],
                color=colour,
                marker=marker,
                markersize=5,
                markerfacecolor="white" if half else colour,
                label=None if name in shown else name,
            )
            shown.add(name)
    axes.axhline(0, color=_QUIET, linewidth=0.8)
    labels = [f"{item['case']['prompt_tokens']}\nx {item['case']['batch']}" for item in section]
    axes.set_xticks(range(len(section)), labels)
    axes.set_xlabel("prompt tokens x batch")
    axes.set_ylabel("added wall time in percent")
    pairs = sorted({item["pairs"] for item in section})
    told = " or ".join(map(str, pairs))
    axes.set_title(f"matrix, pairs a point: {told}", size=11, loc="left")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.2 * (top - bottom))  # room for the legend
    axes.legend(frameon=False, ncols=4, fontsize=8.5, loc="upper left", bbox_to_anchor=(0.0, 1.0))
    axes.grid(axis="y", alpha=0.25)
