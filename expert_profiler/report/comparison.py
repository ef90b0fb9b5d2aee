# SPDX-License-Identifier: Apache-2.0
"""Compare logs: the content of ``compare.json`` and the console's summary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expert_profiler.errors import UserError
from expert_profiler.log import tokens
from expert_profiler.log.route_log import open_log
from expert_profiler.log.token_counts import TokenCounts, count_tokens
from expert_profiler.metrics import divergence, resampling, topk_normalised, usage
from expert_profiler.report import log_metrics, report_data

SCHEMA = 1
Array = npt.NDArray[Any]

#: The metrics that are shown for every run, with their names for people.
METRICS = {
    "entropy_bits": "entropy (bits)",
    "normalised_entropy": "normalised entropy (0 to 1 = even)",
    "effective_experts": "effective experts (experts)",
    "max_over_mean": "max / mean (1 = even)",
    "share_of_hottest_tenth": "share of the hottest tenth (0 to 1)",
    "never_used": "never used (experts a layer)",
    # These compare between any two models.
    "topk_entropy_lack": "top-k-normalised lack of entropy (0 even to 1)",
    "topk_excess_peak": "top-k-normalised excess peak (0 even to 1)",
    "topk_gini": "top-k-normalised Gini (0 even to 1)",
    "topk_coefficient_of_variation": "top-k-normalised coefficient of variation (0 even to 1)",
}


@dataclass(frozen=True)
class Run:
    """One log. requests: ``req_id`` by request index; left_out: rows in runs of identical rows."""

    name: str
    counts: TokenCounts
    requests: list[str]
    facts: dict[str, Any]
    verdict: dict[str, Any]
    left_out: int = 0

    def groups(self, phase: str) -> Array:
        """[groups, layers, experts] choices of one phase, or of all."""
        if phase == "all":
            return self.counts.layer_groups
        if phase not in self.counts.phases:
            raise UserError(f"{self.name} has no {phase} rows; leave --phase out")
        return np.asarray(self.counts.by_group[:, :, self.counts.phases.index(phase)])


def read_run(path: Path, name: str) -> Run:
    """Count the usable rows of one log."""
    with open_log(path) as log:
        rows = log.usable_rows()
        counts = count_tokens(log, rows.condition)
        return Run(
            name,
            counts,
            tokens.request_names(log),
            report_data.run_facts(log, counts),
            report_data.verdict(log),
            rows.identical,
        )


def compared(runs: list[Run], phase: str = "all") -> dict[str, Any]:
    """The content of ``compare.json``: each run, and each against the first."""
    return {
        "schema": SCHEMA,
        "phase": phase,
        "runs": [_described(run, phase) for run in runs],
        "comparisons": [against(runs[0], run, phase) for run in runs[1:]],
        "methods": {
            "permutations": resampling.DRAWS,
            "hottest": "the hottest tenth of the experts, at least one",
        },
    }


def against(a: Run, b: Run, phase: str) -> dict[str, Any]:
    """Compare b with a: expert by expert on the layers of both, if they have as many experts."""
    answer: dict[str, Any] = {"a": a.name, "b": b.name}
    if a.counts.num_experts != b.counts.num_experts:
        return answer | {
            "expert_by_expert": False,
            "why_not": f"{a.name} has {a.counts.num_experts} experts a layer, {b.name} "
            f"{b.counts.num_experts}",
        }
    layers = [layer for layer in a.counts.layers if layer in b.counts.layers]
    if not layers:
        return answer | {"expert_by_expert": False, "why_not": "no layer is in both logs"}
    one, two = (
        run.groups(phase)[:, [run.counts.layers.index(layer) for layer in layers]] for run in (a, b)
    )
    order = _pairing(a, b, one, two)
    if order is not None:
        two = two[order]
    test = resampling.divergence_test(one, two, paired=order is not None)
    p, q = one.sum(axis=0), two.sum(axis=0)
    n = log_metrics.hottest(a.counts.num_experts)
    return answer | {
        "expert_by_expert": True,
        "layers": layers,
        "same_model": a.facts.get("model_id") == b.facts.get("model_id"),
        "paired_by_request": order is not None,
        "js_divergence_bits": test.observed,
        "js_divergence_by_chance_bits": test.null_mean,
        "js_divergence_by_chance_p95_bits": test.null_p95,
        "p_value": test.p_value,
        "mean_js_divergence_bits": test.mean_observed,
        "mean_js_divergence_by_chance_bits": test.mean_null,
        "mean_p_value": test.mean_p_value,
        "layers_that_differ": [
            layer for layer, value in zip(layers, test.p_value, strict=True) if value <= 0.05
        ],
        "rank_correlation": [divergence.rank_correlation(x, y) for x, y in zip(p, q, strict=True)],
        "hottest": n,
        "top_overlap": [divergence.top_overlap(x, y, n) for x, y in zip(p, q, strict=True)],
        "load_difference": divergence.share_difference(p, q),
    }


def _pairing(a: Run, b: Run, one: Array, two: Array) -> list[int] | None:
    """Where both logs have the same request ids, the row of b for each row of a."""
    names = a.requests
    grouped = len(one) != len(names) or len(two) != len(b.requests)
    if grouped or len(set(names)) < len(names) or set(names) != set(b.requests):
        return None
    place = {name: number for number, name in enumerate(b.requests)}
    return [place[name] for name in names]


def coverage_by_fraction(run: Run, phase: str, fractions: Array) -> Array:
    """The mean over layers of ``topk_normalised.coverage_at``. [fractions] float64, 0 to 1."""
    counts = run.groups(phase).sum(axis=0)
    curves = [topk_normalised.coverage_at(row, fractions) for row in counts if row.any()]
    return np.asarray(np.mean(curves, axis=0))


def _described(run: Run, phase: str) -> dict[str, Any]:
    groups = run.groups(phase)
    counts = groups.sum(axis=0)
    entries = [
        {"layer": layer, "all": log_metrics.distribution_metrics(row, top_k)}
        for layer, row, top_k in zip(run.counts.layers, counts, run.counts.top_k, strict=True)
    ]
    return {
        "name": run.name,
        "verdict": run.verdict,
        "run": run.facts,
        "rows_in_identical_runs_left_out": run.left_out,
        "mean_over_layers": log_metrics.mean_over_layers(entries),
        "normalised_entropy_ci95": resampling.bootstrap_interval(
            groups, log_metrics.layer_mean(usage.normalised_entropy), bounds=(0, 1)
        ),
        "layers": entries,
    }


def table(data: dict[str, Any]) -> str:
    """The console's summary: one column a run, then one line a comparison."""
    runs = data["runs"]
    rows: list[tuple[str, list[str]]] = [
        ("", [run["name"] for run in runs]),
        ("verdict", [run["verdict"]["verdict"] for run in runs]),
        ("layers x experts, top-k", [shape(run["run"]) for run in runs]),
        ("rows", [f"{run['run']['rows']:,}" for run in runs]),
    ]
    for name, label in METRICS.items():
        values = [run["mean_over_layers"].get(name, math.nan) for run in runs]
        rows.append((label, ["-" if math.isnan(v) else f"{v:.4g}" for v in values]))
    first = max(len(label) for label, _ in rows) + 2
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(runs))]
    lines = [
        label.ljust(first) + "  ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True))
        for label, cells in rows
    ]
    return "\n".join([*lines, *(sentence(found) for found in data["comparisons"])])


def sentence(found: dict[str, Any]) -> str:
    """One comparison in one sentence."""
    pair = f"{found['b']} against {found['a']}"
    if not found["expert_by_expert"]:
        return f"{pair}: not expert by expert, as {found['why_not']}"
    differ, layers = len(found["layers_that_differ"]), len(found["layers"])
    return (
        f"{pair}: Jensen-Shannon divergence {found['mean_js_divergence_bits']:.3g} bits, "
        f"{found['mean_js_divergence_by_chance_bits']:.3g} by chance (p = "
        f"{found['mean_p_value']:.3g}); {differ} of {layers} layers differ at p <= 0.05"
    )


def shape(run: dict[str, Any]) -> str:
    """Layers x experts, top-k."""
    top_k = "/".join(map(str, run["top_k"]))
    return f"{len(run['layers'])} x {run['experts']}, {top_k}"
