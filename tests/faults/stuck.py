# SPDX-License-Identifier: Apache-2.0
"""A worker whose main thread waits in a collective for a rank that is gone: signals don't reach it.

Usage: python -m tests.faults.stuck LOG STORE. Starts two processes as vLLM starts its workers. The
second records, then waits for the first in gloo. Prints the id of the second once it waits there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.faults.load import Load, group

# isort: split
import torch
from vllm.moe_routes import recorder
from vllm.moe_routes.config import RouteLogConfig
from vllm.moe_routes.recording import provenance

from tests.support.fake_runner import FakeRunner

PASSES = 30


def join(rank: int, store: str) -> None:
    """The process group of the two."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )


def absent(store: str) -> None:
    """Rank 0: never sends."""
    join(0, store)
    time.sleep(600)


def worker(log: str, store: str, says: Any) -> None:
    """Rank 1, with the signal handler and the shutdown of vLLM's workers."""

    def leave(*_: Any) -> None:
        Path(log + ".handled").touch()
        raise SystemExit

    signal.signal(signal.SIGTERM, leave)
    recorder.get_pp_group = recorder.get_tp_group = group
    provenance.patch_id = lambda: "0123abcd"
    join(1, store)
    runner = FakeRunner()
    config = RouteLogConfig.from_env({"VLLM_LOG_MOE": log})
    runner.moe_routes = recorder.Recorder(config, runner)  # type: ignore[arg-type]
    try:
        load = Load(runner)
        for _ in range(PASSES):
            load.step()
        forward = runner.forward

        def waits(n: int) -> list[list[int]]:
            says.send((os.getpid(), load.rows))
            torch.distributed.recv(torch.zeros(1), src=0)
            return forward(n)

        runner.forward = waits  # type: ignore[method-assign]
        load.step()
    finally:
        runner.moe_routes.shutdown()


def main() -> int:
    log, store = sys.argv[1:]
    context = multiprocessing.get_context("fork")
    hears, says = context.Pipe(duplex=False)
    others = [
        context.Process(target=absent, args=(store,), daemon=True),
        context.Process(target=worker, args=(log, store, says), daemon=True),
    ]
    for process in others:
        process.start()
    print(*hears.recv(), flush=True)
    sys.stdin.read()
    for process in others:
        process.kill()
        process.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
