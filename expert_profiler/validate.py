"""Check a run's artifacts, ours or anyone's: ``python3 -m expert_profiler.validate [--dir DIR]``.

Exit code: 0 every check passed or had nothing to look at; 1 a check failed; 2 unusable input.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expert_profiler import errors
from expert_profiler.errors import UserError
from expert_profiler.log import log_file, part_files

if TYPE_CHECKING:
    from expert_profiler.log.route_log import RouteLog

# "warn": something a public logger's or a one-mode run's artifacts lack by nature.
Verdict = Literal["pass", "FAIL", "skip", "warn"]

NAMES = {
    "routes": "moe_routes.jsonl",
    "outputs": "outputs.jsonl",
    "timing": "timing.json",
    "prompts": "prompts.txt",
    "hist": "expert_hist.png",
}
PARQUET_ROUTES = "moe_routes.parquet"
PROMPT_SEPARATOR = "\n\n---\n\n"
META_KEYS: dict[str, type | tuple[type, ...]] = {
    "model_id": str,
    "vllm_version": str,
    "torch_version": str,
    "device": str,
    "seed": (int, type(None)),
    "layers_logged": list,
    "top_k": int,
}
#: No figure of a run is larger; a JSON number may be, and then is no float.
MOST = 10**300
TIMING_KEYS = ("wall_time_sec", "tokens_generated", "tokens_per_sec")


@dataclass(frozen=True)
class Check:
    name: str
    verdict: Verdict
    detail: str


def validate(paths: dict[str, Path]) -> list[Check]:
    """Every check, in a fixed order. ``paths`` has those keys of NAMES that are to be looked at."""
    checks: list[Check] = []
    if "routes" in paths:
        from expert_profiler.log.route_log import open_log

        with open_log(paths["routes"]) as log:
            checks += _check_log(log)
            checks.append(_row_identity(log, paths.get("outputs")))
    else:
        checks.append(Check("route log", "skip", f"no {NAMES['routes']}"))
    checks.append(_prompts(paths.get("prompts"), paths.get("outputs")))
    checks.append(_timing(paths.get("timing")))
    checks.append(_plot(paths.get("hist")))
    return checks


def main(argv: Sequence[str] | None = None) -> int:
    args = errors.parsed(_parser(), argv)
    checks = validate(_paths(args))
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.verdict:<5} {check.name:<{width}}  {check.detail}")
    tally = Counter(check.verdict for check in checks)
    print(", ".join(f"{n} {verdict}" for verdict, n in tally.most_common()))
    return 1 if tally["FAIL"] else 0


# ---- the route log ---------------------------------------------------------------------------


def _check_log(log: RouteLog) -> Iterator[Check]:
    yield _header(log)
    yield _route_lines(log)
    yield from _end_record(log)
    yield _layers(log)
    yield _expert_ids(log)
    yield _top_k(log)
    yield _weights(log)
    rows = f"{log.num_rows:,} rows"
    repeats = log.duplicates()
    yield _verdict(
        "no duplicates",
        not repeats,
        f"{rows}, each (request, position, layer) once",
        f"{repeats:,} of {rows} repeat a (request, position, layer)",
    )
    runs = log.contamination
    yield _verdict(
        "no warm-up rows",
        not runs.rows,
        "no long run of identical rows",
        f"{runs.rows:,} of {rows} ({runs.share:.1%}) in runs of identical rows, "
        f"longest {runs.longest_run:,}, in layers {_listed(runs.layers)}",
    )


def _header(log: RouteLog) -> Check:
    for file in log.files:
        raw = file.meta.raw
        for key, kind in META_KEYS.items():
            if key not in raw:
                return Check("header", "FAIL", f"{file.path.name}, line 1: no key {key!r}")
            if not isinstance(raw[key], kind) or isinstance(raw[key], bool):
                found = json.dumps(raw[key])
                return Check("header", "FAIL", f"{file.path.name}, line 1: {key} is {found}")
        if not raw["layers_logged"] or raw["top_k"] < 1:
            return Check("header", "FAIL", f"{file.path.name}, line 1: no layers or no top_k")
    meta = log.meta
    experts = log.declared_experts or "unstated"
    writer = "public logger" if log.is_public_logger else f"schema {meta.schema_version}"
    detail = f"{meta.model_id}, {writer}, {len(log.layers)} layers, {experts} experts"
    return Check("header", "pass", f"{detail}, top-{meta.top_k}")


def _route_lines(log: RouteLog) -> Check:
    if log.is_parquet:
        return _columns(log)
    for file in log.files:
        if found := log_file.find_bad_line(file.path, public=log.is_public_logger):
            number, reason = found
            return Check("route lines", "FAIL", f"{file.path.name}, line {number}: {reason}")
    detail = f"{log.num_rows + log.rows_flagged:,} lines with every key and type"
    if log.is_public_logger:
        return Check("route lines", "warn", f"{detail}; phase and forward_pass_id absent")
    return Check("route lines", "pass", detail)


def _columns(log: RouteLog) -> Check:
    """Parquet's own types stand for the keys and types of lines; what is left is what is absent."""
    [(rows, phases, passes)] = log.query(
        "SELECT count(*), count(*) FILTER (phase < 2), count(forward_pass_id) FROM routes"
    )
    detail = f"{rows:,} rows of {sum(len(file.parts) for file in log.files)} parts, every column"
    if log.is_public_logger and (phases, passes) == (0, 0):
        return Check("route lines", "warn", f"{detail}; phase and forward_pass_id absent")
    if (phases, passes) != (rows, rows):
        lacking = f"{rows - phases:,} without a phase, {rows - passes:,} without forward_pass_id"
        return Check("route lines", "FAIL", f"{rows:,} rows, {lacking}")
    return Check("route lines", "pass", detail)


def _end_record(log: RouteLog) -> Iterator[Check]:
    names = ("complete", "nothing dropped", "self-check", "end totals")
    broken = [file.path.name for file in log.files if not file.finished]
    if log.end is None or broken:
        # A public logger writes no end record, but an unfinished line is a loss all the same.
        absent = log.is_public_logger and not any(file.partial_bytes for file in log.files)
        detail = "; ".join(log.lost_rows) or "end record absent: loss cannot be ruled out"
        yield Check(names[0], "warn" if absent else "FAIL", detail)
        yield from (Check(name, "skip", "no end record") for name in names[1:])
        return
    end = log.end
    yield Check(names[0], "pass", f"end record present, reason {end.reason!r}")
    causes = ", ".join(f"{cause} {n:,}" for cause, n in end.drops.items()) or "no causes listed"
    yield _verdict(names[1], not end.dropped, causes, causes)
    failed = "; ".join(end.failed_checks) or f"verdict {end.self_check!r}"
    yield _verdict(names[2], end.self_check == "pass", "the recorder's own verdict: pass", failed)
    wrong = [
        f"{what}: {said:,} said, {held:,} found"
        for what, said, held in _totals(log)
        if said != held
    ]
    detail = f"rows {end.rows:,}, flagged {end.rows_flagged:,}, bytes as found"
    yield _verdict(names[3], not wrong, detail, "; ".join(wrong))


def _totals(log: RouteLog) -> Iterator[tuple[str, int, int]]:
    """What the end records say beside what the files hold."""
    if log.end is not None:
        yield "rows", log.end.rows, log.num_rows + log.rows_flagged
        yield "flagged rows", log.end.rows_flagged, log.rows_flagged
    for file in log.files:
        size = file.end.raw.get("bytes") if file.end else None
        if isinstance(size, int):
            yield f"bytes of {file.path.name}", size, file.end_offset


def _layers(log: RouteLog) -> Check:
    rows = dict.fromkeys(log.layers, 0)
    rows |= {
        int(layer): int(n)
        for layer, n in log.query(
            "SELECT layer, count(*) FROM routes WHERE NOT flagged GROUP BY layer"
        )
    }
    stated = {layer for file in log.files for layer in file.meta.layers_logged}
    strangers = sorted(rows.keys() - stated)
    if strangers:
        return Check("layers", "FAIL", f"not in layers_logged: {_listed(strangers)}")
    common = max(rows.values())
    short = [f"layer {layer}: {n:,}" for layer, n in rows.items() if n != common]
    detail = f"{len(rows)} layers with {common:,} rows each"
    return _verdict("layers", not short, detail, f"{_listed(short)} of {common:,} rows")


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
    return _verdict(
        "expert ids", not wrong, f"{low} to {high} ({bound}), distinct in a row", "; ".join(wrong)
    )


def _top_k(log: RouteLog) -> Check:
    stated = {info.layer: info.top_k for file in log.files for info in file.meta.layers}
    wrong = []
    for layer, length, rows in log.query(
        "SELECT layer, len(topk_ids), count(*) FROM routes GROUP BY ALL ORDER BY ALL"
    ):
        wanted = stated.get(layer, log.meta.top_k)
        if length != wanted:
            wrong.append(f"layer {layer}: {rows:,} rows with {length} ids, {wanted} expected")
    return _verdict("top-k", not wrong, f"{log.meta.top_k} ids a row", _listed(wrong))


def _weights(log: RouteLog) -> Check:
    lengths, values = log.weight_faults()
    wrong = [
        f"{n:,} rows {what}"
        for n, what in (
            (lengths, "with another number of weights than ids"),
            (values, "with a weight that is negative or not finite"),
        )
        if n
    ]
    return _verdict("weights", not wrong, "one an id, finite, not negative", "; ".join(wrong))


def _row_identity(log: RouteLog, outputs: Path | None) -> Check:
    name = "row identity"
    if outputs is None:
        return Check(name, "skip", f"no {NAMES['outputs']}")
    found = log.identity(outputs)
    formula = f"sum(prompt + generated - 1) of {found.requests} requests"
    if found.cached:
        formula += f" - {found.cached:,} cached"
    per_layer = _listed([f"layer {k}: {n:,}" for k, n in found.per_layer.items()], 3)
    return _verdict(
        name,
        found.holds,
        f"{found.expected:,} = {formula}, in each of {len(found.per_layer)} layers",
        f"{found.expected:,} expected = {formula}; {per_layer}; {_listed(found.mismatches, 3)}",
    )


# ---- the other artifacts -----------------------------------------------------------------------


def _prompts(prompts: Path | None, outputs: Path | None) -> Check:
    if prompts is None:
        return Check("prompts", "skip", f"no {NAMES['prompts']}")
    text = _read(prompts).decode("utf-8", errors="replace")
    count = len(text.split(PROMPT_SEPARATOR)) if text.strip() else 0
    if outputs is None:
        return _verdict("prompts", count > 0, f"{count} prompts, no outputs beside them", "none")
    from expert_profiler.log.outputs import read_outputs

    answered = len(read_outputs(outputs))
    return _verdict(
        "prompts", count == answered, f"{count}, one an output", f"{count} for {answered} outputs"
    )


def _timing(path: Path | None) -> Check:
    if path is None:
        return Check("timing", "skip", f"no {NAMES['timing']}")
    try:
        timing = json.loads(_read(path))
    except (RecursionError, ValueError) as error:
        return Check("timing", "FAIL", f"{path.name} is not valid JSON: {error}")
    if not isinstance(timing, dict):
        return Check("timing", "FAIL", f"{path.name} holds no object")
    modes = [mode for mode in ("no_log", "log") if mode in timing]
    wrong = [f"no {mode!r}" for mode in ("no_log", "log") if mode not in timing]
    one_mode = len(modes) == 1 and timing.get("overhead", "absent") is None
    if one_mode:
        wrong = []
    for mode in modes:
        runs = timing[mode] if isinstance(timing[mode], dict) else {}
        wrong += [f"{mode}.{key}" for key in TIMING_KEYS if not _positive(runs.get(key))]
        repeats = runs.get("repeats") or []
        if not isinstance(repeats, list):
            wrong.append(f"{mode}.repeats")
            continue
        for number, run in enumerate(repeats):
            figures = run if isinstance(run, dict) else {}
            wrong += [
                f"{mode}.repeats[{number}].{key}"
                for key in TIMING_KEYS
                if not _positive(figures.get(key))
            ]
    if wrong:
        return Check("timing", "FAIL", f"missing or not above 0: {_listed(wrong)}")
    rates = ", ".join(f"{mode} {timing[mode]['tokens_per_sec']:,.1f} tokens/s" for mode in modes)
    if one_mode:
        return Check("timing", "warn", f"{rates}; the other mode was not run")
    return Check("timing", "pass", rates)


def _plot(path: Path | None) -> Check:
    if path is None:
        return Check("plot", "skip", f"no {NAMES['hist']}")
    data = _read(path)
    whole = data.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR") and data.endswith(b"IEND\xaeB`\x82")
    if not whole:
        return Check("plot", "FAIL", f"{path.name} is not a whole PNG ({len(data):,} bytes)")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return Check("plot", "pass", f"PNG, {width} x {height} pixels")


def _positive(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 < value < math.inf
        and (isinstance(value, float) or value < MOST)
    )


# ---- the command line --------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m expert_profiler.validate",
        description="Check a run's artifacts. Without options: those in the current folder.",
    )
    parser.add_argument("--dir", type=Path, help="look here for whatever is not named below")
    for key, name in NAMES.items():
        parser.add_argument(f"--{key}", type=Path, metavar="FILE", help=f"default: DIR/{name}")
    return parser


def _paths(args: argparse.Namespace) -> dict[str, Path]:
    """The artifacts to look at: those named, and those that exist in the folder."""
    named = {key: getattr(args, key) for key in NAMES if getattr(args, key) is not None}
    for key, path in named.items():
        if not (path.is_file() or (key == "routes" and path.is_dir())):
            raise UserError(f"no file {path}; make the artifacts with: ./test.sh")
    folder = args.dir if args.dir is not None or named else Path()
    found = {}
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"no directory {folder}; name the one with the artifacts: --dir DIR")
        found = {key: folder / name for key, name in NAMES.items() if (folder / name).is_file()}
        if "routes" not in found and part_files.is_dataset(folder / PARQUET_ROUTES):
            found["routes"] = folder / PARQUET_ROUTES
        if not found | named:
            raise UserError(f"no artifacts in {folder.absolute()}; make them with: ./test.sh")
    return found | named


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check: ls -l {path}") from None


def _verdict(name: str, good: bool, passed: str, failed: str) -> Check:
    return Check(name, "pass", passed) if good else Check(name, "FAIL", failed)


def _listed(items: Sequence[object], limit: int = 6) -> str:
    text = ", ".join(map(str, items[:limit]))
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"


if __name__ == "__main__":
    sys.exit(errors.run(main))
