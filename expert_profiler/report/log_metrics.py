# SPDX-License-Identifier: Apache-2.0
"""Every metric of a report as one dictionary, ready for JSON. Pure: counts in, numbers out.

Metrics of "all layers" are means over layers of the layer's own metric. Adding up the counts of
layers evens out what single layers do, because experts of one id in two layers are unrelated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from expert_profiler.log.token_counts import TokenCounts
from expert_profiler.metrics import (
    coactivation,
    placement,
    resampling,
    reuse,
    token_types,
    topk_normalised,
    usage,
)
from expert_profiler.metrics.divergence import js_divergence_bits
from expert_profiler.metrics.usage import Counts1D

EP_SIZES = (2, 4, 8, 16, 32, 64)
KEY_RANKS = 8
TOP_SHARE = 0.10  # "the hottest tenth" of the experts

Array = npt.NDArray[Any]


def hottest(num_experts: int) -> int:
    """How many experts are the hottest tenth: at least one."""
    return max(1, round(TOP_SHARE * num_experts))


def distribution_metrics(counts: Counts1D, top_k: int) -> dict[str, float]:
    """Every metric of one distribution. counts: [experts] of a layer with this top_k."""
    tenth = hottest(len(counts))
    metrics = {
        "choices": float(counts.sum()),
        "entropy_bits": usage.entropy_bits(counts) if counts.any() else math.nan,
        "normalised_entropy": usage.normalised_entropy(counts) if counts.any() else math.nan,
        "effective_experts": usage.effective_experts(counts) if counts.any() else math.nan,
        "gini": usage.gini(counts),
        "max_over_mean": usage.max_over_mean(counts),
        "coefficient_of_variation": usage.coefficient_of_variation(counts),
        "share_of_hottest_tenth": usage.share_of_top(counts, tenth),
        "experts_to_cover_half": float(usage.experts_to_cover(counts, 0.5)),
        "never_used": float(len(usage.never_used(counts))),
    }
    if top_k:
        metrics |= {
            "topk_entropy_lack": topk_normalised.entropy_lack(counts, top_k),
            "topk_excess_peak": topk_normalised.excess_peak(counts, top_k),
            "topk_gini": topk_normalised.gini(counts, top_k),
            "topk_coefficient_of_variation": topk_normalised.coefficient_of_variation(
                counts, top_k
            ),
        }
    return metrics


def by_layer(found: TokenCounts) -> list[dict[str, Any]]:
    """One entry a layer: its metrics over all rows and by phase."""
    entries = []
    for number, (layer, top_k) in enumerate(zip(found.layers, found.top_k, strict=True)):
        entry: dict[str, Any] = {
            "layer": layer,
            "top_k": top_k,
            "rows": int(found.rows[number].sum()),
            "all": distribution_metrics(found.per_layer[number], top_k),
        }
        for p, phase in enumerate(found.phases):
            entry[phase] = distribution_metrics(found.counts[number, p], top_k)
        entry["next_token_reuse"] = reuse_metrics(found, number)
        entry["coactivation_bits"] = coactivation.pair_information_bits(found.pairs[number])
        entry["coactivation_chance_bits"] = coactivation.pair_chance_bits(found.pairs[number])
        if number < len(found.transitions):
            entry["transition_bits"] = token_types.mutual_information_bits(
                found.transitions[number]
            )
            entry["transition_chance_bits"] = token_types.chance_bits(found.transitions[number])
        entries.append(entry)
    return entries


def reuse_metrics(found: TokenCounts, number: int) -> dict[str, float]:
    """Next-token reuse of one layer: by phase, beside what popularity alone and even use give."""
    top_k = found.top_k[number]
    if not top_k:
        return {}
    rows = int(found.rows[number].sum())
    answer = {
        phase: float(found.shared[number, p]) / (top_k * float(n)) if n else math.nan
        for p, (phase, n) in enumerate(zip(found.phases, found.neighbours[number], strict=True))
    }
    pairs = float(found.neighbours[number].sum())
    answer["all"] = float(found.shared[number].sum()) / (top_k * pairs) if pairs else math.nan
    answer["chance"] = reuse.chance_reuse(found.per_layer[number], rows)
    answer["even"] = reuse.even_reuse(found.num_experts, top_k)
    return answer


def mean_over_layers(entries: list[dict[str, Any]], part: str = "all") -> dict[str, float]:
    """The mean of every metric over the layers that have it; counts of choices are added."""
    values = [entry[part] for entry in entries if part in entry]
    names = list(dict.fromkeys(name for metrics in values for name in metrics))
    answer = {}
    for name in names:
        known = [f[name] for f in values if name in f and not math.isnan(f[name])]
        if name == "choices":
            answer[name] = sum(known)
        else:
            answer[name] = sum(known) / len(known) if known else math.nan
    return answer


# ---- metrics of [layers, experts] counts, for resampling ---------------------------------------


def layer_mean(metric: Callable[[Counts1D], float]) -> Callable[[Array], float]:
    """The mean over layers with counts of ``metric``: [layers, experts] -> one number."""

    def mean(counts: Array) -> float:
        values = [metric(row) for row in counts if row.any()]
        return float(np.mean(values)) if values else math.nan

    return mean


def key_metrics(found: TokenCounts, parallel: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The five metrics that matter, each with unit, range, formula and 95% interval."""
    groups, experts = found.layer_groups, found.num_experts
    tenth, ranks = hottest(experts), key_ranks(experts)
    per_layer = found.per_layer

    def percent(
        name: str, metric: Callable[[Counts1D], float], least: float, **told: str
    ) -> dict[str, Any]:
        mean = layer_mean(metric)
        low, high = resampling.bootstrap_interval(groups, mean, bounds=(least, 1))
        value = 100 * mean(per_layer)
        return {"name": name, "value": value, "ci95": [100 * low, 100 * high], **told}

    answer = [
        percent(
            "effective experts",
            lambda counts: usage.effective_experts(counts) / experts,
            1 / experts,
            unit="% of the experts",
            range=f"{100 / experts:.3g} (one expert takes all) to 100 (even use)",
            formula="2^H / experts, H = entropy of a layer's choices in bits; mean over layers",
        ),
        percent(
            "load of the hottest tenth",
            lambda counts: usage.share_of_top(counts, tenth),
            0,
            unit="% of the choices",
            range=f"{100 * tenth / experts:.3g} (even use) to 100",
            formula=f"choices of a layer's {tenth} busiest of {experts} experts / all choices; "
            "mean over layers",
        ),
        {
            "name": "never used",
            "value": float((per_layer == 0).sum()),
            "unit": f"of {per_layer.size:,} experts of all layers",
            "ci95": None,
            "range": f"0 to {per_layer.size:,}",
            "formula": "experts with no choice, counted in each layer and added up",
        },
        _phase_metric(found),
    ]
    if ranks:
        rank_of = placement.linear(experts, ranks)
        spread = next(
            e for e in parallel if (e["ranks"], e["placement"]) == (ranks, "greedy with copies")
        )
        answer.append(
            percent(
                f"balance over {ranks} ranks",
                lambda counts: float(
                    placement.balance(placement.rank_loads(counts, rank_of, ranks))
                ),
                1 / ranks,
                unit=f"% ({100 * spread['balance']:.3g}% with {spread['copies']} copies of hot "
                "experts)",
                range=f"{100 / ranks:.3g} (one rank does all) to 100 (even)",
                formula="mean / max of the ranks' choices, experts in linear order; "
                "mean over layers",
            )
        )
    return answer


def key_ranks(num_experts: int) -> int:
    """The EP size of the key metric: 8, or the largest offered one that fewer experts allow."""
    return max((n for n in EP_SIZES if n <= min(KEY_RANKS, num_experts)), default=0)


def _phase_metric(found: TokenCounts) -> dict[str, Any]:
    value, ci95, unit = math.nan, None, "bits"
    if places := _phase_places(found):

        def distance(counts: Array) -> float:
            return _mean_bits(counts[:, 0], counts[:, 1])

        groups = found.by_group[:, :, places]
        value = distance(groups.sum(axis=0))
        ci95 = list(resampling.bootstrap_interval(groups, distance, bounds=(0, 1)))
        floor = phase_floor(found)
        if not math.isnan(floor):
            unit = f"bits (two halves of one phase: {floor:.2g})"
    return {
        "name": "prefill against decode",
        "value": value,
        "ci95": ci95,
        "unit": unit,
        "range": "0 (the same) to 1 (no expert in common)",
        "formula": "Jensen-Shannon divergence of a layer's choices in prefill and in decode; "
        "mean over layers",
    }


def _phase_places(found: TokenCounts) -> list[int]:
    """The indices of prefill and decode; empty where the log does not say the phase."""
    known = ("prefill", "decode")
    return [found.phases.index(p) for p in known] if set(known) <= set(found.phases) else []


def _mean_bits(a: Array, b: Array) -> float:
    """The mean over layers of the Jensen-Shannon divergence. a, b: [layers, experts]."""
    bits = js_divergence_bits(a, b)
    return float(np.nanmean(bits)) if not np.isnan(bits).all() else math.nan


def phase_divergence(found: TokenCounts) -> Array:
    """[layers] float64 bits: Jensen-Shannon divergence of prefill and decode."""
    return js_divergence_bits(found.phase("prefill"), found.phase("decode"))


def phase_floor(found: TokenCounts) -> float:
    """What chance gives at most: the divergence of two halves of the requests in one phase.

    Of the phase with fewer choices, every second request against the others, mean over layers; each
    half is smaller than either phase, so this is above the true floor. NaN below 2 requests.
    """
    places = _phase_places(found)
    if not places or len(found.by_group) < 2:
        return math.nan
    smaller = min(places, key=lambda p: int(found.counts[:, p].sum()))
    return _mean_bits(*(found.by_group[half::2, :, smaller].sum(axis=0) for half in (0, 1)))


# ---- expert parallelism ------------------------------------------------------------------------

#: Placements that need no counts: (experts, ranks) -> [experts] the rank of each.
FIXED = {"linear": placement.linear, "round robin": placement.round_robin}


def expert_parallel(found: TokenCounts) -> list[dict[str, Any]]:
    """Balance of each EP size and placement: mean over layers, and the worst layer.

    The fixed placements need no counts. The greedy ones are planned on every second request and
    measured on the others, as a plan is made on yesterday's traffic; with one request, on itself.
    """
    groups, experts = found.layer_groups, found.num_experts
    alone = len(groups) < 2
    plan_on = groups[0::2].sum(axis=0)
    measure_on = plan_on if alone else groups[1::2].sum(axis=0)
    used = plan_on.any(axis=1) & measure_on.any(axis=1)
    answer: list[dict[str, Any]] = []

    def add(ranks: int, name: str, balances: Array, copies: int = 0, **facts: bool) -> None:
        known = balances[~np.isnan(balances)]
        answer.append(
            {
                "ranks": ranks,
                "placement": name,
                "balance": float(known.mean()) if len(known) else math.nan,
                "worst_layer": float(known.min()) if len(known) else math.nan,
                "copies": copies,
                **facts,
            }
        )

    for ranks in (size for size in EP_SIZES if size <= experts):
        for name, place in FIXED.items():
            loads = placement.rank_loads(found.per_layer, place(experts, ranks), ranks)
            add(ranks, name, placement.balance(loads))
        extra = placement.fewest_extra(experts, ranks)
        for name, copies in (("greedy", extra - ranks), ("greedy with copies", extra)):
            plans = [placement.replicated(counts, ranks, copies) for counts in plan_on[used]]
            measured = zip(plans, measure_on[used], strict=True)
            loads = np.array([plan.loads(counts) for plan, counts in measured])
            balances = placement.balance(loads.reshape(-1, ranks))
            add(ranks, name, balances, copies, planned_on_other_requests=not alone)
    return answer
