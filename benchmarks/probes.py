"""Where the recorder's time goes: its functions timed from outside. Runs in the engine's process.

CPU seconds of the thread that runs a function, so that what other processes do on the machine does
not count. What a probe itself costs is measured on a function that does nothing, and taken off.
Probed passes are never timed ones.
"""

from __future__ import annotations

import importlib
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


#: Parts of a step on the engine thread. ``end`` holds snapshot, count and enqueue.
ENGINE = (
    Point("hook ops", _MOE + "layer", "", "_log_moe_routes"),
    Point("hook ops", _MOE + "cpu_fused_moe", "", "_log_moe_routes"),
    Point("begin", _ROUTES + "recorder", "Recorder", "begin_step"),
    Point("end", _ROUTES + "recorder", "Recorder", "end_step"),
    Point("snapshot", _ROUTES + "recording", "", "put_together"),
    Point("snapshot", _ROUTES + "snapshot", "HostSnapshotter", "take"),
    Point("count", _ROUTES + "counting", "HostCounter", "add"),
    Point("count", _ROUTES + "counting", "HostCounter", "take"),
    Point("enqueue", _ROUTES + "writer", "Writer", "put"),
)
#: The writer thread's work: all that a sink does.
WRITER = tuple(
    Point("writer", _ROUTES + module, owner, name)
    for module, owner in (("session", "Session"), ("passes", "PassLog"))
    for name in ("consume", "flush", "close")
)


#: Calls of a function that does nothing.
CALIBRATION = 2000


class Spent(NamedTuple):
    """CPU seconds and calls of one part."""

    seconds: float
    calls: int


class Probes:
    """Adds up what the points spend while :meth:`on`."""

    def __init__(self) -> None:
        self._own = 0.0
        self._seconds: dict[str, float] = {}
        self._calls: dict[str, int] = {}
        self._depth: dict[str, int] = {}
        nothing = self._timed("nothing", lambda: None)
        for _ in range(CALIBRATION):
            nothing()
        self._own = self.take()["nothing"].seconds / CALIBRATION

    @contextmanager
    def on(self) -> Iterator[None]:
        """Time every point while the context lasts."""
        put_back: list[tuple[Any, str, Any]] = []
        for point in (*ENGINE, *WRITER):
            holder = importlib.import_module(point.module)
            owner = getattr(holder, point.owner) if point.owner else holder
            original = owner.__dict__[point.name]
            put_back.append((owner, point.name, original))
            setattr(owner, point.name, self._timed(point.part, original))
        try:
            yield
        finally:
            for owner, name, original in put_back:
                setattr(owner, name, original)

    def take(self) -> dict[str, Spent]:
        """What was spent since the last call."""
        spent = {
            part: Spent(max(0.0, seconds - self._calls[part] * self._own), self._calls[part])
            for part, seconds in self._seconds.items()
        }
        self._seconds, self._calls = {}, {}
        return spent

    def _timed(self, part: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            depth = self._depth.get(part, 0)
            self._depth[part] = depth + 1
            start = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                self._depth[part] = depth
                if depth == 0:  # a part that calls itself, as close calls flush, counts once
                    spent = time.thread_time() - start
                    self._seconds[part] = self._seconds.get(part, 0.0) + spent
                    self._calls[part] = self._calls.get(part, 0) + 1

        return timed
