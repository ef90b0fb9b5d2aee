# SPDX-License-Identifier: Apache-2.0
"""How long a forward pass takes, measured without waiting for the device."""

import time
from collections.abc import Callable
from typing import Protocol

import torch

#: Gives seconds; called off the engine thread, once the pass has ended.
Elapsed = Callable[[], float]


def not_timed() -> float:
    """Stands for the time of a step that nobody timed."""
    raise RuntimeError("this step was not timed")


class Clock(Protocol):
    def start(self) -> None:
        """A step begins."""

    def stop(self) -> Elapsed:
        """Its forward pass is under way or done."""


class HostClock:
    """For a device that has done its work when the call returns."""

    def __init__(self) -> None:
        self._started = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> Elapsed:
        seconds = time.perf_counter() - self._started
        return lambda: seconds


class CudaClock:
    """Two events on the compute stream: from the step's preparation to its last kernel.

    Reading them waits for the second one, which is why only the writer thread reads them.
    """

    def __init__(self) -> None:
        self._started = torch.cuda.Event(enable_timing=True)

    def start(self) -> None:
        self._started = torch.cuda.Event(enable_timing=True)
        self._started.record()

    def stop(self) -> Elapsed:
        started, ended = self._started, torch.cuda.Event(enable_timing=True)
        ended.record()

        def elapsed() -> float:
            ended.synchronize()
            return float(started.elapsed_time(ended)) / 1000

        return elapsed


#: Device type -> its clock; the same types as ``snapshot.SNAPSHOTTERS``.
CLOCKS: dict[str, Callable[[], Clock]] = {"cpu": HostClock, "cuda": CudaClock}
