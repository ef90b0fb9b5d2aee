"""A comparison as a page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from expert_profiler.report import charts, page
from expert_profiler.report.charts import Grid, Series
from expert_profiler.report.comparison import NORMALISED, PLAIN, Run, coverage_by_fraction, sentence
from expert_profiler.report.page import Html, element, picture, section, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = len(charts.STYLES)  # series that one picture tells apart


def html(data: dict[str, Any], runs: list[Run]) -> str:
    names = [run.name for run in runs]
    known = [found for found in data["comparisons"] if found["expert_by_expert"]]
    phase = "" if data["phase"] == "all" else f", {data['phase']} rows only"
    return page.document(
        "Comparison of " + ", ".join(names),
        element("h1", "Do they use their experts alike?"),
        element("p", f"{', '.join(names)}{phase}; each is compared with {names[0]}.", cls="quiet"),
        _verdicts(data),
        _findings(data),
        _runs(data),
        _normalised(data, runs),
        *([_distances(known), *(_difference(found) for found in known)] if known else []),
        _methods(data),
    )


def _verdicts(data: dict[str, Any]) -> Html:
    doubts = [
        element("li", f"{run['name']}: {note}")
        for run in data["runs"]
        for note in run["verdict"]["notes"]
    ]
    left_out = [
        element(
            "li",
            f"{run['name']}: the {run['rows_in_identical_runs_left_out']:,} rows in runs of "
            "identical rows are left out of every figure here",
        )
        for run in data["runs"]
        if run["rows_in_identical_runs_left_out"]
    ]
    words = {run["verdict"]["verdict"] for run in data["runs"]}
    word = next(word for word in ("fail", "doubtful", "pass") if word in words)
    text = {
        "pass": "Sound: every log is complete and passed the recorder's self-check.",
        "doubtful": "Doubtful: read the findings before the figures.",
        "fail": "Rows are missing or wrong in at least one log.",
    }[word]
    notes = element("ul", *doubts, *left_out) if doubts or left_out else ""
    return element("div", element("strong", text), notes, cls=f"verdict {word}")


def _findings(data: dict[str, Any]) -> Html:
    return section(
        "In one sentence each",
        element("ul", *(element("li", sentence(found)) for found in data["comparisons"])),
        element(
            "p",
            "Divergence: 0 bits = the same use of every expert, 1 bit = no expert in common. By "
            "chance: the mean when the same requests are dealt to the two logs at random.",
        ),
    )


def _runs(data: dict[str, Any]) -> Html:
    runs = data["runs"]
    facts = ("log", "model_id", "dtype", "quantization", "device", "vllm_version", "requests")
    rows: list[list[object]] = [["verdict", *(run["verdict"]["verdict"] for run in runs)]]
    for fact in facts:
        values = [run["run"].get(fact) for run in runs]
        if any(value is not None for value in values):
            cells = ["-" if v is None else str(v) for v in values]
            rows.append([fact.replace("_", " "), *cells])
    rows.append(
        [
            "layers x experts, top-k",
            *(
                f"{len(r['run']['layers'])} x {r['run']['experts']}, "
                f"{'/'.join(map(str, r['run']['top_k']))}"
                for r in runs
            ),
        ]
    )
    figures: list[list[object]] = [
        [label, *(run["mean_over_layers"].get(name) for run in runs)]
        for name, label in PLAIN.items()
    ]
    figures += [
        [f"top-k-normalised {label}", *(run["mean_over_layers"].get(name) for run in runs)]
        for name, label in NORMALISED.items()
    ]
    header = ["", *(run["name"] for run in runs)]
    return section(
        "The runs side by side",
        table(header, rows),
        table(["mean over layers", *header[1:]], figures),
    )


def _normalised(data: dict[str, Any], runs: list[Run]) -> Html:
    figure, [left, right] = charts.new_figure(4.0, 2)
    for axes, name, title in (
        (left, "topk_entropy_lack", "Which concentrates its load more?"),
        (right, "topk_excess_peak", "Which has the busier busiest expert?"),
    ):
        for style, run in zip(charts.STYLES, data["runs"][:_MOST], strict=False):
            values = [entry["all"].get(name, math.nan) for entry in run["layers"]]
            depth = 100 * np.arange(len(values)) / max(1, len(values) - 1)
            axes.plot(
                depth, values, color=style[0], marker=style[1], linestyle=style[2], linewidth=1.6,
                markersize=4.5, markevery=max(1, len(values) // 12), markerfacecolor="white",
                label=run["name"],
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        label = {"topk_entropy_lack": "lack of entropy", "topk_excess_peak": "excess peak"}[name]
        charts.dress(axes, title, "depth in the model (%)", f"{label} (0 even to 1)")
        charts.legend(axes)
    fractions = np.linspace(0, 1, 51)
    cover, [axes] = charts.new_figure(3.9)
    series = [
        Series(run.name, 100 * coverage_by_fraction(run, data["phase"], fractions))
        for run in runs[: _MOST - 1]
    ]
    charts.lines(
        axes, (100 * fractions).tolist(), [*series, Series("even use", 100 * fractions)],
        title="How much of the load does the hottest part of the experts hold?",
        xlabel="hottest experts (% of the experts)", ylabel="share of the choices (%)", bottom=0,
    )  # fmt: skip
    return section(
        "On one scale for any top-k and number of experts",
        element(
            "p",
            "0 is even use; 1 is the most uneven that the model's top-k allows, where the same k "
            "experts take every token.",
        ),
        picture(charts.png(figure), "top-k-normalised figures by depth"),
        picture(charts.png(cover), "coverage by share of the experts"),
    )


def _distances(known: list[dict[str, Any]]) -> Html:
    figure, [left, right] = charts.new_figure(4.2, 2)
    shown = known[: _MOST // 2]
    series = []
    for found in shown:
        series.append(Series(f"{found['b']}", np.asarray(found["js_divergence_bits"])))
        chance = np.asarray(found["js_divergence_by_chance_p95_bits"])
        series.append(Series(f"{found['b']}: 95% of chance", chance))
    layers = shown[0]["layers"]
    same = [found for found in shown if found["layers"] == layers]
    charts.lines(
        left, layers, series[: 2 * len(same)],
        title=f"How far from {known[0]['a']}?",
        xlabel="layer (index)", ylabel="Jensen-Shannon divergence (bits)", bottom=0,
    )  # fmt: skip
    ranks = []
    for found in same:
        ranks.append(Series(f"{found['b']}: rank correlation", np.array(found["rank_correlation"])))
        ranks.append(
            Series(
                f"{found['b']}: top {found['hottest']} in common", np.array(found["top_overlap"])
            )
        )
    charts.lines(
        right, layers, ranks,
        title="Are the same experts hot?",
        xlabel="layer (index)", ylabel="agreement (rho and share, 1 = the same)",
    )  # fmt: skip
    for axes in (left, right):
        charts.by_layer_axis(axes, layers)
    rows = [
        (
            found["b"],
            found["mean_js_divergence_bits"],
            found["mean_js_divergence_by_chance_bits"],
            found["mean_p_value"],
            f"{len(found['layers_that_differ'])} of {len(found['layers'])}",
            float(np.nanmean(found["rank_correlation"])),
            float(np.nanmean(found["top_overlap"])),
            "yes" if found["paired_by_request"] else "no",
        )
        for found in known
    ]
    header = (
        f"against {known[0]['a']}", "divergence (bits)", "by chance (bits)", "p",
        "layers p <= 0.05",
        "rank correlation (-1 to 1)", "hottest in common (0 to 1)", "requests paired",
    )  # fmt: skip
    other = [found for found in known if not found["same_model"]]
    note = (
        "The model ids differ. Expert ids mean the same only where the weights have one origin, "
        "as a model and its quantization do."
    )
    return section(
        "Expert by expert",
        element("p", note) if other else "",
        picture(charts.png(figure), "divergence, rank correlation and overlap by layer"),
        table(header, rows),
    )


def _difference(found: dict[str, Any]) -> Html:
    return section(
        f"Which experts are busier in {found['b']}?",
        picture(charts.png(difference_map(found)), "difference of load, by layer and expert"),
    )


def difference_map(found: dict[str, Any]) -> Figure:
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


def _methods(data: dict[str, Any]) -> Html:
    return section(
        "How the figures are made",
        table(
            ("figure", "formula", "range"),
            [
                ("Jensen-Shannon divergence", "H((p+q)/2) - (H(p)+H(q))/2, in bits", "0 to 1"),
                ("p", "(1 + deals at least as far apart) / (1 + deals), requests dealt at random "
                 f"{data['methods']['permutations']} times; pairs of the same request id are "
                 "swapped where both logs have the same ids", "0 to 1"),
                ("rank correlation", "Spearman's rho of the experts' choices", "-1 to 1"),
                ("hottest in common", f"{data['methods']['hottest']}: in both / number", "0 to 1"),
                ("difference of load", "experts x (share in b - share in a)", "even loads"),
                ("top-k-normalised x",
                 "(x - x of even use) / (x of k experts for all - x of even use)", "0 to 1"),
            ],
        ),
        element(
            "p",
            "Whole requests are dealt, because tokens of one text route alike. About 1 layer in 20 "
            "has p <= 0.05 where nothing differs.",
            cls="quiet",
        ),
    )  # fmt: skip
