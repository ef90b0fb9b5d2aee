# SPDX-License-Identifier: Apache-2.0
"""The options of ``expert-profiler profile``, run_profile.py and ``./test.sh run``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from expert_profiler.errors import parsed, positive
from expert_profiler.run.models import PRESETS
from expert_profiler.run.run_folder import MODES


def parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Generate offline with vLLM, record every token's experts, and measure what "
        "recording costs. Writes prompts.txt, moe_routes.jsonl, outputs.jsonl and timing.json "
        "into --out; everything that can be wrong is checked before the model is loaded.",
        epilog="next: expert-profiler report moe_routes.jsonl --out report/",
    )
    add = parser.add_argument
    add("--model", default="auto", help="auto (gptq with CUDA, demo without), "
        f"{', '.join(PRESETS)}, a hub id or a checkpoint folder [auto]")  # fmt: skip
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
