# SPDX-License-Identifier: Apache-2.0
"""A worker that a signal handler's SystemExit meets while it closes its recording.

Usage: python -m tests.faults.interrupted LOG METHOD, METHOD being how the worker's process is
started: fork or spawn. Prints the rows that it executed, and where the exception got to.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from typing import Any

from tests.faults.load import Load, group

# isort: split
from vllm.moe_routes import recorder
from vllm.moe_routes.config import RouteLogConfig
from vllm.moe_routes.recording import provenance
from vllm.moe_routes.writing.token_log import TokenLog

from tests.support.fake_runner import FakeRunner

PASSES = 30


def worker(log: str, says: Any) -> None:
    """Ends by itself, and is told to go meanwhile."""

    def leave(*_: Any) -> None:
        raise SystemExit

    signal.signal(signal.SIGTERM, leave)
    recorder.get_pp_group = recorder.get_tp_group = group
    provenance.patch_id = lambda: "0123abcd"
    close = TokenLog.close

    def slow(self: TokenLog, *args: Any, **facts: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # while the main thread waits for this one
        time.sleep(0.5)
        close(self, *args, **facts)

    TokenLog.close = slow  # type: ignore[method-assign]
    runner = FakeRunner()
    config = RouteLogConfig.from_env({"VLLM_LOG_MOE": log})
    runner.moe_routes = recorder.Recorder(config, runner)  # type: ignore[arg-type]
    load = Load(runner)
    for _ in range(PASSES):
        load.step()
    try:
        runner.moe_routes.shutdown()
        says.send((load.rows, "nowhere"))
    except SystemExit:
        says.send((load.rows, "shutdown"))
        raise


def main() -> int:
    log, method = sys.argv[1:]
    context = multiprocessing.get_context(method)
    hears, says = context.Pipe(duplex=False)
    process = context.Process(target=worker, args=(log, says))
    process.start()
    says.close()
    print(*hears.recv(), flush=True)
    process.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
