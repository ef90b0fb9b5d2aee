# SPDX-License-Identifier: Apache-2.0
"""Collect the content of ``report.json`` from an opened log, with the counts behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expert_profiler.log import tokens, vocabulary
from expert_profiler.log.route_log import RouteLog
from expert_profiler.log.token_counts import TokenCounts, count_tokens
from expert_profiler.metrics import coactivation, resampling, token_types, usage
from expert_profiler.report import log_metrics

SCHEMA = 1
PERMUTATIONS = 100
Progress = Callable[[int], None]

_HEADER_FACTS = (
    "model_id", "vllm_version", "torch_version", "device", "dtype", "quantization", "parallel",
    "execution", "prefix_caching", "chunked_prefill", "async_scheduling", "seed", "start_time",
    "patch_id", "expert_ids",
)  # fmt: skip


@dataclass(frozen=True)
class ReportData:
    """What a report shows.

    data: the content of ``report.json``; counts: those of the usable rows, behind it;
    with_identical: the counts with the rows in long runs of identical rows, where ``counts`` leaves
    some out; tests: one a layer, where token classes are known.
    """

    data: dict[str, Any]
    counts: TokenCounts
    with_identical: TokenCounts | None
    tests: list[token_types.PermutationTest]


def collect(
    log: RouteLog,
    *,
    outputs: Path | None = None,
    tokenizer: Path | None = None,
    on_tokens: Progress | None = None,
) -> ReportData:
    """Count the log and compute every metric."""
    labels, without_types = _labels(log, outputs, tokenizer)
    rows = log.usable_rows()
    with_identical = None
    if rows.identical:
        unflagged = log.usable_rows(include_identical=True)
        with_identical = count_tokens(log, unflagged.condition, on_tokens=on_tokens)
    found = count_tokens(
        log,
        rows.condition,
        classes=len(token_types.CLASSES),
        labels=labels,
        on_tokens=on_tokens,
    )
    tests = _tests(found, labels) if labels is not None and found.joint is not None else []
    entries = log_metrics.by_layer(found)
    parallel = log_metrics.expert_parallel(found)
    data = {
        "schema": SCHEMA,
        "verdict": verdict(log),
        "run": run_facts(log, found),
        "key_figures": log_metrics.key_metrics(found, parallel),
        "identical_rows": _identical(log, with_identical),
        "mean_over_layers": {
            part: log_metrics.mean_over_layers(entries, part) for part in ("all", *found.phases)
        },
        "all_layers_added_up": log_metrics.distribution_metrics(found.per_layer.sum(axis=0), 0),
        "layers": entries,
        "prefill_decode_divergence_bits": log_metrics.phase_divergence(found),
        "prefill_decode_divergence_floor_bits": log_metrics.phase_floor(found),
        "expert_parallel": parallel,
        "expert_parallel_by_pass": _by_pass(log, rows.condition, found.num_experts),
        "cache": _cache(found),
        "coactivation_top_pairs": _top_pairs(found),
        "hot_experts": hot_experts(found),
        "never_used_experts": never_used_experts(found),
        "token_types": _token_types(found, tests, without_types),
        "counts": {
            "axes": ["layer", "phase", "expert"],
            "layers": found.layers,
            "phases": found.phases,
            "values": found.counts,
            "weight_mass": found.mass,
        },
        "methods": {
            "requests_resampled_in_groups": len(found.by_group),
            "bootstrap": f"basic, 95%, {resampling.DRAWS} draws over groups of requests",
        },
    }
    return ReportData(data, found, with_identical, tests)


def verdict(log: RouteLog) -> dict[str, Any]:
    """The verdict on the log and its reasons, for ``report.json`` and ``compare.json``."""
    return {
        "verdict": log.verdict,
        "self_check": log.end.self_check if log.end is not None else "absent",
        "lost_rows": log.lost_rows,
        "suspicions": log.suspicions,
        "notes": log.notes,
    }


def _by_pass(log: RouteLog, condition: str, num_experts: int) -> dict[str, Any]:
    ranks = log_metrics.key_ranks(num_experts)
    found: dict[str, Any] = {"ranks": ranks}
    if ranks:
        for name, place in log_metrics.FIXED.items():
            found[name] = pass_balance(log, condition, place(num_experts, ranks), ranks)
    return found


def pass_balance(log: RouteLog, condition: str, rank_of: Any, ranks: int) -> float:
    """Balance when every forward pass waits for its busiest rank in every layer.

    sum of mean / sum of max over (pass, layer), of the choices of each rank's experts. rank_of:
    [experts]. No unit, 1/ranks to 1: never above the balance of the sums, and what the ranks'
    time looks like if it grows with their choices. NaN without passes.
    """
    places = ", ".join(map(str, np.asarray(rank_of).tolist()))
    [(mean, most)] = log.query(
        f"""
        SELECT sum(total) / ?, sum(busiest) FROM (
          SELECT sum(n) AS total, max(n) AS busiest FROM (
            SELECT forward_pass_id, layer, ([{places}])[id + 1] AS rank, count(*) AS n
            FROM (SELECT forward_pass_id, layer, unnest(topk_ids) AS id FROM routes
                  WHERE {condition} AND forward_pass_id IS NOT NULL)
            GROUP BY ALL)
          GROUP BY forward_pass_id, layer)""",  # noqa: S608
        [ranks],
    )
    return float(mean) / float(most) if most else math.nan


def run_facts(log: RouteLog, found: TokenCounts) -> dict[str, Any]:
    raw = log.meta.raw
    [(passes,)] = log.query("SELECT count(DISTINCT forward_pass_id) FROM routes WHERE NOT flagged")
    return {
        "log": log.path.name,
        "files": [file.path.name for file in log.files],
        **{name: raw[name] for name in _HEADER_FACTS if name in raw},
        "layers": found.layers,
        "experts": found.num_experts,
        "top_k": sorted(set(found.top_k)),
        "rows": int(found.rows.sum()),
        "rows_by_phase": dict(zip(found.phases, found.rows.sum(axis=0).tolist(), strict=True)),
        "tokens": found.tokens,
        "requests": found.requests,
        "forward_passes": int(passes) or None,
    }


def hot_experts(found: TokenCounts, n: int = 20) -> list[dict[str, Any]]:
    """The (layer, expert) pairs with the largest share of their layer's choices."""
    counts = found.per_layer
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    share = counts / totals
    mass = found.mass.sum(axis=1)
    order = np.argsort(-share.ravel(), kind="stable")[:n]
    hot = []
    for layer, expert in zip(*np.unravel_index(order, share.shape), strict=True):
        if counts[layer, expert]:
            hot.append(
                {
                    "layer": found.layers[layer],
                    "expert": int(expert),
                    "choices": int(counts[layer, expert]),
                    "share": float(share[layer, expert]),
                    "times_even": float(share[layer, expert] * found.num_experts),
                    "mean_weight": float(mass[layer, expert] / counts[layer, expert]),
                    "share_of_weight": float(mass[layer, expert] / mass[layer].sum()),
                }
            )
    return hot


def never_used_experts(found: TokenCounts) -> dict[int, list[int]]:
    """The experts without a choice, by layer; layers that use all are left out."""
    return {
        layer: ids
        for layer, counts in zip(found.layers, found.per_layer, strict=True)
        if (ids := usage.never_used(counts))
    }


def _labels(
    log: RouteLog, outputs: Path | None, tokenizer: Path | None
) -> tuple[vocabulary.Labels | None, str]:
    try:
        paths = vocabulary.find(log.path, log.meta.model_id, outputs, tokenizer)
        return vocabulary.Labels(tokens.request_names(log), *paths), ""
    except vocabulary.UnavailableError as error:
        return None, str(error)


def _tests(found: TokenCounts, labels: vocabulary.Labels) -> list[token_types.PermutationTest]:
    classes, request, ids = labels.sample()
    tests = []
    for number, top_k in enumerate(found.top_k):
        mine = ids[:, number, :top_k]
        has = mine[:, 0] >= 0 if top_k else np.zeros(len(mine), dtype=bool)
        tests.append(
            token_types.permutation_test(
                classes[has],
                mine[has],
                len(token_types.CLASSES),
                found.num_experts,
                request=request[has],
                draws=PERMUTATIONS,
            )
        )
    return tests


def _token_types(
    found: TokenCounts, tests: list[token_types.PermutationTest], skipped: str
) -> dict[str, Any]:
    if not tests or found.joint is None:
        return {"skipped": skipped}
    return {
        "classes": token_types.CLASSES,
        "tokens": found.labelled,
        "choices": found.joint.sum(axis=2)[0],
        "mutual_information_bits": [token_types.mutual_information_bits(j) for j in found.joint],
        "tested": [
            {
                "layer": layer,
                "observed_bits": test.observed,
                "shuffled_mean_bits": test.null_mean,
                "shuffled_p95_bits": test.null_p95,
                "p_value": test.p_value,
            }
            for layer, test in zip(found.layers, tests, strict=True)
        ],
        "joint_counts": found.joint,
    }


def _identical(log: RouteLog, with_them: TokenCounts | None) -> dict[str, Any] | None:
    runs = log.identical_runs
    if not runs.rows:
        return None
    return {
        "rows": runs.rows,
        "of_rows": log.num_rows,
        "share": runs.share,
        "longest_run": runs.longest,
        "layers": runs.layers,
        "key_figures_with_them": None
        if with_them is None
        else log_metrics.key_metrics(with_them, log_metrics.expert_parallel(with_them)),
        "left_out_of_everything_else": with_them is not None,
    }


def _cache(found: TokenCounts) -> dict[str, Any]:
    accesses = found.cache_accesses
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = found.cache_hits / accesses[:, None]
    return {
        "policy": "least recently used, kept from token to token and request to request",
        "tokens": found.cache_phase,
        "accesses": accesses,
        "hit_rate_by_layer_and_size": rates,
    }


def _top_pairs(found: TokenCounts) -> list[dict[str, Any]]:
    """The three most frequent pairs of each layer with their lift."""
    pairs = []
    for number, layer in enumerate(found.layers):
        table = found.pairs[number]
        if not table.any():
            continue
        lift = coactivation.lift(table, int(found.rows[number].sum()))
        pairs += [
            {
                "layer": layer,
                "experts": [a, b],
                "tokens": int(table[a, b]),
                "lift": float(lift[a, b]),
            }
            for a, b in coactivation.top_pairs(table, 3)
        ]
    return pairs
