# SPDX-License-Identifier: Apache-2.0
"""Compare logs: another model, quantization, precision, workload or top-k.

    expert-profiler compare A.jsonl B.jsonl [C.jsonl …] --out DIR
    expert-profiler compare gptq full --out DIR

A preset of ``profile`` in place of a log is profiled first, into DIR/PRESET, once.

Every log is compared with the first. Where layers and experts are the same, expert by expert:
Jensen-Shannon divergence with a permutation test over requests, rank correlation, overlap of the
hottest, a map of the differences. All of them by metrics that allow for another top_k and another
number of experts. Writes compare.html and compare.json.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from expert_profiler import errors, files, resources
from expert_profiler.artifacts import NAMES
from expert_profiler.errors import UserError
from expert_profiler.run import models

PAGES = ("compare.html", "compare.json")
PHASES = ("all", "prefill", "decode")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="expert-profiler compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="next: open DIR/compare.html; expert-profiler report LOG --out DIR",
    )
    presets = ", ".join(models.PRESETS)
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG", help=f"two or more, or presets: {presets}")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    add("--names", metavar="A,B", help="short names for tables and charts")
    add("--phase", choices=PHASES, default="all", help="rows to compare [all]")
    add("--force", action="store_true", help="replace an existing comparison")
    args = errors.parsed(parser, argv)
    if len(args.logs) < 2:
        raise UserError("one log can't be compared; name two or more")
    names = short_names(args.logs, args.names)
    files.prepare(args.out, PAGES, args.force, "--out")
    logs = [_recorded(log, args.out) for log in args.logs]
    from tqdm import tqdm

    from expert_profiler.report import comparison, comparison_page, page

    runs = []
    with tqdm(total=len(logs), desc="reading", unit="log", delay=2) as progress:
        for path, name in zip(logs, names, strict=True):
            runs.append(comparison.read_run(path, name))
            progress.update()
    data = comparison.compared(runs, args.phase)
    files.write(args.out / PAGES[1], page.as_json(data))
    files.write(args.out / PAGES[0], comparison_page.html(data, runs))
    print(comparison.table(data))
    for run in runs:
        for note in run.verdict["notes"]:
            print(f"{'note':<12}{run.name}: {note}")
    print(f"{'report':<12}{args.out / PAGES[0]} (and {PAGES[1]})")
    print(f"next: {resources.program()} report {shlex.quote(str(logs[0]))} --out DIR")
    return 1 if any(run.verdict["verdict"] == "fail" for run in runs) else 0


def _recorded(log: Path, out: Path) -> Path:
    """The log itself, or the one of the preset of that name, made where it is missing."""
    if str(log) not in models.PRESETS or log.exists():
        return log
    folder = out / log
    routes = folder / NAMES["routes"]
    if not routes.exists():
        command = [sys.executable, "-m", "expert_profiler", "profile", "--model", str(log)]
        command += ["--out", str(folder), "--mode", "log", "--repeats", "1"]
        print(f"profiling: {shlex.join(command)}", file=sys.stderr)
        code = subprocess.run(command, check=False).returncode
        if code:
            raise UserError(
                f"it ended with exit code {code} for {log}; "
                f"see its message above, or run it: {shlex.join(command)}"
            )
    return routes


def short_names(logs: Sequence[Path], given: str | None) -> list[str]:
    """The given names, or the shortest ends of the paths that differ.

    Raises:
        UserError: the given ones are not one a log, all different.
    """
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        if len(names) != len(logs) or len(set(names)) != len(names) or not all(names):
            raise UserError(f"--names needs {len(logs)} different names with commas between them")
        return names
    for length in (1, 2, 3):
        short = ["/".join(path.parts[-length:]) for path in logs]
        if len(set(short)) == len(short):
            return short
    return [f"{number}: {path.name}" for number, path in enumerate(logs, start=1)]
