"""``overhead.json`` as tables for the console. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MILLION = 1e6


def table(record: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [
        headline(record["headline"], judged=not record["quick"]),
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


def headline(section: Mapping[str, Any], judged: bool) -> str:
    """The headline case; ``judged``: whether there are pairs enough to hold it to the targets."""
    case = section["case"]
    lines = [
        f"Headline: {case['name']}, {case['output_tokens']} output tokens, "
        f"{section['pairs']} pairs; time / time without a recorder, median (95% interval)",
        f"{'mode':<15}{'wall time':<28}{'first token':<28}{'between tokens':<28}{'target':<8}",
    ]
    for name, item in section["modes"].items():
        ratios = item["ratios"]
        target = "" if item["target"] is None else f"{item['target']:.3f}"
        met = item["meets_target"] if judged else None
        verdict = {None: "", True: " met", False: " MISSED"}[met]
        lines.append(
            f"{name:<15}{ratio_text(ratios['wall']):<28}{ratio_text(ratios['ttft']):<28}"
            f"{ratio_text(ratios['inter_token']):<28}{target}{verdict}"
        )
    return "\n".join(lines)


def matrix(section: Sequence[Mapping[str, Any]]) -> str:
    if not section:
        return ""
    names = list(section[0]["modes"])
    width = max(len(name) for name in names) + 2
    head = "Matrix: wall time / wall time without a recorder, median of "
    lines = [
        f"{head}{section[0]['pairs']} pairs",
        f"{'case':<24}" + "".join(f"{name:>{width}}" for name in names),
    ]
    for item in section:
        figures = [
            f"{item['modes'][name]['ratios']['wall']['paired_ratio_median']:.4f}" for name in names
        ]
        lines.append(f"{item['case']['name']:<24}" + "".join(f"{x:>{width}}" for x in figures))
    return "\n".join(lines)


def processes(section: Mapping[str, Any] | None) -> str:
    if section is None:
        return "Unpatched engines: not run in this form"
    lines = [
        "Unset against unpatched: engines in processes of their own, interleaved passes; ops "
        f"dispatched by two steps: {section['ops']['unpatched']} unpatched, "
        f"{section['ops']['unset']} unset, {section['ops']['armed']} armed"
    ]
    for item in section["cases"]:
        ratios = {name: value["ratios"]["wall"] for name, value in item["modes"].items()}
        told = "; ".join(f"{name} {ratio_text(value)}" for name, value in ratios.items())
        lines.append(f"{item['case']['name']:<24}{told}")
    return "\n".join(lines)


def profile(section: Mapping[str, Any]) -> str:
    parts = ("hook ops", "begin", "snapshot", "count", "enqueue", "end")
    lines = [
        f"Where the time goes: {section['case']['name']}, CPU microseconds of the engine thread a "
        "step (end holds snapshot, count and enqueue), and CPU seconds of the writer",
        f"{'mode':<11}" + "".join(f"{part:>10}" for part in parts)
        + f"{'rows/step':>11}{'writer s/M rows':>17}",
    ]  # fmt: skip
    for name, item in section["modes"].items():
        figures = "".join(
            f"{item['engine_us_per_step'][part]:>10.1f}"
            if part in item["engine_us_per_step"]
            else f"{'-':>10}"
            for part in parts
        )
        writes = item["writer_seconds_per_million_rows"]
        told = f"{writes:>17.2f}" if writes else f"{'-':>17}"
        lines.append(f"{name:<11}{figures}{item['rows_per_step']:>11.0f}{told}")
    return "\n".join(lines)


def cost(section: Mapping[str, Any]) -> str:
    lines = ["Cost = a x steps + b x rows, rows = layers x tokens; least squares over CPU time"]
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
