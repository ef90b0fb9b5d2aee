# SPDX-License-Identifier: Apache-2.0
"""Render a log's report: ``report.html``."""

from __future__ import annotations

from typing import Any

import numpy as np

from expert_profiler.log.expert_counts import Counts
from expert_profiler.log.findings import listed
from expert_profiler.log.token_counts import TokenCounts
from expert_profiler.log.usable_rows import SHORTEST_RUN
from expert_profiler.metrics import token_types
from expert_profiler.report import charts, histogram, log_metrics, page, report_charts
from expert_profiler.report.report_data import ReportData

_LISTED_LAYERS = 24  # with never-used experts
_LISTED_EXPERTS = 12
#: Columns of the table of hot experts, and what turns their values into those shown.
_HOT = {
    "layer": 1, "expert": 1, "choices": 1, "share": 100, "times_even": 1, "share_of_weight": 100,
    "mean_weight": 1,
}  # fmt: skip


def html(report: ReportData, histogram_png: bytes) -> str:
    """histogram_png: what ``expert-profiler hist`` draws of the log."""
    data, counts = report.data, report.counts
    drawn, together_layer = _charts(report)
    types = data["token_types"]
    return page.render(
        "report.html.j2",
        data=data,
        charts=drawn | {"histogram": histogram_png},
        together_layer=together_layer,
        facts=_facts(data["run"]),
        with_identical=_with_identical(data),
        divergence=_divergence(data),
        placements=_placements(data["expert_parallel"]),
        token_classes=[
            (name, int(n))
            for name, n in zip(types.get("classes", ()), types.get("choices", ()), strict=True)
            if n
        ],
        hot=[[scale * hot[key] for key, scale in _HOT.items()] for hot in data["hot_experts"]],
        never_used=_never_used(data, counts),
        classes=token_types.CLASSES,
        shortest_run=SHORTEST_RUN,
        top_share=log_metrics.TOP_SHARE,
    )


def _charts(report: ReportData) -> tuple[dict[str, Any], int | None]:
    """(each chart's PNG by its name in the template, None for one that would show nothing;
    the layer of the chart "together")."""
    data, counts = report.data, report.counts
    entries = data["layers"]

    def png(figure: Any) -> bytes | None:
        return None if figure is None else charts.png(figure)

    usable = None
    if report.with_identical is not None:
        usable = histogram.expert_histogram(
            Counts(counts.layers, counts.phases, counts.counts, counts.rows),
            model_id=data["run"]["model_id"],
            requests=counts.requests,
        )
    together, together_layer = report_charts.together(counts, entries)
    return {
        "histogram_of_usable": png(usable),
        "loads": [(phase, png(chart)) for phase, chart in report_charts.load_maps(counts)],
        "evenness": png(report_charts.evenness(counts, entries)),
        "coverage": png(report_charts.coverage(counts)),
        "together": png(together),
        "transitions": png(report_charts.transitions(counts, entries)),
        "caching": png(report_charts.caching(counts, entries)),
        "parallel": png(report_charts.parallel(data["expert_parallel"])),
        "token_types": png(report_charts.token_map(counts, report.tests) if report.tests else None),
    }, together_layer


def _facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    shown = {k: v for k, v in run.items() if k not in ("layers", "rows_by_phase", "files")}
    return [(k.replace("_", " "), _text(v)) for k, v in shown.items() if v is not None]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    return str(value)


def _with_identical(data: dict[str, Any]) -> list[tuple[object, ...]]:
    """A row a key metric: without the identical rows and with them."""
    runs = data["identical_rows"] or {}
    return [
        (a["name"], a["value"], b["value"], a["unit"].split(" (")[0].rstrip(" %") or "%")
        for a, b in zip(data["key_figures"], runs.get("key_figures_with_them") or (), strict=False)
    ]


def _divergence(data: dict[str, Any]) -> dict[str, Any] | None:
    bits = np.asarray(data["prefill_decode_divergence_bits"])
    if np.isnan(bits).all():
        return None
    most = int(np.nanargmax(bits))
    return {"mean": np.nanmean(bits), "most": bits[most], "layer": data["run"]["layers"][most]}


def _placements(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """A row for each number of ranks, a column for each placement."""
    names = list(dict.fromkeys(entry["placement"] for entry in entries))
    by_ranks: dict[int, dict[str, str]] = {}
    for entry in entries:
        cell = f"{100 * entry['balance']:.1f} (worst layer {100 * entry['worst_layer']:.1f})"
        copies = f", {entry['copies']} copies" if entry["copies"] else ""
        by_ranks.setdefault(entry["ranks"], {})[entry["placement"]] = cell + copies
    rows = [(ranks, *(cells[name] for name in names)) for ranks, cells in by_ranks.items()]
    return {"names": [f"{name}: balance (%)" for name in names], "rows": rows}


def _never_used(data: dict[str, Any], counts: TokenCounts) -> dict[str, Any]:
    by_layer = data["never_used_experts"]
    rows = [(layer, len(ids), listed(ids, _LISTED_EXPERTS)) for layer, ids in by_layer.items()]
    # E * (1 - K/E)^rows, added over layers: experts that even use would leave out.
    keep = 1 - np.array(counts.top_k) / counts.num_experts
    chance = float((counts.num_experts * keep ** counts.rows.sum(axis=1)).sum())
    return {
        "total": sum(map(len, by_layer.values())),
        "of": counts.per_layer.size,
        "by_chance": f"about {chance:.2g}" if chance >= 0.01 else "fewer than 0.01",
        "rows": rows[:_LISTED_LAYERS],
        "more": len(rows) - _LISTED_LAYERS,
    }
