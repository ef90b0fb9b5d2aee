# SPDX-License-Identifier: Apache-2.0
"""A device whose streams run when a test says so, in any order that real ones could run in.

Inside ``with device:`` every kernel is put on the current stream's list instead of being run;
views are made at once. ``Event.synchronize`` then runs the lists, letting ``order`` choose the
next stream among those that may go on. What CUDA leaves undefined is made visible: memory that
nothing was written to, and memory that was freed, holds ``GARBAGE``.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

GARBAGE = 77

Order = Callable[[Sequence["FakeStream"]], "FakeStream"]


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name = name
        #: (may it run now?, run it)
        self.work: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()
        self.enqueued = 0
        self.done = 0

    def put(self, run: Callable[[], None], ready: Callable[[], bool] = lambda: True) -> None:
        self.work.append((ready, run))
        self.enqueued += 1

    def wait_stream(self, other: FakeStream) -> None:
        upto = other.enqueued
        self.put(lambda: None, lambda: other.done >= upto)

    def may_go_on(self) -> bool:
        return bool(self.work) and self.work[0][0]()

    def go_on(self) -> None:
        _, run = self.work.popleft()
        run()
        self.done += 1


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self._reached: Callable[[], bool] = lambda: True

    def record(self, stream: FakeStream) -> None:
        upto = stream.enqueued
        self._reached = lambda: stream.done >= upto

    def synchronize(self) -> None:
        self._device.run_until(self._reached)


class FakeDevice(TorchDispatchMode):
    """The mode that defers kernels, and the ``CudaStreams`` of ``snapshot``."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self._order = order
        self.compute = FakeStream("compute")
        self._streams = [self.compute]
        self._current = self.compute

    # ---- CudaStreams -----------------------------------------------------------------------

    def current_stream(self) -> FakeStream:
        return self._current

    def new_stream(self) -> FakeStream:
        self._streams.append(FakeStream("side"))
        return self._streams[-1]

    def new_event(self) -> FakeEvent:
        return FakeEvent(self)

    @contextmanager
    def use(self, stream: FakeStream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def pinned_like(self, tensor: Tensor) -> Tensor:
        with _disable_current_modes():
            return torch.full(tensor.shape, GARBAGE, dtype=tensor.dtype)

    # ---- running -------------------------------------------------------------------------

    def run_until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            ready = [stream for stream in self._streams if stream.may_go_on()]
            assert ready, "the streams wait for each other"
            self._order(ready).go_on()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        if func.is_view:
            return func(*args, **kwargs or {})
        if func is aten.clone.default:
            (source,) = args
            result = torch.full(source.shape, GARBAGE, dtype=source.dtype)
            self._current.put(lambda: _ignore(result.copy_(source)))
            return result
        if func is aten.fill_.Scalar:
            target, value = args
            self._current.put(lambda: _ignore(target.fill_(value)))
            return target
        if func is aten.copy_.default:
            return self._copy(args[0], args[1])
        raise AssertionError(f"{func} would wait for the device, or is new here")

    def _copy(self, target: Tensor, source: Tensor) -> Tensor:
        if self._current is self.compute:
            self._current.put(lambda: _ignore(target.copy_(source)))
            return target
        # Another stream's reading doesn't keep memory: once freed, it is used for something else.
        alive = weakref.ref(source)

        def run() -> None:
            memory = alive()
            target.fill_(GARBAGE) if memory is None else target.copy_(memory)

        self._current.put(run)
        return target


def _ignore(_: Tensor) -> None:
    return
