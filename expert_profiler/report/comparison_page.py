# SPDX-License-Identifier: Apache-2.0
"""Render a comparison: ``compare.html``."""

from __future__ import annotations

from typing import Any

import numpy as np

from expert_profiler.report import charts, comparison_charts, page
from expert_profiler.report.comparison import METRICS, Run, sentence, shape

_FACTS = ("log", "model_id", "dtype", "quantization", "device", "vllm_version", "requests")


def html(data: dict[str, Any], runs: list[Run]) -> str:
    known = [found for found in data["comparisons"] if found["expert_by_expert"]]
    verdicts = {run["verdict"]["verdict"] for run in data["runs"]}
    return page.render(
        "comparison.html.j2",
        data=data,
        names=[run.name for run in runs],
        verdict=next(word for word in ("fail", "doubtful", "pass") if word in verdicts),
        notes=_notes(data["runs"]),
        sentences=[sentence(found) for found in data["comparisons"]],
        facts=_facts(data["runs"]),
        metrics=[
            [label, *(run["mean_over_layers"].get(name) for run in data["runs"])]
            for name, label in METRICS.items()
        ],
        by_depth=charts.png(comparison_charts.by_depth(data)),
        coverage=charts.png(comparison_charts.coverage(runs, data["phase"])),
        known=known,
        distances=charts.png(comparison_charts.distances(known)) if known else None,
        pairs=[_pair(found) for found in known],
        differences=[
            (found["b"], charts.png(comparison_charts.difference_map(found))) for found in known
        ],
    )


def _notes(runs: list[dict[str, Any]]) -> list[str]:
    """What speaks against the logs, and what was left out of them."""
    return [f"{run['name']}: {note}" for run in runs for note in run["verdict"]["notes"]] + [
        f"{run['name']}: the {rows:,} rows in runs of identical rows are left out of every figure "
        "here"
        for run in runs
        if (rows := run["rows_in_identical_runs_left_out"])
    ]


def _facts(runs: list[dict[str, Any]]) -> list[list[object]]:
    """A row a fact, a column a run."""
    rows: list[list[object]] = [["verdict", *(run["verdict"]["verdict"] for run in runs)]]
    for fact in _FACTS:
        values = [run["run"].get(fact) for run in runs]
        if any(value is not None for value in values):
            rows.append([fact.replace("_", " "), *("-" if v is None else str(v) for v in values)])
    return [*rows, ["layers x experts, top-k", *(shape(run["run"]) for run in runs)]]


def _pair(found: dict[str, Any]) -> tuple[object, ...]:
    return (
        found["b"],
        found["mean_js_divergence_bits"],
        found["mean_js_divergence_by_chance_bits"],
        found["mean_p_value"],
        f"{len(found['layers_that_differ'])} of {len(found['layers'])}",
        float(np.nanmean(found["rank_correlation"])),
        float(np.nanmean(found["top_overlap"])),
        "yes" if found["paired_by_request"] else "no",
    )
