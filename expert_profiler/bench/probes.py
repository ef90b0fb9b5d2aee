# SPDX-License-Identifier: Apache-2.0
"""Where the recorder's time goes: its functions timed from outside. Runs in the engine's process.

The engine thread's parts take wall time, waits for Python's lock included; the writer thread's
work takes CPU time. What a probe itself costs is measured on a function that does nothing, and
taken off. Probed passes are never timed ones.

The hook is called so often, and does so little, that this would not do: between two layers of the
model a probe meets cold caches, and costs more than the hook. There, chance decides at each call
whether the hook is timed, or a function that does nothing in its place, and the hook goes untimed.
"""

from __future__ import annotations

import importlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

_ROUTES = "vllm.moe_routes."
_MOE = "vllm.model_executor.layers.fused_moe."


class Point(NamedTuple):
    """A function to time: ``owner`` is a class in ``module``, or "" for the module itself."""

    part: str
    module: str
    owner: str
    name: str


#: Parts of a step on the engine thread, where ``end`` holds snapshot, count and enqueue; and what
#: it does once a recording.
ENGINE = (
    Point("hook ops", _MOE + "layer", "", "_log_moe_routes"),
    Point("hook ops", _MOE + "cpu_fused_moe", "", "_log_moe_routes"),
    Point("begin", _ROUTES + "recorder", "Recorder", "begin_step"),
    Point("end", _ROUTES + "recorder", "Recorder", "end_step"),
    Point("snapshot", _ROUTES + "kept", "KeptChoices", "routes"),
    Point("snapshot", _ROUTES + "kept", "KeptChoices", "counts"),
    Point("count", _ROUTES + "kept", "KeptTotals", "_count"),
    Point("enqueue", _ROUTES + "writer", "Writer", "put"),
    Point("start", _ROUTES + "recorder", "Recorder", "start"),
    Point("stop", _ROUTES + "recorder", "Recorder", "stop"),
)
#: The writer thread's work: all that a sink does.
WRITER = tuple(
    Point("writer", _ROUTES + module, owner, name)
    for module, owner in (("session", "Session"), ("passes", "PassLog"))
    for name in ("consume", "flush", "close")
)


#: The part that is held against a function that does nothing, call by call.
OFTEN = "hook ops"
#: Calls of a function that does nothing.
CALIBRATION = 2000


def _nothing(*_: Any) -> None:
    pass


class Spent(NamedTuple):
    """Seconds of one part, and its calls."""

    seconds: float
    calls: int


class Probes:
    """Collects what the points spend while :meth:`on`."""

    def __init__(self) -> None:
        self._spent: dict[str, list[float]] = {}
        self._depth: dict[str, int] = {}
        self._chance = random.Random(0)
        #: Seconds that nothing took in the place of ``OFTEN``.
        self._idle: list[float] = []
        nothing = self._timed("nothing", _nothing, time.perf_counter)
        for _ in range(CALIBRATION):
            nothing()
        self._own = statistics.median(self._spent.pop("nothing"))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Time every point while the context lasts."""
        put_back: list[tuple[Any, str, Any]] = []
        for point in (*ENGINE, *WRITER):
            holder = importlib.import_module(point.module)
            owner = getattr(holder, point.owner) if point.owner else holder
            original = owner.__dict__[point.name]
            put_back.append((owner, point.name, original))
            clock = time.thread_time if point in WRITER else time.perf_counter
            make = self._held_against_nothing if point.part == OFTEN else self._timed
            setattr(owner, point.name, make(point.part, original, clock))
        try:
            yield
        finally:
            for owner, name, original in put_back:
                setattr(owner, name, original)

    def take(self) -> dict[str, Spent]:
        """What was spent since the last call."""
        spent, self._spent = self._spent, {}
        idle, self._idle = self._idle, []
        result = {
            part: Spent(max(0.0, sum(each) - self._own * len(each)), len(each))
            for part, each in spent.items()
        }
        if idle and OFTEN in spent:
            each, calls = spent[OFTEN], len(spent[OFTEN]) + len(idle)
            own = statistics.fmean(each) - statistics.fmean(idle)
            result[OFTEN] = Spent(max(0.0, own * calls), calls)
        return result

    def _held_against_nothing(
        self, part: str, original: Callable[..., Any], clock: Callable[[], float]
    ) -> Callable[..., Any]:
        def timed(*args: Any) -> None:
            is_timed = self._chance.random() < 0.5
            call = original if is_timed else _nothing
            start = clock()
            call(*args)
            spent = clock() - start
            if is_timed:
                self._spent.setdefault(part, []).append(spent)
            else:
                self._idle.append(spent)
                original(*args)

        return timed

    def _timed(
        self, part: str, original: Callable[..., Any], clock: Callable[[], float]
    ) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            depth = self._depth.get(part, 0)
            self._depth[part] = depth + 1
            start = clock()
            try:
                return original(*args, **kwargs)
            finally:
                spent = clock() - start
                self._depth[part] = depth
                if depth == 0:  # a part that calls itself, as close calls flush, counts once
                    self._spent.setdefault(part, []).append(spent)

        return timed
