# SPDX-License-Identifier: Apache-2.0
"""A real engine in processes of its own, under load, that is ended in a given way.

Usage: python -m tests.faults.engine_process MODEL LOG HOW SECONDS, HOW being "shutdown" (vLLM's
own, which sends SIGTERM) or "kill" (SIGKILL of the engine's process). Prints how long it took.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any


def main() -> int:
    model, log, how, seconds = sys.argv[1:]
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOG_MOE=log
    )
    import psutil
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, dtype="float32", max_model_len=512, enforce_eager=True, seed=1,
        enable_prefix_caching=False,
    )  # fmt: skip

    def generate() -> None:
        prompts = [f"Question {i}: how many rolls are there?" for i in range(16)]
        sampling = SamplingParams(max_tokens=450, temperature=0, ignore_eos=True)
        llm.generate(prompts, sampling, use_tqdm=False)

    threading.excepthook = lambda _: None  # it ends when the engine does
    threading.Thread(target=generate, daemon=True).start()
    while os.path.getsize(log) < 200_000:  # noqa: PTH202
        time.sleep(0.01)
    time.sleep(float(seconds))
    engines = psutil.Process().children(recursive=True)
    started = time.monotonic()
    if how == "kill":
        for process in engines:
            os.kill(process.pid, signal.SIGKILL)
        psutil.wait_procs(engines, 60)
    else:
        client: Any = llm.llm_engine.engine_core
        client.shutdown()
    print(f"ended {time.monotonic() - started:.2f}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
