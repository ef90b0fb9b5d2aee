# SPDX-License-Identifier: Apache-2.0
"""A recording with a bound on its files' size: it ends there, or goes on in a next file.

Every file is a complete log, with a header and an end record of its own. The end record of one
that is followed by another has ``"reason":"rotate"`` and names it in ``next``. Runs on the writer
thread.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.moe_routes.errors import ConflictError
from vllm.moe_routes.schema import Record
from vllm.moe_routes.writing.open_log import OpenLog
from vllm.moe_routes.writing.rows import Step
from vllm.moe_routes.writing.verdicts import Verdict, merged


class RotatingLog:
    """A ``writer.Sink`` over one log after another.

    Args:
        make: creates the log at a path; the second argument goes into its header.
        path: the first log.
        max_bytes: no file grows past it, but where a single pass does; None: no bound.
        rotate: go on in a next file there; else the recording ends.
    """

    def __init__(
        self,
        make: Callable[[Path, Record], OpenLog],
        path: Path,
        max_bytes: int | None,
        rotate: bool,
    ) -> None:
        self.path = path
        self._make = make
        self._max_bytes = max_bytes
        self._rotate = rotate
        #: The logs so far, in order; the last one is open.
        self._logs = [make(path, {})]
        self.lock = self.current.lock
        #: Whether the recording ended by itself, at its bound.
        self.over = False
        self._rows_past_end = 0

    @property
    def current(self) -> OpenLog:
        """The log that is being written."""
        return self._logs[-1]

    @property
    def files(self) -> list[Path]:
        """The files so far, in order."""
        return [log.path for log in self._logs]

    def consume(self, step: Step) -> None:
        """Write one step, if it has its place."""
        if not self.over and self._max_bytes is not None:
            self._make_room(step, self._max_bytes)
        if self.over:
            self._rows_past_end += self.current.rows_of(step)
        else:
            self.current.consume(step)

    def lose(self, step: Step) -> None:
        """Account for a step that can't be written any more."""
        if self.over:
            self._rows_past_end += self.current.rows_of(step)
        else:
            self.current.lose(step)

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        if not self.over:
            self.current.flush()

    def close(self, reason: str, **facts: Any) -> None:
        """Write the last file's end record, and close it."""
        if not self.over:
            self.current.close(reason, **facts)

    def abandon(self) -> None:
        """Stop writing after an error."""
        if not self.over:
            self.current.abandon()

    @property
    def passes_unfinished(self) -> int:
        """Forward passes that began and never ended."""
        return sum(log.passes_unfinished for log in self._logs)

    @passes_unfinished.setter
    def passes_unfinished(self, total: int) -> None:
        self.current.passes_unfinished += total - self.passes_unfinished

    @property
    def end(self) -> Record | None:
        """The last file's end record with the counters of all files, once it is made."""
        if self.current.end is None or len(self._logs) == 1:
            return self.current.end
        return {**self.current.end, **self.counters(), "self_check": self.verdict()}

    def counts(self) -> npt.NDArray[np.int64]:
        """[3, L, width] of all files."""
        counts = self.current.counts.counts.copy()
        for log in self._logs[:-1]:
            counts += log.counts.counts
        return counts

    def counters(self) -> dict[str, Any]:
        """The counters as they stand, of all files; may be read from any thread."""
        return {
            **_sum([log.counters() for log in self._logs]),
            "rows_past_end": self._rows_past_end,
        }

    def verdict(self) -> Verdict:
        """The self-check as it stands, of all files."""
        return merged([log.verdict() for log in self._logs])

    def _make_room(self, step: Step, limit: int) -> None:
        if not step.req_ids or self.current.fits(step, limit):
            return
        if not self._rotate:
            self.current.close("max_bytes")
            self.over = True
        elif self.current.counters()["passes"]:  # a single pass past the bound has a file to itself
            self._next_file()

    def _next_file(self) -> None:
        fresh = self._create_next()
        try:
            self.current.close("rotate", next=fresh.path.name)
        except BaseException:
            fresh.discard()
            raise
        with self.lock:
            fresh.follow(self.current)
            self._logs.append(fresh)

    def _create_next(self) -> OpenLog:
        """``x.jsonl`` is followed by ``x.2.jsonl``, or the first such name that is free."""
        number = len(self._logs) + 1
        facts = {"part": number, "follows": self.current.path.name}
        for suffix in range(number, number + 1000):
            path = self.path.with_name(f"{self.path.stem}.{suffix}{self.path.suffix}")
            try:
                return self._make(path, {**facts, "files": [path.name]})
            except ConflictError:
                continue
        raise ConflictError(f"route log {path} and many before it exist; move them away")


def _sum(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers added up, name by name and within dictionaries."""
    return {
        name: _sum([item[name] for item in items])
        if isinstance(value, dict)
        else sum(item[name] for item in items)
        for name, value in items[0].items()
    }
