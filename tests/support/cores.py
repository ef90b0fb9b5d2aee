"""Which core an engine of this test process may use, where several test processes run."""

from __future__ import annotations

import os


def own_core() -> dict[str, str]:
    """Environment that keeps an engine's threads off the core of the other test process.

    Two engines that both spin on both cores take many times longer than one after the other.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker.startswith("gw"):
        return {}
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": str(cores[int(worker[2:]) % len(cores)])}
