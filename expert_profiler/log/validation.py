# SPDX-License-Identifier: Apache-2.0
"""Check a run's artifacts, ours or anyone's: the log and what lies beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expert_profiler.artifacts import NAMES, PROMPT_SEPARATOR
from expert_profiler.errors import UserError
from expert_profiler.log import line_file, outputs, row_identity
from expert_profiler.log.findings import Check, check, listed
from expert_profiler.log.route_log import RouteLog, open_log

META_KEYS: dict[str, type | tuple[type, ...]] = {
    "model_id": str,
    "vllm_version": str,
    "torch_version": str,
    "device": str,
    "seed": (int, type(None)),
    "layers_logged": list,
    "top_k": int,
}
#: No metric of a run is larger; a JSON number may be, and then is no float.
_MOST = 10**300
TIMING_KEYS = ("wall_time_sec", "tokens_generated", "tokens_per_sec")


def validate(paths: dict[str, Path]) -> list[Check]:
    """Every check, in a fixed order. ``paths`` has those keys of NAMES that are to be looked at."""
    outputs_path = paths.get("outputs")
    checks: list[Check] = []
    if "routes" in paths:
        with open_log(paths["routes"]) as log:
            checks += _check_log(log)
            checks.append(
                _row_identity(log, outputs_path)
                if outputs_path
                else Check("row identity", "skip", f"no {NAMES['outputs']}")
            )
    else:
        checks.append(Check("route log", "skip", f"no {NAMES['routes']}"))
    for name, key, look in (
        ("prompts", "prompts", lambda path: _prompts(path, outputs_path)),
        ("timing", "timing", _timing),
        ("plot", "hist", _plot),
    ):
        found = look(paths[key]) if key in paths else Check(name, "skip", f"no {NAMES[key]}")
        checks.append(found)
    return checks


# ---- the route log ---------------------------------------------------------------------------


def _check_log(log: RouteLog) -> Iterator[Check]:
    yield _header(log)
    yield _columns(log) if log.is_parquet else _route_lines(log)
    yield from log.checks_of_end
    yield _layers(log)
    yield _expert_ids(log)
    yield _top_k(log)
    yield _weights(log)
    yield from log.checks_of_rows


def _header(log: RouteLog) -> Check:
    for file in log.files:
        raw = file.meta.raw
        where = f"{file.path.name}, line 1"
        for key, kind in META_KEYS.items():
            if key not in raw:
                return Check("header", "FAIL", f"{where}: no key {key!r}")
            if not isinstance(raw[key], kind) or isinstance(raw[key], bool):
                return Check("header", "FAIL", f"{where}: {key} is {json.dumps(raw[key])}")
        if not raw["layers_logged"] or raw["top_k"] < 1:
            return Check("header", "FAIL", f"{where}: no layers or no top_k")
    meta = log.meta
    experts = log.declared_experts or "unstated"
    writer = "public logger" if log.is_public_logger else f"schema {meta.schema_version}"
    detail = f"{meta.model_id}, {writer}, {len(log.layers)} layers, {experts} experts"
    return Check("header", "pass", f"{detail}, top-{meta.top_k}")


def _route_lines(log: RouteLog) -> Check:
    for file in log.files:
        if found := line_file.find_bad_line(file.path, public=log.is_public_logger):
            number, reason = found
            return Check("route lines", "FAIL", f"{file.path.name}, line {number}: {reason}")
    detail = f"{log.num_rows + log.rows_flagged:,} lines with every key and type"
    return _with_optional(detail, absent=log.is_public_logger)


def _columns(log: RouteLog) -> Check:
    """Parquet's own types stand for the keys and types of lines; what is left is what is absent."""
    [(rows, phases, passes)] = log.query(
        "SELECT count(*), count(*) FILTER (phase < 2), count(forward_pass_id) FROM routes"
    )
    absent = log.is_public_logger and (phases, passes) == (0, 0)
    if not absent and (phases, passes) != (rows, rows):
        lacking = f"{rows - phases:,} without a phase, {rows - passes:,} without forward_pass_id"
        return Check("route lines", "FAIL", f"{rows:,} rows, {lacking}")
    parts = sum(len(file.parts) for file in log.files)
    return _with_optional(f"{rows:,} rows of {parts} parts, every column", absent)


def _with_optional(detail: str, absent: bool) -> Check:
    if absent:
        return Check("route lines", "warn", f"{detail}; phase and forward_pass_id absent")
    return Check("route lines", "pass", detail)


def _layers(log: RouteLog) -> Check:
    stated = {layer for file in log.files for layer in file.meta.layers_logged}
    if strangers := sorted(set(log.layers) - stated):
        return Check("layers", "FAIL", f"not in layers_logged: {listed(strangers)}")
    of_layer = log.query("SELECT layer, count(*) FROM routes WHERE NOT flagged GROUP BY layer")
    rows = dict.fromkeys(log.layers, 0) | {int(layer): int(n) for layer, n in of_layer}
    common = max(rows.values())
    short = [f"layer {layer}: {n:,}" for layer, n in rows.items() if n != common]
    detail = f"{len(rows)} layers with {common:,} rows each"
    return check("layers", not short, detail, f"{listed(short)} of {common:,} rows")


def _expert_ids(log: RouteLog) -> Check:
    experts = log.declared_experts
    [(low, high)] = log.query(
        "SELECT min(id), max(id) FROM (SELECT unnest(topk_ids) AS id FROM routes)"
    )
    [(repeated,)] = log.query(
        "SELECT count(*) FROM routes WHERE len(list_distinct(topk_ids)) < len(topk_ids)"
    )
    if low is None:
        return Check("expert ids", "FAIL", "no row has any")
    wrong = []
    if low < 0 or (experts is not None and high >= experts):
        limit = "up" if experts is None else experts - 1
        wrong.append(f"ids {low} to {high}, allowed 0 to {limit}")
    if repeated:
        wrong.append(f"{repeated:,} rows name an expert twice")
    bound = f"{experts} experts" if experts is not None else "number of experts unstated"
    detail = f"{low} to {high} ({bound}), distinct in a row"
    return check("expert ids", not wrong, detail, "; ".join(wrong))


def _top_k(log: RouteLog) -> Check:
    stated = {info.layer: info.top_k for file in log.files for info in file.meta.layers}
    wrong = [
        f"layer {layer}: {rows:,} rows with {length} ids, {wanted} expected"
        for layer, length, rows in log.query(
            "SELECT layer, len(topk_ids), count(*) FROM routes GROUP BY ALL ORDER BY ALL"
        )
        if length != (wanted := stated.get(layer, log.meta.top_k))
    ]
    return check("top-k", not wrong, f"{log.meta.top_k} ids a row", listed(wrong))


def _weights(log: RouteLog) -> Check:
    lengths, values = weight_faults(log)
    wrong = []
    if lengths:
        wrong.append(f"{lengths:,} rows with another number of weights than ids")
    if values:
        wrong.append(f"{values:,} rows with a weight that is negative or not finite")
    return check("weights", not wrong, "one an id, finite, not negative", "; ".join(wrong))


def weight_faults(log: RouteLog) -> tuple[int, int]:
    """Rows with another number of weights than ids, and rows with a weight no router gives.

    Flagged rows are included; a router gives weights that are finite and not negative.
    """
    [(lengths, values)] = log.query(
        "SELECT count(*) FILTER (len(topk_weights) <> len(topk_ids)), "
        "count(*) FILTER (list_count(topk_weights) < len(topk_weights) "
        "OR NOT isfinite(list_sum(topk_weights)) OR list_min(topk_weights) < 0) FROM routes"
    )
    return int(lengths), int(values)


def _row_identity(log: RouteLog, outputs_path: Path) -> Check:
    found = row_identity.identity_of(log, outputs_path)
    formula = f"sum(prompt + generated - 1) of {found.requests} requests"
    if found.cached:
        formula += f" - {found.cached:,} cached"
    per_layer = listed([f"layer {k}: {n:,}" for k, n in found.per_layer.items()], 3)
    return check(
        "row identity",
        found.holds,
        f"{found.expected:,} = {formula}, in each of {len(found.per_layer)} layers",
        f"{found.expected:,} expected = {formula}; {per_layer}; {listed(found.mismatches, 3)}",
    )


# ---- the other artifacts -----------------------------------------------------------------------


def _prompts(path: Path, outputs_path: Path | None) -> Check:
    text = _read(path).decode("utf-8", errors="replace")
    count = len(text.split(PROMPT_SEPARATOR)) if text.strip() else 0
    if outputs_path is None:
        return check("prompts", count > 0, f"{count} prompts, no outputs beside them", "none")
    answered = len(outputs.read_positions(outputs_path))
    return check(
        "prompts", count == answered, f"{count}, one an output", f"{count} for {answered} outputs"
    )


def _timing(path: Path) -> Check:
    try:
        timing = json.loads(_read(path))
    except (RecursionError, ValueError) as error:
        return Check("timing", "FAIL", f"{path.name} is not valid JSON: {error}")
    if not isinstance(timing, dict):
        return Check("timing", "FAIL", f"{path.name} holds no object")
    modes = [mode for mode in ("no_log", "log") if mode in timing]
    one_mode = len(modes) == 1 and timing.get("overhead", "absent") is None
    wrong = [] if one_mode else [f"no {m!r}" for m in ("no_log", "log") if m not in timing]
    for mode in modes:
        wrong += _not_positive(mode, timing[mode])
        repeats = timing[mode].get("repeats") if isinstance(timing[mode], dict) else None
        if not isinstance(repeats or [], list):
            wrong.append(f"{mode}.repeats")
            continue
        for number, run in enumerate(repeats or []):
            wrong += _not_positive(f"{mode}.repeats[{number}]", run)
    if wrong:
        return Check("timing", "FAIL", f"missing or not above 0: {listed(wrong)}")
    rates = ", ".join(f"{mode} {timing[mode]['tokens_per_sec']:,.1f} tokens/s" for mode in modes)
    if one_mode:
        return Check("timing", "warn", f"{rates}; the other mode was not run")
    return Check("timing", "pass", rates)


def _not_positive(name: str, run: Any) -> list[str]:
    """The metrics of a timed run that are no number above 0."""
    metrics = run if isinstance(run, dict) else {}
    return [f"{name}.{key}" for key in TIMING_KEYS if not _positive(metrics.get(key))]


def _positive(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 < value < math.inf
        and (isinstance(value, float) or value < _MOST)
    )


def _plot(path: Path) -> Check:
    data = _read(path)
    whole = data.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR") and data.endswith(b"IEND\xaeB`\x82")
    if not whole:
        return Check("plot", "FAIL", f"{path.name} is not a whole PNG ({len(data):,} bytes)")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return Check("plot", "pass", f"PNG, {width} x {height} pixels")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check: ls -l {path}") from None
