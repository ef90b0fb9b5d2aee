"""Do two or more logs route alike? Another model, quantization, precision, workload or top_k.

    python -m expert_profiler.compare A.jsonl B.jsonl [C.jsonl …] --out DIR
    python -m expert_profiler.compare gptq full --out DIR

A preset of run_profile.py in place of a log is profiled first, into DIR/PRESET, once.

Every log is compared with the first. Where layers and experts are the same, expert by expert:
Jensen-Shannon divergence with a permutation test over requests, rank correlation, overlap of the
hottest, a map of the differences. All of them by figures that allow for another top_k and another
number of experts. Writes compare.html and compare.json.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from expert_profiler import errors
from expert_profiler.errors import UserError
from expert_profiler.report import page
from expert_profiler.run import models

NAMES = ("compare.html", "compare.json")
PHASES = ("all", "prefill", "decode")


def main(argv: list[str] | None = None) -> int:
    args = errors.parsed(_parser(), argv)
    if len(args.logs) < 2:
        raise UserError("one log can't be compared; name two or more")
    names = _names(args.logs, args.names)
    page.prepare(args.out, NAMES, args.force, "--out")
    logs = [_recorded(log, args.out) for log in args.logs]
    from tqdm import tqdm

    from expert_profiler.report import comparison_page
    from expert_profiler.report.comparison import compared, read_run, table

    runs = []
    with tqdm(total=len(logs), desc="reading", unit="log", delay=2) as progress:
        for path, name in zip(logs, names, strict=True):
            runs.append(read_run(path, name))
            progress.update()
    data = compared(runs, args.phase)
    page.write(args.out / NAMES[1], page.as_json(data))
    page.write(args.out / NAMES[0], comparison_page.html(data, runs))
    print(table(data))
    for run in runs:
        for note in run.verdict["notes"]:
            print(f"{'note':<12}{run.name}: {note}")
    print(f"{'report':<12}{args.out / NAMES[0]} (and {NAMES[1]})")
    print(f"next: python3 make_hist.py {shlex.quote(str(logs[0]))} --report DIR")
    return 1 if any(run.verdict["verdict"] == "fail" for run in runs) else 0


def _recorded(log: Path, out: Path) -> Path:
    """The log itself, or the one of the preset of that name, made where it is missing."""
    if str(log) not in models.PRESETS or log.exists():
        return log
    folder = out / log
    routes = folder / "moe_routes.jsonl"
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


def _names(logs: Sequence[Path], names: str | None) -> list[str]:
    """--names, or the shortest ends of the paths that differ."""
    if names is not None:
        given = [name.strip() for name in names.split(",")]
        if len(given) != len(logs) or len(set(given)) != len(given) or not all(given):
            raise UserError(f"--names needs {len(logs)} different names with commas between them")
        return given
    for length in (1, 2, 3):
        short = ["/".join(path.parts[-length:]) for path in logs]
        if len(set(short)) == len(short):
            return short
    return [f"{number}: {path.name}" for number, path in enumerate(logs, start=1)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m expert_profiler.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "logs",
        nargs="+",
        type=Path,
        metavar="LOG",
        help=f"two or more route logs, or presets: {', '.join(models.PRESETS)}",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--names", metavar="A,B", help="short names for tables and pictures")
    parser.add_argument("--phase", choices=PHASES, default="all", help="rows to compare [all]")
    parser.add_argument("--force", action="store_true", help="replace an existing comparison")
    return parser


if __name__ == "__main__":
    sys.exit(errors.run(main))
