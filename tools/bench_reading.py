#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure how fast logs are read, side by side: python tools/bench_reading.py [--rows N]

The yardstick is a line-by-line ``json.loads`` loop with a ``Counter`` by layer and expert. Every
metric is that of a whole process, from its start to its exit, with the files in the page cache.
Tasks run one after another, round by round; the table shows medians. Writes reading.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from expert_profiler import files  # noqa: E402
from expert_profiler.errors import UserError, run  # noqa: E402
from tools import make_synthetic_log  # noqa: E402

GIB = 1 << 30


@dataclass(frozen=True)
class Sample:
    """One process: wall and processor seconds, and peak resident bytes."""

    wall_sec: float
    cpu_sec: float
    peak_bytes: int


@dataclass(frozen=True)
class Task:
    """Something to time, and what to stay under: a share of the first task's time, or seconds."""

    name: str
    command: list[str]
    share: float | None = None
    seconds: float | None = None
    once: bool = False


def yardstick(path: Path) -> None:
    """What anyone would write first."""
    counts: Counter[tuple[int, int]] = Counter()
    with path.open() as file:
        for line in file:
            row = json.loads(line)
            if row["type"] == "route":
                layer = row["layer"]
                for expert in row["topk_ids"]:
                    counts[layer, expert] += 1
    print(f"{counts.total():,} choices")


def tasks(jsonl: Path, parquet: Path, folder: Path) -> list[Task]:
    python, hist = sys.executable, str(ROOT / "make_hist.py")

    def plot(log: Path, *more: str) -> list[str]:
        return [python, hist, str(log), "--out", str(folder / "hist.png"), "--force", *more]

    more = ["--report", str(folder / "report")]
    return [
        Task("json.loads + Counter", [python, __file__, "--yardstick", str(jsonl)], once=True),
        Task("make_hist.py, JSONL", plot(jsonl), share=1 / 15),
        Task("make_hist.py, Parquet", plot(parquet), share=1 / 30),
        *(
            Task(f"make_hist.py --report, {name}", plot(log, *more), seconds=180, once=True)
            for log, name in ((jsonl, "JSONL"), (parquet, "Parquet"))
        ),
    ]


def measure(task: Task) -> Sample:
    """Run the task's process once."""
    # Compiled modules are kept, as in any environment after its first run.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(task.command, stdout=output, stderr=output, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            last = output.read().decode(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{task.name} failed: {' '.join(last)}; run: {' '.join(task.command)}")
    return Sample(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def bench(todo: Sequence[Task], rounds: int) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {task.name: [] for task in todo}
    for number in range(rounds):
        for task in todo:
            if task.once and number:
                continue
            print(f"round {number + 1}: {task.name} …", file=sys.stderr, flush=True)
            samples[task.name].append(measure(task))
    return samples


def table(todo: Sequence[Task], samples: dict[str, list[Sample]]) -> tuple[str, bool]:
    """The metrics as text, and whether every target is met."""
    line = "{:<30}{:>8}{:>9}{:>10}{:>10}  {}"
    lines = [line.format("", "wall s", "cpu s", "peak GiB", "of first", "target")]
    base = statistics.median(item.wall_sec for item in samples[todo[0].name])
    good = True
    for task in todo:
        found = samples[task.name]
        wall = statistics.median(item.wall_sec for item in found)
        cpu = statistics.median(item.cpu_sec for item in found)
        peak = max(item.peak_bytes for item in found)
        target, met = "", True
        if task.share is not None:
            target, met = f"< 1/{1 / task.share:.0f}", wall < base * task.share
        if task.seconds is not None:
            target, met = f"< {task.seconds:.0f} s", wall < task.seconds
        if task is not todo[0]:
            met &= peak < 2e9
            target += ", < 2 GB" + (": met" if met else ": MISSED")
        good &= met
        share = f"1/{base / wall:.1f}"
        lines.append(
            line.format(task.name, f"{wall:.2f}", f"{cpu:.2f}", f"{peak / GIB:.2f}", share, target)
        )
    return "\n".join(lines), good


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.yardstick is not None:
        yardstick(args.yardstick)
        return 0
    if not args.dir.is_dir():
        raise UserError(f"no directory {args.dir}; make it: mkdir -p {args.dir}")
    files.check_free(args.out, args.force, "--out")
    spec = make_synthetic_log.Spec(rows=args.rows)
    logs = [args.dir / f"synthetic-{args.rows}.{kind}" for kind in ("jsonl", "parquet")]
    for log in logs:
        if not log.exists():
            command = ["tools/make_synthetic_log.py", str(log), "--rows", str(args.rows)]
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    for log in logs:
        for file in sorted(log.iterdir()) if log.is_dir() else [log]:
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass
    with tempfile.TemporaryDirectory() as scratch:
        todo = tasks(logs[0], logs[1], Path(scratch))
        measure(todo[2])  # compiles what was never imported
        samples = bench(todo, args.rounds)
    text, good = table(todo, samples)
    print(text)
    versions = ("duckdb", "pyarrow", "numpy", "matplotlib")
    record = {
        "rows": spec.tokens * spec.layers,
        "spec": asdict(spec),
        "samples": {name: [asdict(item) for item in found] for name, found in samples.items()},
        "load_average": os.getloadavg(),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in versions},
    }
    files.write(args.out, json.dumps(record, indent=2) + "\n")
    print(f"written  {args.out}")
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/bench_reading.py", description="Measure how fast logs are read, side by side."
    )
    add = parser.add_argument
    add("--rows", type=int, default=10_000_000, help="of the logs, made if missing [%(default)s]")
    add("--dir", type=Path, default=Path(tempfile.gettempdir()), help="of the logs [%(default)s]")
    add("--rounds", type=int, default=3, help="of the quick tasks [%(default)s]")
    add("--out", type=Path, default=Path("reading.json"), help="[%(default)s]")
    add("--force", action="store_true", help="replace --out")
    add("--yardstick", type=Path, metavar="LOG", help="run the yardstick alone")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
