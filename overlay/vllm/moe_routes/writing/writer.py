# SPDX-License-Identifier: Apache-2.0
"""A bounded queue and the thread behind it: the only place that encodes, checks or writes."""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vllm.logger import init_logger
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.writing.rows import Step

logger = init_logger(__name__)

#: How long passes gather before the thread takes them, at most. It would otherwise wake up for each
#: of them, just when the engine's thread needs Python's lock, and do the same work dearer.
GATHER_SECONDS = 0.5
#: Part of the queue that may fill before it takes them at once.
GATHER_SHARE = 8


class Sink(Protocol):
    """What the thread drives: a ``RotatingLog``, or a single log."""

    path: Path

    def consume(self, step: Step) -> None: ...
    def lose(self, step: Step) -> None: ...
    def flush(self) -> None: ...
    def close(self, reason: str, **facts: Any) -> None: ...
    def abandon(self) -> None: ...


def _leave_the_engines_core() -> None:
    """Let this thread run on every core that any thread of this process may use.

    A thread inherits the cores of the one that starts it, and vLLM's CPU backend binds the engine
    thread to a single one: the writer would only ever run in its place.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended
            cores |= os.sched_getaffinity(int(thread))
    with contextlib.suppress(OSError):  # a container may forbid it: then things stay as they are
        os.sched_setaffinity(0, cores)


def _size(step: Step) -> int:
    """Bytes that a step takes in the queue: those of its routes or counts."""
    return 0 if step.pending is None else step.pending.nbytes


class Writer:
    """Feeds steps to a sink on a thread of its own.

    A sink's error never reaches the engine: recording stops, :attr:`error` says why, and every
    later step is counted as lost. The sink may still write that into its end record.

    Args:
        sink: receives the steps in order.
        queue_bytes: bound of the routes that wait. One step is let in whatever its size.
        on_full: "block" waits for room; "drop" queues the step without its routes.
        flush_seconds: longest time from a step's put to the flush after it.
    """

    def __init__(self, sink: Sink, queue_bytes: int, on_full: str, flush_seconds: float) -> None:
        self._sink = sink
        self._queue_bytes = queue_bytes
        self._block = on_full == "block"
        self._gather_seconds = min(GATHER_SECONDS, flush_seconds / 2)
        self._flush_seconds = flush_seconds - self._gather_seconds
        self._steps: deque[Step] = deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        #: Whether the thread waits for a first step, and must be woken up for it.
        self._idle = False
        #: Somebody waits for the queue to empty.
        self._hurry = False
        self._closing: str | None = None
        self.error: str | None = None
        self._abandoned = False
        #: Whether the thread is through; see :meth:`_join`.
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="moe-routes-writer", daemon=True)
        self._thread.start()

    @property
    def waiting_bytes(self) -> int:
        """Bytes of routes that wait now."""
        return self._waiting_bytes

    @property
    def waiting_steps(self) -> int:
        """Steps that wait now, the one being written included."""
        return len(self._steps)

    @property
    def closing(self) -> bool:
        """Whether it was told to close."""
        return self._closing is not None

    @property
    def closed(self) -> bool:
        """Whether the end record is written, or the file given up."""
        return self._ended

    def put(self, step: Step) -> None:
        """Queue a step. Called on the engine thread."""
        size = _size(step)
        with self._changed:
            if self._block:
                if not self._has_room(size):
                    self._hurry = True
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self._has_room(size) or self.closing)
            elif not self._has_room(size):
                step, size = step._replace(pending=None), 0
            if self._closing is not None:
                self._sink.lose(step)  # closed early, while this pass ran
                return
            self._steps.append(step)
            self._waiting_bytes += size
            if self._idle or self._is_due():
                self._changed.notify_all()

    def drain(self, timeout: float) -> None:
        """Wait until everything put so far is written, for ``timeout`` seconds at most."""
        with self._changed:
            if self._steps:
                self._hurry = True
                self._changed.notify_all()
            self._changed.wait_for(lambda: not self._steps or self.closed, timeout)

    def close(self, reason: str, timeout: float) -> None:
        """Write what waits and the end record.

        Args:
            reason: for the end record.
            timeout: seconds to wait for that; 0 does not wait, see :attr:`closed`.

        Raises:
            RouteLogError: it took longer than ``timeout`` seconds, or writing failed.
        """
        with self._changed:
            self._closing = self._closing or reason
            self._changed.notify_all()
        if timeout == 0:
            return
        if not self._join(timeout):
            raise RouteLogError(
                f"route log {self._sink.path} was not closed within {timeout:g} s: "
                f"{len(self._steps)} passes still wait; the disk is slow, read its status again"
            )
        if self.error is not None:
            raise RouteLogError(self.error)

    def _join(self, timeout: float) -> bool:
        """Wait for the thread; whether it is through.

        Once a signal handler has raised in ``Thread.join``, it takes the thread for ended before
        Python 3.13, and a lock may stay behind as it was: so no lock is waited for after it.
        """
        deadline = time.monotonic() + timeout
        self._thread.join(timeout)
        while not self._ended and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._ended

    def fail(self, error: Exception) -> None:
        """Stop writing, for good: a step could not be taken or written. Called on any thread."""
        with self._changed:
            if self.error is None:
                self.error = f"route log {self._sink.path}: {type(error).__name__}: {error}"
                logger.error(
                    "Recording stopped; generation goes on. %s", self.error, exc_info=error
                )
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        fits = self._waiting_bytes + size <= self._queue_bytes
        # A step without routes takes no room, and waiting for some could outlast a shutdown.
        return size == 0 or fits or not self._steps or self.error is not None

    def _is_due(self) -> bool:
        """Whether the thread should take what waits at once."""
        full = self._waiting_bytes * GATHER_SHARE >= self._queue_bytes
        return self._hurry or full or self._closing is not None or self.error is not None

    def _wait(self, flush_at: float | None) -> tuple[int, str | None]:
        """Wait for steps, and for more of them, or for the time to flush.

        Returns:
            How many there are, and why to close, if that is asked.
        """
        left = None if flush_at is None else max(0.0, flush_at - time.monotonic())
        with self._changed:
            if not self._steps:
                self._hurry, self._idle = False, True
                self._changed.wait_for(lambda: self._steps or self._closing is not None, left)
                self._idle = False
            if self._steps:
                gather = self._gather_seconds if left is None else min(self._gather_seconds, left)
                self._changed.wait_for(self._is_due, gather)
            return len(self._steps), self._closing

    def _run(self) -> None:
        try:
            self._drive()
        finally:
            self._ended = True
            with self._changed:  # somebody may wait for the queue to empty
                self._changed.notify_all()

    def _drive(self) -> None:
        _leave_the_engines_core()
        flush_at: float | None = None
        while True:
            num_steps, closing = self._wait(flush_at)
            for _ in range(num_steps):
                # A step stays queued, and counted, until it is written.
                step = self._steps[0]
                self._write(step)
                flush_at = self._flush(flush_at or time.monotonic() + self._flush_seconds)
                with self._changed:
                    self._steps.popleft()
                    self._waiting_bytes -= _size(step)
                    self._changed.notify_all()
                del step  # else the last pass stays in memory while nothing comes
            if num_steps == 0 and closing is not None:
                self._guard(partial(self._sink.close, closing))
                if self.error is not None:
                    self._end_abandoned()
                return
            flush_at = self._flush(flush_at)

    def _flush(self, at: float | None) -> float | None:
        """Flush if it is time to; when the next one is due, if one is."""
        if at is None or time.monotonic() < at:
            return at
        self._guard(self._sink.flush)
        return None

    def _write(self, step: Step) -> None:
        if not self._guard(lambda: self._sink.consume(step)):
            self._abandon()  # where the engine's thread met the error
            self._sink.lose(step)

    def _guard(self, action: Callable[[], None]) -> bool:
        """Run ``action``; on an error stop writing, for good, and say so once.

        Returns:
            Whether it was done: the engine's thread may meet an error meanwhile.
        """
        if self.error is not None:
            return False
        try:
            action()
            return True
        except Exception as error:  # whatever it is, the engine must go on
            self.fail(error)
            self._abandon()
            return False

    def _abandon(self) -> None:
        if self._abandoned:
            return
        self._abandoned = True
        try:
            self._sink.abandon()
        except Exception:  # this thread must go on: a full queue would block the engine for ever
            logger.exception("%s: its counters may be wrong", self._sink.path)

    def _end_abandoned(self) -> None:
        """Write into the file what was lost, if it can still be written."""
        self._abandon()
        try:
            self._sink.close("error", error=self.error)
        except Exception as error:
            logger.error(
                "%s has no end record (%s: %s); its counters stand in the status only",
                self._sink.path,
                type(error).__name__,
                error,
            )
