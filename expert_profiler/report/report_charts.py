# SPDX-License-Identifier: Apache-2.0
"""Draw the report's charts: each answers the question in its title."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from expert_profiler.log.token_counts import TokenCounts
from expert_profiler.metrics import coactivation, resampling, token_types, usage
from expert_profiler.report import charts
from expert_profiler.report.charts import Grid, Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

#: Ratios of counts are drawn where chance alone would give at least so many.
FEWEST_EXPECTED = 5


def load_maps(found: TokenCounts) -> list[tuple[str, Figure]]:
    """(phase, heat map of every layer's load) on one scale for all phases."""
    with np.errstate(divide="ignore", invalid="ignore"):
        loads = {
            phase: found.num_experts * counts / counts.sum(axis=1, keepdims=True)
            for phase in found.phases
            if (counts := found.phase(phase)).any()
        }
    values = np.concatenate([load.ravel() for load in loads.values()])
    high = max(2.0, float(np.nanquantile(values, 0.995)))
    maps = []
    for phase, load in loads.items():
        figure, [axes] = charts.new_figure(charts.map_height(len(load)) + 0.35)
        rows = int(found.rows[:, found.phases.index(phase)].sum())
        grid = Grid(
            f"{_phase(phase)}: how busy is each expert? ({rows:,} rows; white: never used)",
            np.where(load == 0, np.nan, load),
            "expert (id)",
            "layer (index)",
            rows=found.layers,
        )
        charts.heat_map(figure, axes, grid, unit="load (1 = even use)", low=0, high=high)
        maps.append((phase, figure))
    return maps


def evenness(found: TokenCounts, entries: Sequence[dict[str, Any]]) -> Figure:
    """Entropy, with its 95% interval, and peak load by layer."""
    band = _interval_of_entropy(found)
    figure, [left, right] = charts.new_figure(3.7, 2)
    parts = [(p, _phase(p)) for p in found.phases] if len(found.phases) > 1 else []
    parts.append(("all", "all rows"))

    def series(name: str) -> list[Series]:
        return [
            Series(label, np.array([entry[part][name] for entry in entries]))
            for part, label in parts
        ]

    entropies = series("normalised_entropy")
    if band is not None:
        last = entropies[-1]
        entropies[-1] = Series(f"{last.label} (band: 95% interval)", last.y, band[0], band[1])
    charts.lines(
        left, found.layers, entropies,
        title="How even is the use of a layer's experts?",
        xlabel="layer (index)", ylabel="normalised entropy (0 to 1 = even)",
    )  # fmt: skip
    charts.lines(
        right, found.layers, series("max_over_mean"),
        title="How far is the busiest expert above an even load?",
        xlabel="layer (index)", ylabel="max / mean (1 = even)", bottom=1,
    )  # fmt: skip
    for axes in (left, right):
        charts.by_layer_axis(axes, found.layers)
    return figure


def coverage(found: TokenCounts) -> Figure:
    """The share of the load on the n hottest experts: mean and range over layers."""
    figure, [axes] = charts.new_figure(3.9)
    n = np.arange(found.num_experts + 1)
    series = []
    phases = [p for p in found.phases if found.phase(p).any()]
    for name in phases if len(phases) > 1 else ["all"]:
        counts = found.per_layer if name == "all" else found.phase(name)
        curves = np.array([[0, *usage.coverage(row)] for row in counts if row.any()]) * 100
        label = f"{_phase(name)}: mean over layers (band: lowest to highest layer)"
        series.append(Series(label, curves.mean(axis=0), curves.min(axis=0), curves.max(axis=0)))
    series.append(Series("even use", 100 * n / found.num_experts))
    charts.lines(
        axes, n.tolist(), series,
        title="How much of the load do the n hottest experts of a layer hold?",
        xlabel="n hottest experts (number)", ylabel="share of the choices (%)", bottom=0,
    )  # fmt: skip
    return figure


def together(
    found: TokenCounts, entries: Sequence[dict[str, Any]]
) -> tuple[Figure, int] | tuple[None, None]:
    """Co-activation by layer and the map of the layer with most; that layer. None: no pairs."""
    number = _furthest(entries, "coactivation_bits")
    if number is None:
        return None, None
    pairs, tokens = found.pairs[number], int(found.rows[number].sum())
    single = np.diagonal(pairs).astype(float)
    grid = Grid(
        f"Layer {found.layers[number]}: chosen together more often than by chance?",
        _log_lift(coactivation.lift(pairs, tokens), np.outer(single, single) / tokens),
        "expert (id)",
        "expert (id)",
        most_columns=11,
    )
    figure = _information_and_map(
        entries, "coactivation_bits", "pairs of experts beyond their popularity", grid,
        title="Do experts go in fixed teams?", ylabel="information in pairs (bits)",
    )  # fmt: skip
    return figure, found.layers[number]


def transitions(found: TokenCounts, entries: Sequence[dict[str, Any]]) -> Figure | None:
    """Information from layer to layer and the map of the strongest step; None: one layer alone."""
    number = _furthest(entries, "transition_bits")
    if number is None:
        return None
    here, there = found.layers[number], found.layers[number + 1]
    grid = Grid(
        f"From layer {here} to {there}: more often than by chance?",
        _joint_lift(found.transitions[number]),
        f"expert in layer {there} (id)",
        f"expert in layer {here} (id)",
        most_columns=11,
    )
    return _information_and_map(
        entries, "transition_bits", "expert here and in the next layer", grid,
        title="Does a layer foretell the next?", ylabel="mutual information (bits)",
    )  # fmt: skip


def caching(found: TokenCounts, entries: Sequence[dict[str, Any]]) -> Figure:
    """Next-token reuse by layer, and the cache curve."""
    figure, [left, right] = charts.new_figure(3.9, 2)
    names = [p for p in found.phases if any(not math.isnan(_reuse(e, p)) for e in entries)]
    series = [
        Series(_phase(p), 100 * np.array([_reuse(entry, p) for entry in entries])) for p in names
    ]
    series += [
        Series(label, 100 * np.array([_reuse(entry, name) for entry in entries]))
        for name, label in (("chance", "by popularity alone"), ("even", "even use"))
    ]
    charts.lines(
        left, found.layers, series,
        title="Does the next token take the same experts?",
        xlabel="layer (index)", ylabel="experts used again (%)", bottom=0,
    )  # fmt: skip
    charts.by_layer_axis(left, found.layers)
    n = np.arange(1, found.num_experts + 1)
    curves = [Series("even use", 100 * n / found.num_experts)]
    if found.cache_accesses.any():
        used = found.cache_accesses > 0
        rates = 100 * found.cache_hits[used] / found.cache_accesses[used, None]
        counts = found.phase("decode") if found.cache_phase == "decode" else found.per_layer
        fixed = 100 * np.array([usage.coverage(row) for row in counts if row.any()])
        curves[:0] = [
            Series(
                "least recently used (band: layers)", rates.mean(axis=0), rates.min(axis=0),
                rates.max(axis=0),
            ),
            Series("the n hottest, fixed", fixed.mean(axis=0)),
        ]  # fmt: skip
    of = "decode tokens" if found.cache_phase == "decode" else "tokens"
    charts.lines(
        right, n.tolist(), curves,
        title="How often is the expert in a cache of n?",
        xlabel="experts kept in each layer (number)", ylabel=f"hit rate of {of} (%)", bottom=0,
    )  # fmt: skip
    return figure


def parallel(entries: Sequence[dict[str, Any]]) -> Figure | None:
    """Balance of the ranks by EP size and placement."""
    if not entries:
        return None
    sizes = sorted({entry["ranks"] for entry in entries})
    names = list(dict.fromkeys(entry["placement"] for entry in entries))
    figure, [axes] = charts.new_figure(3.8)
    series = []
    for name in names:
        mine = {entry["ranks"]: entry for entry in entries if entry["placement"] == name}
        series.append(
            Series(
                name,
                100 * np.array([mine[size]["balance"] for size in sizes]),
                100 * np.array([mine[size]["worst_layer"] for size in sizes]),
            )
        )
    charts.bars(
        axes, sizes, series,
        title="How even is the load over expert-parallel ranks? (dark line: the worst layer)",
        xlabel="expert-parallel ranks (number)", ylabel="mean / max load of the ranks (%)",
    )  # fmt: skip
    axes.set_ylim(0, 105)
    return figure


def token_map(found: TokenCounts, tests: Sequence[token_types.PermutationTest]) -> Figure:
    """Information of class and expert by layer, and the map of the layer where it is surest."""
    number = int(np.argmax([np.nan_to_num(test.observed - test.null_p95) for test in tests]))
    assert found.joint is not None  # noqa: S101 (there is a test)
    figure, [left, right] = charts.new_figure(3.9, 2, (1, 1.5))
    charts.lines(
        left,
        found.layers,
        [
            Series("token class and expert", np.array([test.observed for test in tests])),
            Series("95% of shuffled texts are below", np.array([test.null_p95 for test in tests])),
        ],
        title="Do experts specialise in token types?",
        xlabel="layer (index)", ylabel="mutual information (bits)", bottom=0,
    )  # fmt: skip
    charts.by_layer_axis(left, found.layers)
    joint = found.joint[number]
    present = np.flatnonzero(joint.sum(axis=1))
    grid = Grid(
        f"Layer {found.layers[number]}: which expert takes which kind of token?",
        _joint_lift(joint[present]),
        "expert (id)",
        "",
        rows=[token_types.CLASSES[code] for code in present],
        most_columns=13,
    )
    _lift_map(figure, right, grid)
    right.set_ylabel("token class (name)", size=9.5)
    return figure


def _information_and_map(
    entries: Sequence[dict[str, Any]], name: str, label: str, grid: Grid, **texts: str
) -> Figure:
    """An information by layer, beside what sampling alone gives, and a map of lifts."""
    figure, [left, right] = charts.new_figure(4.3, 2, (1, 1.25))
    known = [entry for entry in entries if name in entry]
    layers = [entry["layer"] for entry in known]
    series = [
        Series(text, np.array([entry[key] for entry in known]))
        for text, key in ((label, name), ("by sampling alone", _floor(name)))
    ]
    charts.lines(left, layers, series, xlabel="layer (index)", bottom=0, **texts)
    charts.by_layer_axis(left, layers)
    _lift_map(figure, right, grid)
    return figure


def _floor(name: str) -> str:
    """The metric that says what sampling alone gives."""
    return name.replace("_bits", "_chance_bits")


def _lift_map(figure: Figure, axes: Any, grid: Grid) -> None:
    charts.heat_map(
        figure, axes, grid,
        unit="times as often as by chance", low=-2, high=2,
        ticks={-2: "1/4 or less", -1: "1/2", 0: "1", 1: "2", 2: "4 or more"},
    )  # fmt: skip


def _joint_lift(joint: Array) -> Array:
    expected = np.outer(joint.sum(axis=1), joint.sum(axis=0)) / max(1, int(joint.sum()))
    return _log_lift(token_types.class_lift(joint), expected)


def _log_lift(lift: Array, expected: Array) -> Array:
    """log2, "never" at the light end; NaN where chance alone gives too few to tell."""
    with np.errstate(divide="ignore"):
        log = np.clip(np.log2(lift), -2, 2)
    return np.where(expected >= FEWEST_EXPECTED, log, np.nan)


def _furthest(entries: Sequence[dict[str, Any]], name: str) -> int | None:
    """The entry that is furthest above what sampling alone gives; None where none has a value."""
    if all(math.isnan(entry.get(name, math.nan)) for entry in entries):
        return None
    above = [entry[name] - entry[_floor(name)] if name in entry else -math.inf for entry in entries]
    return int(np.argmax(np.nan_to_num(above, nan=-math.inf)))


def _reuse(entry: dict[str, Any], name: str) -> float:
    return float(entry["next_token_reuse"].get(name, math.nan))


def _phase(name: str) -> str:
    return {"unknown": "phase not recorded", "all": "all rows"}.get(name, name)


def _interval_of_entropy(found: TokenCounts) -> Array | None:
    """[2, layers]: the 95% bootstrap interval of each layer's normalised entropy."""
    if len(found.by_group) < 2:
        return None
    groups = found.layer_groups
    ends = [
        resampling.bootstrap_interval(
            groups[:, n],
            lambda row: usage.normalised_entropy(row) if row.any() else math.nan,
            bounds=(0, 1),
            draws=200,
        )
        for n in range(len(found.layers))
    ]
    return np.array(ends).T
