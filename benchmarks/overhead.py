"""What does recording cost? One command measures it and writes overhead.json and overhead.png.

python -m benchmarks.overhead            # the whole matrix, some 15 minutes on two cores
python -m benchmarks.overhead --quick    # every part once, small, under 2 minutes: it runs, no more

Modes that can be switched on and off run in one engine, each pass next to a baseline pass of the
same engine with the recorder taken off its model. Unpatched and unset engines can't be switched:
they stand side by side in processes of their own, and take turns. docs/overhead.md says why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import figures, plot, report
from benchmarks.cases import (
    AA,
    BASE,
    FULL,
    HEADLINE_MODES,
    MODES,
    QUICK,
    Case,
    Plan,
    schedule,
)
from benchmarks.client import REPO, Engine, environment, pristine_vllm
from benchmarks.figures import Pair
from expert_profiler.errors import UserError, run
from expert_profiler.patch import patch_file, patch_state
from expert_profiler.report.histogram import save_png
from expert_profiler.resources import PATCH
from expert_profiler.run import models
from run_profile import cpu_name
from tools import make_tiny_moe

RECORD, PLOT = "overhead.json", "overhead.png"
PROFILED = ("armed", "stat", "per_pass", "parquet", "jsonl")
FITTED = ("parquet", "jsonl")


@dataclass
class Progress:
    """One line on stderr, rewritten."""

    started: float

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="every part once and small; its figures mean nothing")
    add("--model", metavar="PATH", help="checkpoint folder [the tiny one, built where missing]")
    add("--out", type=Path, default=Path(), metavar="DIR", help="folder for the results [.]")
    add("--pairs", type=int, metavar="N", help="pairs a mode of the headline case [20]")
    add("--force", action="store_true", help="overwrite results in --out")
    add("--keep", action="store_true", help="keep the engines' logs, and say where")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    existing = [name for name in (RECORD, PLOT) if (args.out / name).exists()]
    if existing and not args.force:
        raise UserError(
            f"{', '.join(existing)} exist in {args.out.resolve()}; add --force to overwrite, or "
            "choose another --out"
        )
    if args.pairs is not None and args.pairs < 1:
        raise UserError(f"--pairs {args.pairs} is not positive; give at least 1")
    state = patch_state.inspect()
    if not state.ok:
        raise UserError(state.message)
    plan = QUICK if args.quick else FULL
    model = args.model or models.PRESETS["tiny"].model
    if args.model is None:
        make_tiny_moe.main([model, "--reuse"])
    elif not (Path(model) / "config.json").is_file():
        raise UserError(f"--model {model} is no checkpoint folder: it has no config.json")
    args.out.mkdir(parents=True, exist_ok=True)

    progress = Progress(time.monotonic())
    folder = Path(tempfile.mkdtemp(prefix="moe-overhead-"))
    try:
        record = measure(plan, args.pairs or plan.headline_pairs, model, folder, progress)
    finally:
        if args.keep:
            print(f"kept       {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    record["quick"] = args.quick
    record["provenance"] = provenance(model, args, time.monotonic() - progress.started)
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (args.out / RECORD).write_text(text, encoding="utf-8")
    save_png(plot.overhead_figure(record), args.out / PLOT)
    return tell(record, args.out)


def measure(plan: Plan, pairs: int, model: str, folder: Path, progress: Progress) -> dict[str, Any]:
    """Everything, one part after another: never two of them at a time."""
    progress.say("starting an armed engine")
    with Engine(model, folder / "armed", armed=True) as engine:
        for name in MODES:  # what runs for the first time: imports, allocations, caches
            engine.run(name, Case(16, plan.headline.batch, 2))
        headline = case_in_one_engine(engine, plan.headline, HEADLINE_MODES, pairs, progress)
        matrix = [
            case_in_one_engine(engine, case, modes, pairs, progress)
            for case, modes, pairs in plan.matrix
        ]
        progress.say("where the time goes")
        profile = profile_in(engine, plan)
        fit = fit_in(engine, plan, progress)
        armed_ops = len(engine.ask("ops"))
    processes = None
    if plan.processes:
        processes = case_over_processes(plan, model, folder, armed_ops, progress)
    progress.say("the writer alone")
    writer = writer_alone(plan, folder)
    sections = [headline, *matrix, *([processes] if processes else [])]
    return {
        "schema": 1,
        "headline": headline,
        "aa_interval_holds_1": figures.aa_holds(headline["modes"]),
        "matrix": matrix,
        "processes": processes,
        "profile": profile,
        "fit": fit,
        "writer": writer,
        "problems": [text for section in sections for text in section["problems"]],
    }


def case_in_one_engine(
    engine: Engine, case: Case, modes: Sequence[str], pairs: int, progress: Progress
) -> dict[str, Any]:
    """Every mode against the baseline, in rounds."""
    found: dict[str, list[Pair]] = {mode: [] for mode in modes}
    engine.run(BASE, Case(case.prompt_tokens, case.batch, 2))  # these shapes for the first time
    for number in range(pairs):
        progress.say(f"{case.name}: round {number + 1} of {pairs}")
        slots = schedule(modes, number)
        passes = [engine.run(slot.mode, case) for slot in slots]
        for slot, own in zip(slots, passes, strict=True):
            if slot.mode != BASE:
                found[slot.mode].append(Pair(passes[slot.base], own))
    return section(case, found, pairs)


def section(case: Case, found: Mapping[str, Sequence[Pair]], pairs: int) -> dict[str, Any]:
    """A case's entry in the record."""
    return {
        "case": {"name": case.name, **asdict(case)},
        "pairs": pairs,
        "modes": {mode: figures.compare(mode, each) for mode, each in found.items()},
        "problems": figures.problems(case.name, found, case.routed_tokens),
    }


def case_over_processes(
    plan: Plan, model: str, folder: Path, armed_ops: int, progress: Progress
) -> dict[str, Any]:
    """Unset engines against unpatched ones, and two unpatched ones against each other."""
    progress.say("starting two unpatched engines and one whose switch is unset")
    root = folder / "pristine"
    root.mkdir()
    unpatched = pristine_vllm(root)
    with (
        Engine(model, folder / "unpatched", armed=False, vllm_root=unpatched) as base,
        Engine(model, folder / "again", armed=False, vllm_root=unpatched) as again,
        Engine(model, folder / "unset", armed=False) as unset,
    ):
        ops = {"unpatched": base.ask("ops"), "unset": unset.ask("ops")}
        others = {"unpatched again": again, "unset": unset}
        progress.say(f"processes, {plan.headline.name}")
        for engine in (base, again, unset):
            engine.run(BASE, plan.headline)
        found: dict[str, list[Pair]] = {name: [] for name in others}
        for number in range(plan.processes):
            for name in list(others) if number % 2 else list(others)[::-1]:
                if number % 2:
                    own, first = (
                        others[name].run(BASE, plan.headline),
                        base.run(BASE, plan.headline),
                    )
                else:
                    first, own = (
                        base.run(BASE, plan.headline),
                        others[name].run(BASE, plan.headline),
                    )
                found[name].append(Pair(first, own))
    case = section(plan.headline, found, plan.processes)
    if ops["unpatched"] != ops["unset"]:
        case["problems"].append("an engine with the switch unset dispatches other ops")
    return {
        "ops": {**{name: len(seen) for name, seen in ops.items()}, "armed": armed_ops},
        "same_ops": ops["unpatched"] == ops["unset"],
        **case,
    }


def profile_in(engine: Engine, plan: Plan) -> dict[str, Any]:
    """The time of the recorder's parts, by mode."""
    case, passes = plan.profiled
    base = [engine.run(BASE, case) for _ in range(passes + 1)][1:]
    base_wall = float(np.median([figures.wall(item) for item in base]))
    modes = {
        name: figures.profile(
            [engine.run(name, case, do="profile") for _ in range(passes)], base_wall
        )
        for name in PROFILED
    }
    return {"case": {"name": case.name, **asdict(case)}, "base_wall": base_wall, "modes": modes}


def fit_in(engine: Engine, plan: Plan, progress: Progress) -> dict[str, Any]:
    """How the cost grows with layers x tokens: time of both threads over loads and layers."""
    result = {}
    for mode in FITTED:
        rows, steps, engine_time, writer_time = [], [], [], []
        for batch, layers in plan.fit:
            progress.say(f"fit: {mode}, batch {batch}, layers {layers}")
            case = Case(plan.headline.prompt_tokens, batch, plan.headline.output_tokens)
            seen = engine.run(mode, case, layers, do="profile")
            rows.append(seen["rows"])
            steps.append(seen["parts"]["end"]["calls"])
            engine_time.append(figures.engine_seconds(seen["parts"]))
            writer_time.append(figures.seconds_of(seen["parts"], "writer"))
        result[f"{mode}, engine thread"] = figures.fit(rows, steps, engine_time)
        result[f"{mode}, writer thread"] = figures.fit(rows, steps, writer_time)
    return result


def writer_alone(plan: Plan, folder: Path) -> dict[str, Any]:
    """``benchmarks.synthetic`` in a process of its own."""
    amounts = {
        "rows": plan.synthetic_rows,
        "seconds": plan.sustained_seconds,
        "minutes": plan.simulated_minutes,
    }
    work = folder / "synthetic"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.synthetic", json.dumps(amounts), str(work)],
        cwd=work,
        env=environment({"PYTHONPATH": str(REPO)}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        raise UserError(f"the writer's bench failed: {last[0]}; is the patch applied?")
    record: dict[str, Any] = json.loads(done.stdout)
    for name in ("memory", "worst_memory"):
        record[name] = figures.memory(record[name])
    return record


def provenance(model: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The facts that travel with the figures."""
    return {
        "command": "python -m benchmarks.overhead",
        "args": {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()},
        "model": Path(model).name,
        "device": cpu_name(),
        "cpu_count": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "vllm": metadata.version("vllm"),
        "torch": metadata.version("torch"),
        "pyarrow": metadata.version("pyarrow"),
        "patch_sha256": patch_file.sha256_of_file(PATCH),
        "execution": "eager",
        "seconds": seconds,
        "baseline": "patched, recorder taken off the model: what runs while the switch is unset",
        "ratio": "time in the mode / time of the baseline pass beside it; wall time includes "
        "starting the recording and closing its file; median of pairs, 95% percentile bootstrap",
    }


def tell(record: Mapping[str, Any], out: Path) -> int:
    """Print the report; the exit code is 1 when its figures can't be trusted."""
    print(report.table(record))
    print()
    for text in record["problems"]:
        print(f"FAILED     {text}")
    if not record["aa_interval_holds_1"]:
        ratio = record["headline"]["modes"][AA]["ratios"]["wall"]
        print(
            f"FAILED     A/A {report.ratio_text(ratio)} does not hold 1: the machine was not "
            "steady; let it rest and run again"
        )
    if record["quick"]:
        print("note       --quick shows that every part runs; its figures mean nothing")
    print(f"wrote      {out / RECORD}, {out / PLOT} in {record['provenance']['seconds']:.0f} s")
    print("next       look at overhead.png; docs/overhead.md says how to read it")
    steady = record["aa_interval_holds_1"] or record["quick"]
    return 0 if steady and not record["problems"] else 1


if __name__ == "__main__":
    sys.exit(run(main))
