# SPDX-License-Identifier: Apache-2.0
"""A profiling run, to be read from top to bottom.

Everything that can be wrong is checked before the model is loaded, everything is written to a
staging folder, and the files move into place together at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from expert_profiler import resources
from expert_profiler.errors import UserError
from expert_profiler.patch import patch_state
from expert_profiler.patch.patch_file import load_patch, sha256_of_file
from expert_profiler.run import (
    engine,
    machine,
    model_sizes,
    models,
    passes,
    run_folder,
    timing,
    tiny_model,
)
from expert_profiler.run.passes import Measurements
from expert_profiler.run.prompts import PromptSet, load_prompts, write_prompts


def profile(args: argparse.Namespace) -> int:
    """Run it; the exit code is 1 when the log can't be trusted.

    Args:
        args: of ``profile_options``.

    Raises:
        UserError: something is wrong with the options, the machine or the checkpoint.
    """
    # 1. Check everything that can be checked without loading anything.
    out = run_folder.prepare(args.out, args.mode, args.force)
    report = patch_state.inspect()
    if not report.ok:
        raise UserError(report.message)
    devices = machine.gpus()
    preset = models.resolve(args.model, has_gpu=bool(devices))
    if preset is models.PRESETS["tiny"]:
        tiny_model.ensure(Path(preset.model))
    elif preset.missing():
        raise UserError(f"the checkpoint {preset.model} is not there; run: {preset.remade_by}")
    model_sizes.check(preset.model, devices, args.tensor_parallel_size)
    models.numbers(args.layers)
    config = models.read_config(preset.model)
    if config is not None:
        models.check_config(preset.model, config, args.layers)
    prompts = load_prompts(args.prompts)

    # 2. Measure in a staging folder beside the artifacts, so that moving them is a rename.
    stage = Path(tempfile.mkdtemp(prefix=".run_profile-", dir=out))
    try:
        with engine.quiet(stage / "engine.log", args.verbose) as terminal:
            settings = engine_settings(args, preset, config, on_cpu=not devices)
            print(f"starting vLLM with {settings['model']} ({preset.kind}) …", file=terminal)
            measured = passes.measure(args, settings, prompts.prompts, stage, terminal)

        # 3. Write, then move into place together.
        write_prompts(stage / run_folder.PROMPTS, prompts.prompts)
        run_folder.write_outputs(stage / run_folder.OUTPUTS, measured.outputs)
        record = timing_record(measured, provenance(args, preset, settings, prompts, measured))
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (stage / run_folder.TIMING).write_text(text, encoding="utf-8")
        written = run_folder.move(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return summary(preset, prompts, measured, written)


def engine_settings(
    args: argparse.Namespace, preset: models.Preset, config: Any, on_cpu: bool
) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``."""
    max_model_len = args.max_model_len or preset.max_model_len
    if max_model_len is None:
        longest = (config or {}).get("max_position_embeddings") or 2048
        max_model_len = min(longest, 2048)
    return {
        "model": short_path(preset.model),
        "dtype": args.dtype or preset.dtype,
        "quantization": args.quantization,
        "max_model_len": max_model_len,
        "seed": args.seed,
        "tensor_parallel_size": args.tensor_parallel_size,
        "enforce_eager": on_cpu if args.enforce_eager is None else args.enforce_eager,
        # A cached prefix is never routed, so later passes would record fewer rows.
        "enable_prefix_caching": False,
    }


def short_path(model: str) -> str:
    """A checkpoint below this folder by its relative path: it goes into logs and charts."""
    path, here = Path(model), Path.cwd()
    return (
        str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else model
    )


def provenance(
    args: argparse.Namespace,
    preset: models.Preset,
    settings: dict[str, Any],
    prompts: PromptSet,
    measured: Measurements,
) -> dict[str, Any]:
    """The facts that travel with the metrics."""
    import torch

    on_cuda = torch.cuda.is_available()
    return {
        "args": {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()},
        "engine": settings,
        "model": {"id": settings["model"], "kind": preset.kind},
        "prompts": {
            "set": prompts.name,
            "note": prompts.note,
            "count": len(prompts.prompts),
            "sha256": prompts.sha256,
        },
        "versions": {
            "vllm": metadata.version("vllm"),
            "torch": str(torch.__version__),
            "numpy": metadata.version("numpy"),
            "python": platform.python_version(),
        },
        "device": {
            "type": "cuda" if on_cuda else "cpu",
            "name": torch.cuda.get_device_name() if on_cuda else machine.cpu_name(),
            "cpu_count": os.cpu_count(),
            "platform": platform.platform(),
        },
        "patch_sha256": sha256_of_file(resources.PATCH),
        "patch_id": load_patch().patch_id,
        "execution": "eager" if settings["enforce_eager"] else "compiled",
        "prefix_caching": False,
        "warmups": 1,
        "tokens_identical_over_passes": measured.tokens_agree,
        "no_log_means": (
            "recorder armed but stopped" if args.mode == "both" else "recorder switched off"
        ),
    }


def timing_record(measured: Measurements, facts: dict[str, Any]) -> dict[str, Any]:
    """``timing.json``."""
    modes = {name: timing.summarise(repeats) for name, repeats in measured.repeats.items()}
    return {**modes, "overhead": measured.overhead(), "provenance": facts}


def summary(
    preset: models.Preset, prompts: PromptSet, measured: Measurements, written: list[Path]
) -> int:
    """Print what was measured; the exit code is 1 when it can't be trusted."""
    print(f"model      {preset.model} ({preset.kind})")
    print(f"prompts    {len(prompts.prompts)} ({prompts.name})")
    for mode, repeats in measured.repeats.items():
        metrics = timing.summarise(repeats)
        print(
            f"{mode:10} {metrics['tokens_per_sec']:.1f} tokens/s, median of {len(repeats)} passes "
            f"{metrics['median_wall_time_sec']:.2f} s"
        )
    if cost := measured.overhead():
        low, high = cost["paired_ratio_ci95"]
        print(
            f"overhead   x{cost['paired_ratio_median']:.4f} wall time, 95% interval {low:.4f} to "
            f"{high:.4f}, {cost['pairs']} pairs"
        )
    print(f"artifacts  {', '.join(str(path) for path in written)}")
    trusted = True
    if not measured.tokens_agree:
        # Requests meet in other batches every time, and other batches round otherwise.
        print("note       passes over the same prompts did not generate the same tokens throughout")
    for end in measured.ends:
        lost = {cause: count for cause, count in end["drops"].items() if count}
        verdict = end["self_check"]["verdict"]
        print(f"recorded   {end['rows']} rows in {end['passes']} passes; self-check {verdict}")
        for check in end["self_check"]["checks"]:
            if check["verdict"] != "pass":
                print(f"FAILED     {check['name']}: {check['detail']}")
        if lost:
            print(f"LOST       rows by cause: {lost}")
        trusted &= verdict == "pass" and not lost
    routes = [path for path in written if path.name == run_folder.ROUTES]
    if routes:
        log = shlex.quote(str(routes[0]))
        print(f"next       {resources.program()} report {log} --out report/")
    else:
        print("next       --mode log")
    return 0 if trusted else 1
