# SPDX-License-Identifier: Apache-2.0
"""Timed passes over the same prompts in one engine, recording and not, in turn."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expert_profiler.errors import UserError
from expert_profiler.run import engine, timing
from expert_profiler.run.run_folder import MODES, ROUTES

#: Output tokens a prompt in the warm-up pass: enough to run prefill and decode in a full batch.
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

    def overhead(self) -> dict[str, Any] | None:
        """What recording costs; None unless both modes ran."""
        if len(self.repeats) < len(MODES):
            return None
        return timing.overhead(*(self.repeats[mode] for mode in MODES))


def measure(
    args: argparse.Namespace,
    settings: dict[str, Any],
    prompts: Sequence[str],
    stage: Path,
    terminal: Any,
) -> Measurements:
    """Start the engine, warm it up, and run the passes, modes alternating.

    Args:
        args: of ``profile_options``.
        settings: arguments of ``vllm.LLM``.
        prompts: of every pass.
        stage: folder for the log of the last recording pass.
        terminal: stream for the progress bar.
    """
    if args.mode == "no_log":
        os.environ.pop("VLLM_LOG_MOE", None)
    else:
        os.environ["VLLM_LOG_MOE"] = str(stage / ROUTES)
        os.environ["VLLM_LOG_MOE_LAYERS"] = args.layers
        os.environ["VLLM_LOG_MOE_AUTOSTART"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; only the CPU backend reads it
    llm = engine.start(settings, stage / "engine.log")
    from tqdm import tqdm
    from vllm.sampling_params import SamplingParams

    def sampling(max_tokens: int) -> Any:
        return SamplingParams(max_tokens=max_tokens, temperature=args.temperature, seed=args.seed)

    _check_lengths(llm, prompts, args.max_tokens, settings["max_model_len"])
    llm.generate(prompts, sampling(WARMUP_TOKENS), use_tqdm=False)

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
                    llm, prompts, sampling(args.max_tokens), record_to
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


def _check_lengths(llm: Any, prompts: Sequence[str], max_tokens: int, max_model_len: int) -> None:
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
