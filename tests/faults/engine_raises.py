# SPDX-License-Identifier: Apache-2.0
"""A real engine whose model raises on a given forward pass.

Usage: python -m tests.faults.engine_raises MODEL LOG WHERE, WHERE being "here" (the engine runs in
this process) or "core" (in its own, as with vllm serve). Prints a line of JSON: what the caller was
told, and the tokens of all passes before.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

#: The pass that raises, counted from the first of the generation.
PASS = 20
PROMPTS = 8


def break_it(model: Any) -> None:
    """Let the model's forward raise; runs where the model lies, and counts there what it ran."""
    seen = tokens = 0

    def fails(_: Any, __: Any, output: Any) -> None:
        nonlocal seen, tokens
        seen += 1
        if seen == PASS:
            Path(os.environ["TOLD"]).write_text(str(tokens))
            raise RuntimeError("an illegal memory access was encountered")
        tokens += len(output[0])

    # Of the last layer: all experts of this pass have been chosen by then.
    model.model.layers[-1].register_forward_hook(fails)


def main() -> int:
    model, log, where = sys.argv[1:]
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="1" if where == "core" else "0",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # hands break_it over to the other process
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOG_MOE=log,
        TOLD=log + ".told",
    )
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, dtype="float32", max_model_len=512, enforce_eager=True, seed=1,
        enable_prefix_caching=False,
    )  # fmt: skip
    llm.apply_model(break_it)
    prompts = [f"Question {i}: how many rolls are there?" for i in range(PROMPTS)]
    sampling = SamplingParams(max_tokens=450, temperature=0, ignore_eos=True)
    told = "nothing"
    try:
        llm.generate(prompts, sampling, use_tqdm=False)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    tokens = int(Path(log + ".told").read_text())
    print("\n" + json.dumps({"told": told, "tokens": tokens}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
