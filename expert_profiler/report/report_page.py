"""A log as a page that people decide with: ``report.html``, and ``report.json`` beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expert_profiler.log.findings import Counts
from expert_profiler.report import charts, page, report_charts, report_tables
from expert_profiler.report import histogram as plots
from expert_profiler.report.page import Html, element, number, picture, section, table
from expert_profiler.report.report_data import Collected

if TYPE_CHECKING:
    from expert_profiler.log.token_counts import Gathered

NAMES = ("report.html", "report.json")

_VERDICTS = {
    "pass": "Sound: the log is complete and passed the recorder's self-check.",
    "doubtful": "Doubtful: read the findings before the figures.",
    "fail": "Rows are missing or wrong: the figures do not describe the whole run.",
}


def write(collected: Collected, folder: Path, histogram: bytes) -> None:
    """histogram: the PNG that ``make_hist.py`` makes."""
    page.write(folder / NAMES[1], page.as_json(collected.data))
    page.write(folder / NAMES[0], html(collected, histogram))


def html(collected: Collected, histogram: bytes) -> str:
    data, found = collected.data, collected.found
    run = data["run"]
    return page.document(
        f"Experts of {run.get('model_id', 'unknown model')}",
        element("h1", f"Which experts does {run.get('model_id', 'this model')} use?"),
        element("p", _subtitle(run), cls="quiet"),
        _verdict(data),
        _cards(data["key_figures"]),
        _identical(data),
        _run(run),
        section(
            "Load of every expert",
            picture(histogram, "histogram of expert choices"),
            _clean_histogram(collected),
        ),
        _maps(found),
        _evenness(data, found),
        section(
            "Coverage: how few experts carry the load?",
            picture(charts.png(report_charts.coverage(found)), "coverage curve"),
            _half(data, found),
        ),
        _together(data, found),
        _caching(data, found),
        _parallel(data),
        _types(data, collected),
        report_tables.hot(data),
        report_tables.dead(data, found),
        report_tables.formulas(data),
    )


def _subtitle(run: dict[str, Any]) -> str:
    named = {"unknown": "phase not recorded"}
    phases = ", ".join(f"{named.get(p, p)} {n:,}" for p, n in run["rows_by_phase"].items())
    top_k = "/".join(map(str, run["top_k"]))
    plural = "s" if len(run["layers"]) > 1 else ""
    return (
        f"{len(run['layers'])} MoE layer{plural} x {run['experts']} experts, top-{top_k} · "
        f"{run['rows']:,} rows (a token and layer each: {phases}) of {run['requests']:,} requests"
    )


def _verdict(data: dict[str, Any]) -> Html:
    found = data["verdict"]
    notes = found["notes"]
    return element(
        "div",
        element("strong", _VERDICTS[found["verdict"]]),
        element("ul", *(element("li", note) for note in notes)) if notes else "",
        cls=f"verdict {found['verdict']}",
    )


def _cards(key_figures: Sequence[dict[str, Any]]) -> Html:
    cards = []
    for figure in key_figures:
        interval = figure["ci95"]
        spread = ""
        if interval is not None and not np.isnan(interval).any():
            spread = f"95%: {number(interval[0], 3)} to {number(interval[1], 3)}. "
        cards.append(
            element(
                "div",
                element("div", figure["name"], cls="name"),
                element("div", number(figure["value"], 3), cls="value"),
                element("div", figure["unit"], cls="note"),
                element("div", f"{spread}Range {figure['range']}.", cls="note"),
                cls="card",
            )
        )
    return element("div", *cards, cls="cards")


def _identical(data: dict[str, Any]) -> Html:
    runs = data["identical_rows"]
    if runs is None:
        return Html("")
    text = (
        f"{runs['rows']:,} of {runs['of_rows']:,} rows ({runs['share']:.1%}) lie in runs of at "
        f"least 64 identical rows in a row, the longest {runs['longest_run']:,}. Different tokens "
        "don't route alike bit for bit that long: these are warm-up or padding tokens that were "
        "logged as if they were real. "
    )
    with_them = runs["key_figures_with_them"]
    if with_them is None:
        return section(
            "Identical rows: all of them",
            element("p", text + "Nothing is left without them, so all figures include them."),
        )
    rows = [
        (a["name"], a["value"], b["value"], a["unit"].split(" (")[0].rstrip(" %") or "%")
        for a, b in zip(data["key_figures"], with_them, strict=True)
    ]
    return section(
        "Identical rows: the figures with and without",
        element("p", text + "Every figure and picture here leaves them out, unless it says so."),
        table(("figure", "without them", "with them", "unit"), rows),
    )


def _run(run: dict[str, Any]) -> Html:
    shown = {k: v for k, v in run.items() if k not in ("layers", "rows_by_phase", "files")}
    rows = [(k.replace("_", " "), _value(v)) for k, v in shown.items() if v is not None]
    return section("What was run", table(("fact", "value"), rows))


def _value(value: Any) -> object:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(_value(v)) for v in value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    return str(value)


def _clean_histogram(collected: Collected) -> Html:
    if collected.contaminated is None:
        return Html("")
    found = collected.found
    counts = Counts(found.layers, found.phases, found.counts, found.rows)
    drawn = plots.expert_histogram(
        counts, model_id=collected.data["run"]["model_id"], requests=found.requests
    )
    return element(
        "div",
        element("p", "Above: with the identical rows, as in expert_hist.png. Below: without them."),
        picture(charts.png(drawn), "histogram without identical rows"),
    )


def _maps(found: Gathered) -> Html:
    maps = report_charts.load_maps(found)
    return section(
        "Hot experts by layer: prefill and decode",
        element(
            "p",
            "Load = the expert's choices over the layer's mean; 1 is even use. Expert ids of "
            "different layers are unrelated.",
        ),
        *(picture(charts.png(drawn), f"load of every expert in {phase}") for phase, drawn in maps),
    )


def _evenness(data: dict[str, Any], found: Gathered) -> Html:
    band = report_charts.interval_of_entropy(found)
    drawn = report_charts.evenness(found, data["layers"], band)
    bits = np.asarray(data["prefill_decode_divergence_bits"])
    text = ""
    if not np.isnan(bits).all():
        most = int(np.nanargmax(bits))
        text = (
            f"Prefill and decode differ by {np.nanmean(bits):.3g} bits on average (Jensen-Shannon; "
            f"0 the same, 1 disjoint), most in layer {found.layers[most]} ({bits[most]:.3g}). "
            "Two halves of the requests in one phase differ by "
            f"{number(data['prefill_decode_divergence_floor_bits'], 3)}, with no phase to tell "
            "them apart: a difference below that means nothing."
        )
    figures_of = data["mean_over_layers"]
    names = [
        ("entropy_bits", "entropy (bits)"),
        ("normalised_entropy", "normalised entropy (0 to 1)"),
        ("effective_experts", "effective experts (experts)"),
        ("gini", "Gini (0 even to 1)"),
        ("max_over_mean", "max / mean (1 = even)"),
        ("coefficient_of_variation", "coefficient of variation (0 = even)"),
        ("share_of_hottest_tenth", "share of the hottest tenth (0 to 1)"),
        ("never_used", "never used (experts a layer)"),
        ("topk_entropy_lack", "lack of entropy, top-k-normalised (0 even to 1)"),
        ("topk_excess_peak", "excess peak, top-k-normalised (0 even to 1)"),
        ("topk_gini", "Gini, top-k-normalised (0 even to 1)"),
    ]
    parts = list(figures_of) if len(found.phases) > 1 else ["all"]
    rows = [(label, *(figures_of[part].get(name) for part in parts)) for name, label in names]
    return section(
        "How even is the load, layer by layer?",
        picture(charts.png(drawn), "entropy and peak load by layer"),
        element("p", text) if text else "",
        table(("mean over layers", *("all rows" if p == "all" else p for p in parts)), rows),
    )


def _half(data: dict[str, Any], found: Gathered) -> Html:
    half = data["mean_over_layers"]["all"]["experts_to_cover_half"]
    return element(
        "p",
        f"On average {half:.3g} of {found.num_experts} experts of a layer take half of its "
        "choices.",
    )


def _together(data: dict[str, Any], found: Gathered) -> Html:
    parts: list[object] = []
    bits = [entry["coactivation_bits"] for entry in data["layers"]]
    if not np.isnan(bits).all():
        drawn, number_of = report_charts.together(found, data["layers"])
        layer = found.layers[number_of]
        pairs = [p for p in data["coactivation_top_pairs"] if p["layer"] == layer]
        named = "; ".join(
            f"{p['experts'][0]} and {p['experts'][1]} ({p['tokens']:,} tokens, lift "
            f"{p['lift']:.2f})"
            for p in pairs
        )
        parts += [
            picture(charts.png(drawn), "experts chosen together"),
            element(
                "p",
                f"Most frequent pairs of layer {layer}: {named}. Lift: how often they meet over "
                "how often independent experts as popular would. White: too few tokens to tell.",
            ),
        ]
    steps = [entry["transition_bits"] for entry in data["layers"] if "transition_bits" in entry]
    if steps and not np.isnan(steps).all():
        drawn, _ = report_charts.transitions(found, data["layers"])
        parts.append(picture(charts.png(drawn), "from a layer to the next"))
    if not parts:
        parts.append(element("p", "No token chooses two experts, and only one layer was logged."))
    return section("Which experts are chosen together?", *parts)


def _caching(data: dict[str, Any], found: Gathered) -> Html:
    drawn = report_charts.caching(found, data["layers"])
    limited = int(found.cache_accesses.max(initial=0))
    of = "decode" if found.cache_phase == "decode" else "all"
    return section(
        "Would a cache of experts help?",
        picture(charts.png(drawn), "next-token reuse and cache hit rate"),
        element(
            "p",
            "What an offloading cache lives on: neighbouring tokens of a request that take the "
            "same experts. The cache curve serves one request after another and keeps the cache "
            f"({limited:,} accesses a layer at most, {of} tokens); each choice is one access.",
        ),
    )


def _parallel(data: dict[str, Any]) -> Html:
    drawn = report_charts.parallel(data["expert_parallel"])
    if drawn is None:
        return Html("")
    names = list(dict.fromkeys(e["placement"] for e in data["expert_parallel"]))
    rows = []
    for ranks in sorted({e["ranks"] for e in data["expert_parallel"]}):
        mine = {e["placement"]: e for e in data["expert_parallel"] if e["ranks"] == ranks}
        cells = [
            f"{100 * e['balance']:.1f} (worst layer {100 * e['worst_layer']:.1f})"
            + (f", {e['copies']} copies" if e["copies"] else "")
            for e in (mine[name] for name in names)
        ]
        rows.append((ranks, *cells))
    by_pass = data["expert_parallel_by_pass"]
    waiting = ""
    if not np.isnan(by_pass.get("linear", np.nan)):
        waiting = (
            f"Where every forward pass waits for its busiest rank, {by_pass['ranks']} ranks have "
            f"{100 * by_pass['linear']:.1f}% in linear order and "
            f"{100 * by_pass['round robin']:.1f}% in round robin: passes of few tokens are less "
            "even than their sum. "
        )
    planned = any(e.get("planned_on_other_requests") for e in data["expert_parallel"])
    basis = (
        "planned on every second request and measured on the others"
        if planned
        else "planned and measured on the same single request, so flattering"
    )
    return section(
        "Expert parallelism: would the ranks be balanced?",
        picture(charts.png(drawn), "balance of expert-parallel ranks"),
        element(
            "p",
            "Balance = mean / max of the ranks' choices over the whole log: the share of the "
            f"busiest rank's work that the average rank has. {waiting}"
            f"Greedy placements (DeepSeek's EPLB rules) are {basis}. Each copy of an expert takes "
            "an even share of its choices; where the "
            "experts do not divide by the ranks, every greedy plan fills the spare slots.",
        ),
        table(("ranks", *(f"{name}: balance (%)" for name in names)), rows),
    )


def _types(data: dict[str, Any], collected: Collected) -> Html:
    types = data["token_types"]
    if "skipped" in types:
        return section("Token types", element("p", f"Not shown: {types['skipped']}."))
    tests, found = collected.tests, collected.found
    number_of = int(np.argmax([np.nan_to_num(t.observed - t.null_p95) for t in tests]))
    drawn = report_charts.token_map(found, tests, number_of)
    sure = sum(test.p_value <= 0.05 for test in tests)
    counts = [(c, int(n)) for c, n in zip(types["classes"], types["choices"], strict=True) if n]
    return section(
        "Token types: which experts take digits, words, whitespace?",
        picture(charts.png(drawn), "token classes and experts"),
        element(
            "p",
            f"{types['tokens']:,} tokens with a known text. In {sure} of {len(tests)} layers the "
            "class tells more of the expert than in 95% of texts whose classes were shifted "
            f"against their routing (p ≤ 0.05 each; about {0.05 * len(tests):.2g} by chance).",
        ),
        table(("token class", f"choices in layer {found.layers[0]}"), counts),
    )
