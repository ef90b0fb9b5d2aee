# SPDX-License-Identifier: Apache-2.0
"""``overhead.json`` as tables for the console. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MILLION = 1e6


def table(record: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [
        headline(record["headline"], record["profile"], judged=not record["quick"]),
        matrix(record["matrix"]),
        processes(record["processes"]),
        profile(record["profile"]),
        cost(record["fit"]),
        writer(record["writer"]),
    ]
    return "\n\n".join(part for part in parts if part)


def ratio_text(ratio: Mapping[str, Any]) -> str:
    low, high = ratio["paired_ratio_ci95"]
    return f"{ratio['paired_ratio_median']:.4f} ({low:.4f} to {high:.4f})"


def accounted_text(ratios: Mapping[str, float]) -> str:
    return f"{ratios['least']:.4f} to {ratios['most']:.4f}"


def headline(section: Mapping[str, Any], profile: Mapping[str, Any], judged: bool) -> str:
    """The headline case; ``judged``: whether there are pairs enough to hold it to the targets."""
    case = section["case"]
    lines = [
        f"Headline: {case['name']}, {case['output_tokens']} output tokens, {section['pairs']} "
        "pairs; time / time without a recorder, median (95% interval), and what the recorder's own "
        "clocks account for: the engine thread alone, and with all of the writer's CPU time",
        f"{'mode':<11}{'wall time':<27}{'accounted for':<19}{'target':<14}{'first token':<27}"
        "between tokens",
    ]
    for name, item in section["modes"].items():
        ratios, target = item["ratios"], ""
        own = profile["modes"].get(name)
        if item["target"] is not None:
            told = {"yes": " met", "no": " MISSED", "open": " open"}[item["meets_target"]]
            target = f"{item['target']:.3f}{told if judged else ''}"
        lines.append(
            f"{name:<11}{ratio_text(ratios['wall']):<27}"
            f"{accounted_text(own['accounted']) if own else '':<19}{target:<14}"
            f"{ratio_text(ratios['ttft']):<27}{ratio_text(ratios['inter_token'])}"
        )
    if judged:
        lines.append("open: the interval of the wall time holds the target, so it can't tell")
    return "\n".join(lines)


def matrix(section: Sequence[Mapping[str, Any]]) -> str:
    if not section:
        return ""
    names = list(dict.fromkeys(name for item in section for name in item["modes"]))
    width = max(len(name) for name in names) + 2
    lines = [
        "Matrix: wall time / wall time without a recorder, median of pairs",
        f"{'case':<24}{'pairs':<7}" + "".join(f"{name:>{width}}" for name in names),
    ]
    for item in section:
        ratios = {name: mode["ratios"]["wall"] for name, mode in item["modes"].items()}
        told = [
            f"{ratios[name]['paired_ratio_median']:.4f}" if name in ratios else "-"
            for name in names
        ]
        lines.append(
            f"{item['case']['name']:<24}{item['pairs']:<7}"
            + "".join(f"{text:>{width}}" for text in told)
        )
    return "\n".join(lines)


def processes(section: Mapping[str, Any] | None) -> str:
    if section is None:
        return "Unpatched engines: not run in this form"
    lines = [
        "Unset against unpatched: engines in processes of their own, interleaved passes; ops "
        f"dispatched by two steps: {section['ops']['unpatched']} unpatched, "
        f"{section['ops']['unset']} unset, {section['ops']['armed']} armed"
    ]
    ratios = {name: value["ratios"]["wall"] for name, value in section["modes"].items()}
    told = "; ".join(f"{name} {ratio_text(value)}" for name, value in ratios.items())
    lines.append(f"{section['case']['name']}, {section['pairs']} pairs: {told}")
    return "\n".join(lines)


def profile(section: Mapping[str, Any]) -> str:
    parts = ("hook ops", "begin", "snapshot", "count", "enqueue", "end")
    lines = [
        f"Where the time goes: {section['case']['name']}, {section['case']['output_tokens']} "
        "output tokens; microseconds of the engine thread a step "
        "(end holds snapshot, count and enqueue), milliseconds a recording, CPU seconds of the "
        "writer",
        f"{'mode':<11}" + "".join(f"{part:>10}" for part in parts)
        + f"{'start ms':>10}{'stop ms':>9}{'rows/step':>11}{'writer s/M rows':>17}",
    ]  # fmt: skip
    for name, item in section["modes"].items():
        told = "".join(
            f"{item['engine_us_per_step'][part]:>10.1f}"
            if part in item["engine_us_per_step"]
            else f"{'-':>10}"
            for part in parts
        )
        once = item["start_stop_seconds"]
        writes = item["writer_seconds_per_million_rows"]
        speed = f"{writes:>17.2f}" if writes else f"{'-':>17}"
        lines.append(
            f"{name:<11}{told}{once['start'] * 1e3:>10.1f}{once['stop'] * 1e3:>9.1f}"
            f"{item['rows_per_step']:>11.0f}{speed}"
        )
    return "\n".join(lines)


def cost(section: Mapping[str, Any]) -> str:
    lines = ["Cost = a x steps + b x rows, rows = layers x tokens; least squares"]
    for name, fit in section.items():
        lines.append(
            f"{name:<24}a {fit['seconds_per_step'] * 1e6:8.1f} us/step   "
            f"b {fit['seconds_per_row'] * 1e6:7.3f} us/row   R2 {fit['r2']:.4f}   "
            f"{len(fit['points'])} points"
        )
    return "\n".join(lines)


def writer(section: Mapping[str, Any]) -> str:
    layers, experts, top_k = section["shape"]
    lines = [f"Writer alone, synthetic {layers} layers x {experts} experts x top-{top_k}"]
    for name, target in (("parquet", 1.5), ("jsonl", 0.4)):
        item = section[name]
        rate = item["rows_per_cpu_second"] / MILLION
        met = "met" if rate >= target else "MISSED"
        lines.append(
            f"{name:<10}{rate:.2f} M rows a core second ({item['rows_per_second'] / MILLION:.2f} M "
            f"a wall second), {item['bytes'] / item['rows']:.1f} B a row; target {target} M {met}"
        )
    item = section["sustained"]
    lost = sum(item["drops"].values())
    lines.append(
        f"sustained {item['rows_per_second'] / 1e3:.0f} k rows/s for {item['seconds']:.0f} s to "
        f"Parquet: {lost} rows dropped, queue at most "
        f"{item['most_waiting_bytes'] / 2**20:.1f} of {item['queue_bytes'] / 2**20:.0f} MiB"
    )
    for name, told in (
        ("memory", f"{section['memory']['simulated_minutes']:g} simulated minutes, queue full"),
        ("worst_memory", f"{layers} x {experts} x top-{top_k}, queue full"),
    ):
        item = section[name]
        verdict = "met" if item["within_bound"] else "MISSED"
        lines.append(
            f"memory    {told}, {item['rows']:,} rows: {item['recorder_bytes'] / 2**20:.0f} MiB, "
            f"bound {item['bound_bytes'] / 2**20:.0f} MiB {verdict}; growth over the second half "
            f"{item['growth_bytes'] / 2**20:+.1f} MiB"
        )
    return "\n".join(lines)
