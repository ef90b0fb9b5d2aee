# SPDX-License-Identifier: Apache-2.0
"""What does recording cost? Measures it and writes overhead.json and overhead.png.

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from expert_profiler import files
from expert_profiler.bench import overhead_chart, overhead_tables, pass_metrics
from expert_profiler.bench.cases import (
    AA,
    BASE,
    FULL,
    HEADLINE_MODES,
    MATRIX_PAIRS,
    MODES,
    QUICK,
    Case,
    Plan,
    schedule,
)
from expert_profiler.bench.engine_process import Engine, environment, last_line, pristine_vllm
from expert_profiler.bench.pass_metrics import Pair
from expert_profiler.errors import UserError
from expert_profiler.patch import patch_state
from expert_profiler.patch.patch_file import sha256_of_file
from expert_profiler.resources import PATCH
from expert_profiler.run import models, tiny_model
from expert_profiler.run.machine import cpu_name

RECORD, CHART = "overhead.json", "overhead.png"
PROFILED = ("armed", "stat", "per_pass", "parquet", "jsonl")
FITTED = ("parquet", "jsonl")

#: Shows what is being done.
Say = Callable[[str], None]


def bench(args: argparse.Namespace) -> int:
    """Measure, write, print; the exit code is 1 when the metrics can't be trusted.

    Args:
        args: of ``commands.bench``.

    Raises:
        UserError: something is wrong with the options, the machine or the checkpoint.
    """
    files.prepare(args.out, (RECORD, CHART), args.force, "--out")
    report = patch_state.inspect()
    if not report.ok:
        raise UserError(report.message)
    plan = QUICK if args.quick else FULL
    model = args.model or models.PRESETS["tiny"].model
    if args.model is None:
        tiny_model.ensure(Path(model))
    elif not (Path(model) / "config.json").is_file():
        raise UserError(f"--model {model} is no checkpoint folder: it has no config.json")

    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", file=sys.stderr, flush=True)

    folder = Path(tempfile.mkdtemp(prefix="moe-overhead-"))
    try:
        record = measure(plan, args.pairs or plan.headline_pairs, model, folder, say)
    finally:
        if args.keep:
            print(f"kept       {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    record["quick"] = args.quick
    record["provenance"] = provenance(model, args, time.monotonic() - started)
    files.write(args.out / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    with files.replacing(args.out / CHART) as scratch:
        overhead_chart.draw(record).savefig(scratch, format="png")
    return tell(record, args.out)


def measure(plan: Plan, pairs: int, model: str, folder: Path, say: Say) -> dict[str, Any]:
    """Everything, one part after another: never two of them at a time."""
    say("starting an armed engine")
    with closing(Engine(model, folder / "armed", armed=True)) as engine:
        for name in MODES:  # what runs for the first time: imports, allocations, caches
            engine.run(name, Case(16, plan.headline.batch, 2))
        headline = case_in_one_engine(engine, plan.headline, HEADLINE_MODES, pairs, say)
        matrix = [
            case_in_one_engine(engine, case, modes, MATRIX_PAIRS, say)
            for case, modes in plan.matrix
        ]
        say("where the time goes")
        profile = profile_in(engine, plan)
        fit = fit_in(engine, plan, say)
        armed_ops = len(engine.ask("ops"))
    processes = None
    if plan.processes:
        processes = case_over_processes(plan, model, folder, armed_ops, say)
    say("the writer alone")
    writer = writer_alone(plan, folder)
    sections = [headline, *matrix, *([processes] if processes else [])]
    return {
        "schema": 1,
        "headline": headline,
        "aa_interval_holds_1": pass_metrics.aa_holds(headline["modes"]),
        "matrix": matrix,
        "processes": processes,
        "profile": profile,
        "fit": fit,
        "writer": writer,
        "problems": [text for section in sections for text in section["problems"]],
    }


def case_in_one_engine(
    engine: Engine, case: Case, modes: Sequence[str], pairs: int, say: Say
) -> dict[str, Any]:
    """Every mode against the baseline, in rounds."""
    found: dict[str, list[Pair]] = {mode: [] for mode in modes}
    engine.run(BASE, Case(case.prompt_tokens, case.batch, 2))  # these shapes for the first time
    for number in range(pairs):
        say(f"{case.name}: round {number + 1} of {pairs}")
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
        "modes": {mode: pass_metrics.compare(mode, each) for mode, each in found.items()},
        "problems": pass_metrics.problems(case.name, found, case.routed_tokens),
    }


def case_over_processes(
    plan: Plan, model: str, folder: Path, armed_ops: int, say: Say
) -> dict[str, Any]:
    """Unset engines against unpatched ones, and two unpatched ones against each other."""
    say("starting two unpatched engines and one whose switch is unset")
    root = folder / "pristine"
    root.mkdir()
    unpatched = pristine_vllm(root)
    with (
        closing(Engine(model, folder / "unpatched", vllm_root=unpatched)) as base,
        closing(Engine(model, folder / "again", vllm_root=unpatched)) as again,
        closing(Engine(model, folder / "unset")) as unset,
    ):
        ops = {"unpatched": base.ask("ops"), "unset": unset.ask("ops")}
        others = {"unpatched again": again, "unset": unset}
        say(f"processes, {plan.headline.name}")
        for engine in (base, again, unset):
            engine.run(BASE, plan.headline)
        found: dict[str, list[Pair]] = {name: [] for name in others}
        for number in range(plan.processes):
            for name in list(others) if number % 2 else list(others)[::-1]:
                turn = (others[name], base) if number % 2 else (base, others[name])
                seen = {engine: engine.run(BASE, plan.headline) for engine in turn}
                found[name].append(Pair(seen[base], seen[others[name]]))
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
    case = plan.profiled
    engine.run(BASE, case)  # these shapes for the first time
    base_wall = engine.run(BASE, case)["wall"]
    modes = {
        name: pass_metrics.profile(engine.run(name, case, do="profile"), base_wall)
        for name in PROFILED
    }
    return {"case": {"name": case.name, **asdict(case)}, "base_wall": base_wall, "modes": modes}


def fit_in(engine: Engine, plan: Plan, say: Say) -> dict[str, Any]:
    """How the cost grows with layers x tokens: time of both threads over loads and layers."""
    result = {}
    for mode in FITTED:
        rows, steps, engine_time, writer_time = [], [], [], []
        for batch, layers in plan.fit:
            say(f"fit: {mode}, batch {batch}, layers {layers}")
            case = Case(plan.headline.prompt_tokens, batch, plan.headline.output_tokens)
            seen = engine.run(mode, case, layers, do="profile")
            rows.append(seen["rows"])
            steps.append(seen["parts"]["end"]["calls"])
            engine_time.append(pass_metrics.engine_seconds(seen["parts"]))
            writer_time.append(pass_metrics.seconds_of(seen["parts"], "writer"))
        result[f"{mode}, engine thread"] = pass_metrics.fit(rows, steps, engine_time)
        result[f"{mode}, writer thread"] = pass_metrics.fit(rows, steps, writer_time)
    return result


def writer_alone(plan: Plan, folder: Path) -> dict[str, Any]:
    """``writer_alone`` in a process of its own."""
    amounts = {
        "rows": plan.synthetic_rows,
        "seconds": plan.sustained_seconds,
        "minutes": plan.simulated_minutes,
    }
    work, module = folder / "synthetic", "expert_profiler.bench.writer_alone"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(amounts), str(work)],
        cwd=work,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = last_line(done.stderr)
        raise UserError(f"the writer's bench failed: {last}; is the patch applied?")
    record: dict[str, Any] = json.loads(done.stdout)
    for name in ("memory", "worst_memory"):
        record[name] = pass_metrics.memory(record[name])
    return record


def provenance(model: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The facts that travel with the metrics."""
    return {
        "command": "expert-profiler bench",
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
        "patch_sha256": sha256_of_file(PATCH),
        "execution": "eager",
        "seconds": seconds,
        "baseline": "patched, recorder taken off the model: what runs while the switch is unset",
        "ratio": "time in the mode / time of the baseline pass beside it; wall time includes "
        "starting the recording and closing its file; median of pairs, 95% percentile bootstrap",
    }


def tell(record: Mapping[str, Any], out: Path) -> int:
    """Print the report; the exit code is 1 when its metrics can't be trusted."""
    print(overhead_tables.table(record))
    print()
    for text in record["problems"]:
        print(f"FAILED     {text}")
    if not record["aa_interval_holds_1"]:
        ratio = overhead_tables.ratio_text(record["headline"]["modes"][AA]["ratios"]["wall"])
        print(
            f"FAILED     A/A {ratio} does not hold 1: the machine was not "
            "steady; let it rest and run again"
        )
    if record["quick"]:
        print("note       --quick shows that every part runs; its metrics mean nothing")
    print(f"wrote      {out / RECORD}, {out / CHART} in {record['provenance']['seconds']:.0f} s")
    print("next       look at overhead.png; docs/overhead.md says how to read it")
    steady = record["aa_interval_holds_1"] or record["quick"]
    return 0 if steady and not record["problems"] else 1
