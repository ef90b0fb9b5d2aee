# SPDX-License-Identifier: Apache-2.0
"""Forks recorders that are ended at a given moment; imports everything once.

Reads lines of LOG, TOLD, SECONDS, SIGNAL and NAME=VALUE …, separated by tabs. The recorder runs
passes, and writes the time and the rows executed so far to TOLD after each of them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.faults.load import Load, group

# isort: split
from vllm.moe_routes import recorder
from vllm.moe_routes.config import RouteLogConfig
from vllm.moe_routes.recording import provenance

from tests.support.fake_runner import FakeRunner


def record(log: str, told: str, switches: dict[str, str]) -> None:
    """Run passes until somebody ends it; SIGTERM and SIGINT exit, as in vLLM's workers."""

    def leave(*_: Any) -> None:
        raise SystemExit

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    part_rows = switches.pop("PART_ROWS", None)
    if part_rows:
        from vllm.moe_routes.writing.formats import parquet

        parquet.PART_ROWS = int(part_rows)
    recorder.get_pp_group = recorder.get_tp_group = group
    provenance.patch_id = lambda: "0123abcd"
    config = RouteLogConfig.from_env({"VLLM_LOG_MOE": log, **switches})
    runner = FakeRunner()
    runner.moe_routes = recorder.Recorder(config, runner)  # type: ignore[arg-type]
    load = Load(runner)
    with Path(told).open("w", buffering=1) as out:
        out.write(f"{time.monotonic()} 0\n")
        try:
            while True:
                load.step()
                out.write(f"{time.monotonic()} {load.rows}\n")
                time.sleep(0.001)  # as an engine's steps leave Python's lock to the writer
        finally:
            runner.moe_routes.shutdown()  # as Worker.shutdown calls it


def main() -> int:
    for line in sys.stdin:
        log, told, seconds, how, *switches = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            os.close(0)
            try:
                record(log, told, dict(item.split("=", 1) for item in switches))
            finally:
                os._exit(0)
        while not (Path(told).exists() and Path(told).stat().st_size):
            time.sleep(0.002)
        threading.Event().wait(float(seconds))
        os.kill(child, int(how))
        os.waitpid(child, 0)
        print("ended", child, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
