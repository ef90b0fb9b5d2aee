#!/usr/bin/env python3
"""Generate offline with vLLM, record every token's experts, and measure what recording costs.

Writes prompts.txt, moe_routes.jsonl, outputs.jsonl and timing.json into --out. Read ``main`` from
top to bottom: everything that can be wrong is checked before the model is loaded, everything is
written to a staging folder, and the artifacts move into place together at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from expert_profiler.errors import UserError, parsed, run
from expert_profiler.patch import patch_file, patch_state
from expert_profiler.resources import PATCH
from expert_profiler.run import engine, model_sizes, models, timing
from expert_profiler.run.prompts import PromptSet, load_prompts, write_prompts

ROUTES, OUTPUTS, TIMING, PROMPTS = "moe_routes.jsonl", "outputs.jsonl", "timing.json", "prompts.txt"
MODES = ("no_log", "log")
#: Prompts of the warm-up pass: enough to run prefill and decode in a full batch once.
WARMUP_TOKENS = 8


@dataclass
class Measurements:
    """What the passes gave.

    Attributes:
        repeats: by mode, in order; in mode "both" the i-th of each form a pair.
        outputs: vLLM's outputs of the pass that the log belongs to.
        ends: end record of every file of that log.
        tokens_agree: whether every pass generated the same tokens.
    """

    repeats: dict[str, list[timing.Repeat]] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    ends: list[dict[str, Any]] = field(default_factory=list)
    tokens_agree: bool = True


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="auto", help="auto (gptq with CUDA, demo without), gptq, full, olmoe, "
        "granite-3b, granite-1b, demo, tiny, "
        "a hub id or a checkpoint folder [auto]")  # fmt: skip
    add("--mode", choices=("both", *MODES), default="both", help="which passes to run [both]")
    add("--out", type=Path, default=Path(), metavar="DIR", help="folder for the artifacts [.]")
    add("--prompts", metavar="FILE", help="prompts separated by a line '---' between blank lines "
        "[first 25 GSM8K test questions, else 25 shipped ones]")  # fmt: skip
    add("--max-tokens", type=positive, default=128, help="output tokens a prompt [128]")
    add("--temperature", type=float, default=0.0, help="sampling temperature [0]")
    add("--seed", type=int, default=1234, help="seed of engine and sampling [1234]")
    add("--layers", default="all", help="MoE layers to record: all, 0 or 0,3-5 [all]")
    add("--repeats", type=positive, default=3, help="timed passes a mode [3]")
    add("--quantization", help="vLLM's --quantization [what the checkpoint says]")
    add("--dtype", help="vLLM's --dtype [the preset's]")
    add("--max-model-len", type=positive, help="longest sequence, in tokens [the preset's]")
    add("--tensor-parallel-size", type=positive, default=1, help="ranks a layer is split over [1]")
    add("--enforce-eager", action=argparse.BooleanOptionalAction, default=None,
        help="run without compilation and CUDA graphs [on CPU: yes, on CUDA: no]")  # fmt: skip
    add("--force", action="store_true", help="overwrite artifacts in --out")
    add("--verbose", action="store_true", help="leave vLLM's messages on the terminal")
    return parsed(parser, argv)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)

    # 1. Check everything that can be checked without loading anything.
    names = [PROMPTS, OUTPUTS, TIMING] + ([ROUTES] if args.mode != "no_log" else [])
    out = check_out(args.out, names, args.force)
    report = patch_state.inspect()
    if not report.ok:
        raise UserError(report.message)
    devices = models.gpus()
    preset = models.resolve(args.model, has_gpu=bool(devices))
    if preset.missing():
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
        engine_log = stage / "engine.log"
        with engine.quiet(engine_log, args.verbose) as terminal:
            settings = engine_settings(args, preset, config, on_cpu=not devices)
            print(f"starting vLLM with {settings['model']} ({preset.kind}) …", file=terminal)
            measured = measure(args, settings, prompts, stage, terminal)

        # 3. Write, then move into place together.
        write_prompts(stage / PROMPTS, prompts.prompts)
        write_outputs(stage / OUTPUTS, measured.outputs)
        facts = provenance(args, preset, settings, prompts, measured)
        write_json(stage / TIMING, timing_record(args.mode, measured, facts))
        written = move(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return summary(preset, prompts, measured, written)


def check_out(out: Path, names: Sequence[str], force: bool) -> Path:
    """The artifact folder, made where missing; refuses to overwrite."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} can't be made a folder ({error.strerror})") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out} is not writable; choose another folder")
    existing = [name for name in names if (out / name).exists()]
    folders = [name for name in existing if (out / name).is_dir()]
    if folders:
        raise UserError(f"{out / folders[0]} is a folder; move it away or choose another --out")
    if existing and not force:
        raise UserError(
            f"{', '.join(existing)} exist in {out.resolve()}; add --force to overwrite, "
            "or choose another --out"
        )
    return out.resolve()


def engine_settings(
    args: argparse.Namespace, preset: models.Preset, config: Any, on_cpu: bool
) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``."""
    max_model_len = args.max_model_len or preset.max_model_len
    if max_model_len is None:
        longest = (config or {}).get("max_position_embeddings") or 2048
        max_model_len = min(longest, 2048)
    eager = on_cpu if args.enforce_eager is None else args.enforce_eager
    return {
        "model": short_path(preset.model),
        "dtype": args.dtype or preset.dtype,
        "quantization": args.quantization,
        "max_model_len": max_model_len,
        "seed": args.seed,
        "tensor_parallel_size": args.tensor_parallel_size,
        "enforce_eager": eager,
        # A cached prefix is never routed, so later passes would record fewer rows.
        "enable_prefix_caching": False,
    }


def short_path(model: str) -> str:
    """A checkpoint below this folder by its relative path: it goes into logs and plots."""
    path, here = Path(model), Path.cwd()
    return (
        str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else model
    )


def measure(
    args: argparse.Namespace,
    settings: dict[str, Any],
    prompts: PromptSet,
    stage: Path,
    terminal: Any,
) -> Measurements:
    """Start the engine, warm it up, and run the passes, modes alternating."""
    records = args.mode != "no_log"
    if records:
        os.environ["VLLM_LOG_MOE"] = str(stage / ROUTES)
        os.environ["VLLM_LOG_MOE_LAYERS"] = args.layers
        os.environ["VLLM_LOG_MOE_AUTOSTART"] = "0"
    else:
        os.environ.pop("VLLM_LOG_MOE", None)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; only the CPU backend reads it
    llm = engine.start(settings, stage / "engine.log")
    from tqdm import tqdm
    from vllm.sampling_params import SamplingParams

    def sampling(max_tokens: int) -> Any:
        return SamplingParams(max_tokens=max_tokens, temperature=args.temperature, seed=args.seed)

    check_lengths(llm, prompts.prompts, args.max_tokens, settings["max_model_len"])
    llm.generate(prompts.prompts, sampling(WARMUP_TOKENS), use_tqdm=False)

    modes = MODES if args.mode == "both" else (args.mode,)
    result = Measurements(repeats={mode: [] for mode in modes})
    tokens: list[list[int]] | None = None
    with tqdm(total=args.repeats * len(modes), unit="pass", file=terminal) as progress:
        for i in range(args.repeats):
            for mode in modes if i % 2 == 0 else modes[::-1]:
                progress.set_description(mode)
                # Only the last pass's log stays: every file is of exactly one pass.
                target = stage / ROUTES if i == args.repeats - 1 else stage / f"{i}" / ROUTES
                target.parent.mkdir(exist_ok=True)
                record_to = target if mode == "log" else None
                repeat, outputs, ends = engine.timed_pass(
                    llm, prompts.prompts, sampling(args.max_tokens), record_to
                )
                result.repeats[mode].append(repeat)
                if mode == modes[-1]:
                    result.outputs, result.ends = outputs, ends
                generated = [list(output.outputs[0].token_ids) for output in outputs]
                result.tokens_agree &= tokens is None or tokens == generated
                tokens = generated
                if target.parent != stage:
                    shutil.rmtree(target.parent)
                progress.update()
    engine.stop(llm)
    return result


def check_lengths(llm: Any, prompts: Sequence[str], max_tokens: int, max_model_len: int) -> None:
    """Every prompt and its output must fit; vLLM would cut the output short without a word."""
    tokenizer = llm.get_tokenizer()
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    longest = max(lengths)
    if longest + max_tokens > max_model_len:
        raise UserError(
            f"prompt {lengths.index(longest)} has {longest} tokens and --max-tokens is "
            f"{max_tokens}, more than --max-model-len {max_model_len}; raise --max-model-len to "
            f"{longest + max_tokens}"
        )


def write_outputs(path: Path, outputs: Sequence[Any]) -> None:
    """``outputs.jsonl``: one object a request; joins the routes on ``req_id``."""
    with path.open("w", encoding="utf-8") as file:
        for output in outputs:
            choice = output.outputs[0]
            record = {
                "req_id": output.request_id,
                "prompt": output.prompt,
                "prompt_token_ids": list(output.prompt_token_ids),
                "token_ids": list(choice.token_ids),
                "text": choice.text,
                "finish_reason": choice.finish_reason,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_json(path: Path, record: Any) -> None:
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def provenance(
    args: argparse.Namespace,
    preset: models.Preset,
    settings: dict[str, Any],
    prompts: PromptSet,
    measured: Measurements,
) -> dict[str, Any]:
    """The facts that travel with the figures."""
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
            "name": torch.cuda.get_device_name() if on_cuda else cpu_name(),
            "cpu_count": os.cpu_count(),
            "platform": platform.platform(),
        },
        "patch_sha256": patch_file.sha256_of_file(PATCH),
        "patch_id": patch_file.load_patch().patch_id,
        "execution": "eager" if settings["enforce_eager"] else "compiled",
        "prefix_caching": False,
        "warmups": 1,
        "tokens_identical_over_passes": measured.tokens_agree,
        "no_log_means": (
            "recorder armed but stopped" if args.mode == "both" else "recorder switched off"
        ),
    }


def cpu_name() -> str:
    """The processor's name, as Linux tells it; else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def overhead(measured: Measurements) -> dict[str, Any]:
    """What recording costs, from the pairs of mode "both"."""
    return timing.overhead(measured.repeats["no_log"], measured.repeats["log"])


def timing_record(mode: str, measured: Measurements, facts: dict[str, Any]) -> dict[str, Any]:
    """``timing.json``."""
    record: dict[str, Any] = {
        name: timing.summarise(repeats) for name, repeats in measured.repeats.items()
    }
    record["overhead"] = overhead(measured) if mode == "both" else None
    record["provenance"] = facts
    return record


def move(stage: Path, out: Path) -> list[Path]:
    """Move the artifacts from ``stage`` to ``out``; files of an older run's ranks go."""
    stem = Path(ROUTES).stem
    new = [stage / name for name in (PROMPTS, OUTPUTS, TIMING) if (stage / name).exists()]
    new += sorted(stage.glob(f"{stem}*.jsonl"))
    for old in out.glob(f"{stem}.pp*.jsonl"):
        old.unlink()
    for path in new:
        path.replace(out / path.name)
    return [out / path.name for path in new]


def summary(
    preset: models.Preset, prompts: PromptSet, measured: Measurements, written: list[Path]
) -> int:
    """Print what was measured; the exit code is 1 when it can't be trusted."""
    print(f"model      {preset.model} ({preset.kind})")
    print(f"prompts    {len(prompts.prompts)} ({prompts.name})")
    for mode, repeats in measured.repeats.items():
        figures = timing.summarise(repeats)
        print(
            f"{mode:10} {figures['tokens_per_sec']:.1f} tokens/s, median of {len(repeats)} passes "
            f"{figures['median_wall_time_sec']:.2f} s"
        )
    if len(measured.repeats) == 2:
        cost = overhead(measured)
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
    routes = [str(path) for path in written if path.name == ROUTES]
    print(f"next       python make_hist.py {routes[0]}" if routes else "next       --mode log")
    return 0 if trusted else 1


if __name__ == "__main__":
    sys.exit(run(main))
