"""What a report says, from an opened log: one dictionary for ``report.json``, and the counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expert_profiler.log import tokens, vocabulary
from expert_profiler.log.route_log import RouteLog
from expert_profiler.log.token_counts import Gathered, gather
from expert_profiler.metrics import coactivation, placement, resampling, token_types, usage
from expert_profiler.report import summary

SCHEMA = 1
PERMUTATIONS = 100
Progress = Callable[[int], None]

_HEADER_FACTS = (
    "model_id", "vllm_version", "torch_version", "device", "dtype", "quantization", "parallel",
    "execution", "prefix_caching", "chunked_prefill", "async_scheduling", "seed", "start_time",
    "patch_id", "expert_ids",
)  # fmt: skip


@dataclass(frozen=True)
class Collected:
    """data: the content of ``report.json``. found: the counts behind it, which leave out rows in
    long runs of identical rows; contaminated: the counts with those rows, where there are any.
    tests: one a layer, where token classes are known."""

    data: dict[str, Any]
    found: Gathered
    contaminated: Gathered | None
    tests: list[token_types.PermutationTest]


def collect(
    log: RouteLog,
    *,
    outputs: Path | None = None,
    tokenizer: Path | None = None,
    on_tokens: Progress | None = None,
) -> Collected:
    """Read the log (opened with its weights) and compute every figure."""
    labels, without_types = _labels(log, outputs, tokenizer)
    contaminated, found = None, None
    if log.contamination.rows:
        tokens.find_identical_runs(log)
        contaminated = gather(log, on_tokens=on_tokens)
        if log.contamination.rows < log.num_rows:
            found = gather(
                log,
                tokens.CLEAN,
                classes=len(token_types.CLASSES),
                labels=labels,
                on_tokens=on_tokens,
            )
    if found is None:
        found = contaminated or gather(
            log, classes=len(token_types.CLASSES), labels=labels, on_tokens=on_tokens
        )
    if contaminated is found:
        contaminated = None  # nothing would be left without them
    tests = _tests(found, labels) if labels is not None and found.joint is not None else []
    entries = summary.by_layer(found)
    parallel = summary.expert_parallel(found)
    ranks = summary.key_ranks(found.num_experts)
    where = tokens.UNFLAGGED if contaminated is None else tokens.CLEAN
    data = {
        "schema": SCHEMA,
        "verdict": verdict(log),
        "run": run_facts(log, found),
        "key_figures": summary.key_figures(found, parallel),
        "identical_rows": _identical(log, contaminated),
        "mean_over_layers": {
            part: summary.mean_over_layers(entries, part) for part in ("all", *found.phases)
        },
        "all_layers_added_up": summary.of_counts(found.per_layer.sum(axis=0), 0),
        "layers": entries,
        "prefill_decode_divergence_bits": summary.phase_divergence(found),
        "prefill_decode_divergence_floor_bits": summary.phase_floor(found),
        "expert_parallel": parallel,
        "expert_parallel_by_pass": {
            "ranks": ranks,
            **{
                name: pass_balance(log, where, place(found.num_experts, ranks), ranks)
                for name, place in (
                    ("linear", placement.linear),
                    ("round robin", placement.round_robin),
                )
                if ranks
            },
        },
        "cache": _cache(found),
        "coactivation_top_pairs": _top_pairs(found),
        "hot_experts": hot_experts(found),
        "never_used_experts": dead_experts(found),
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
    return Collected(data, found, contaminated, tests)


def verdict(log: RouteLog) -> dict[str, Any]:
    """pass: complete and self-checked; fail: rows are lost; doubtful: anything else."""
    if log.lost_rows:
        word = "fail"
    elif log.suspicions or log.end is None or log.end.self_check != "pass":
        word = "doubtful"
    else:
        word = "pass"
    return {
        "verdict": word,
        "self_check": log.end.self_check if log.end is not None else "absent",
        "lost_rows": log.lost_rows,
        "suspicions": log.suspicions,
        "notes": log.notes,
    }


def pass_balance(log: RouteLog, where: str, rank_of: Any, ranks: int) -> float:
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
                  WHERE {where} AND forward_pass_id IS NOT NULL)
            GROUP BY ALL)
          GROUP BY forward_pass_id, layer)""",  # noqa: S608
        [ranks],
    )
    return float(mean) / float(most) if most else math.nan


def run_facts(log: RouteLog, found: Gathered) -> dict[str, Any]:
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


def hot_experts(found: Gathered, n: int = 20) -> list[dict[str, Any]]:
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


def dead_experts(found: Gathered) -> dict[int, list[int]]:
    """The experts without a choice, by layer; layers that use all are left out."""
    return {
        layer: dead
        for layer, counts in zip(found.layers, found.per_layer, strict=True)
        if (dead := usage.never_used(counts))
    }


def _labels(
    log: RouteLog, outputs: Path | None, tokenizer: Path | None
) -> tuple[vocabulary.Labels | None, str]:
    try:
        paths = vocabulary.find(log.path, log.meta.model_id, outputs, tokenizer)
        return vocabulary.Labels(tokens.request_names(log), *paths), ""
    except vocabulary.UnavailableError as error:
        return None, str(error)


def _tests(found: Gathered, labels: vocabulary.Labels) -> list[token_types.PermutationTest]:
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
    found: Gathered, tests: list[token_types.PermutationTest], skipped: str
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


def _identical(log: RouteLog, contaminated: Gathered | None) -> dict[str, Any] | None:
    runs = log.contamination
    if not runs.rows:
        return None
    return {
        "rows": runs.rows,
        "of_rows": log.num_rows,
        "share": runs.share,
        "longest_run": runs.longest_run,
        "layers": runs.layers,
        "key_figures_with_them": None
        if contaminated is None
        else summary.key_figures(contaminated, summary.expert_parallel(contaminated)),
        "left_out_of_everything_else": contaminated is not None,
    }


def _cache(found: Gathered) -> dict[str, Any]:
    accesses = found.cache_accesses
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = found.cache_hits / accesses[:, None]
    return {
        "policy": "least recently used, kept from token to token and request to request",
        "tokens": found.cache_phase,
        "accesses": accesses,
        "hit_rate_by_layer_and_size": rates,
    }


def _top_pairs(found: Gathered) -> list[dict[str, Any]]:
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
