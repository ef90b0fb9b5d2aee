# SPDX-License-Identifier: Apache-2.0
"""A recording with a bound on its files' size: it ends there, or goes on in a next file.

Every file is a complete log, with a header and an end record of its own. The end record of one
that is followed by another has ``"reason":"rotate"`` and names it in ``next``. Runs on the writer
thread.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from vllm.moe_routes.counts import Tally
from vllm.moe_routes.errors import ConflictError
from vllm.moe_routes.writing.rows import Step


class Part(Protocol):
    """One file: ``session.Session`` or ``passes.PassLog``."""

    path: Path
    lock: threading.Lock
    tally: Tally
    passes_unfinished: int
    end: dict[str, Any] | None

    def follow(self, before: Any) -> None: ...
    def fits(self, step: Step, limit: int) -> bool: ...
    def consume(self, step: Step) -> None: ...
    def lose(self, step: Step) -> None: ...
    def flush(self) -> None: ...
    def close(self, reason: str, **facts: Any) -> None: ...
    def abandon(self) -> None: ...
    def discard(self) -> None: ...
    def totals(self) -> dict[str, Any]: ...
    def verdict(self) -> dict[str, Any]: ...


class Chain:
    """A ``writer.Sink`` over one file after another.

    Args:
        make: creates the file at a path; the second argument goes into its header.
        path: the first file.
        max_bytes: no file grows past it, but where a single pass does; None: no bound.
        rotate: go on in a next file there; else the recording ends.
        num_layers: rows a token stands for.
    """

    def __init__(
        self,
        make: Callable[[Path, dict[str, Any]], Part],
        path: Path,
        max_bytes: int | None,
        rotate: bool,
        num_layers: int,
    ) -> None:
        self.path = path
        #: The files so far, in order.
        self.files = [path]
        self._make = make
        self._max_bytes = max_bytes
        self._rotate = rotate
        self._num_layers = num_layers
        self._before: list[Part] = []
        self.current = make(path, {})
        self.lock = self.current.lock
        #: Whether the recording ended by itself, at its bound.
        self.over = False
        self._rows_past_end = 0

    def consume(self, step: Step) -> None:
        """Write one step, if it has its place."""
        if not self.over and self._max_bytes is not None:
            self._make_room(step, self._max_bytes)
        if self.over:
            self._rows_past_end += self._rows_of(step)
        else:
            self.current.consume(step)

    def lose(self, step: Step) -> None:
        """Account for a step that can't be written any more."""
        if self.over:
            self._rows_past_end += self._rows_of(step)
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
        return sum(part.passes_unfinished for part in [*self._before, self.current])

    @passes_unfinished.setter
    def passes_unfinished(self, total: int) -> None:
        before = sum(part.passes_unfinished for part in self._before)
        self.current.passes_unfinished = total - before

    @property
    def end(self) -> dict[str, Any] | None:
        """The last file's end record with the figures of all files, once it is written."""
        if self.current.end is None or not self._before:
            return self.current.end
        return {**self.current.end, **self.totals(), "self_check": self.verdict()}

    def counts(self) -> npt.NDArray[np.int64]:
        """[3, L, width] of all files."""
        counts = self.current.tally.counts.copy()
        for part in self._before:
            counts += part.tally.counts
        return counts

    def totals(self) -> dict[str, Any]:
        """The counters as they stand, of all files; may be read from any thread."""
        totals = _sum([part.totals() for part in [*self._before, self.current]])
        return {**totals, "rows_past_end": self._rows_past_end}

    def verdict(self) -> dict[str, Any]:
        """The self-check as it stands: of every check, what the first file says that failed it."""
        verdicts = [part.verdict() for part in [*self._before, self.current]]
        if len(verdicts) == 1:
            return verdicts[0]
        checks = [
            next((check for check in same if check["verdict"] == "fail"), same[-1])
            for same in zip(*(verdict["checks"] for verdict in verdicts), strict=True)
        ]
        failed = any(verdict["verdict"] == "fail" for verdict in verdicts)
        return {"verdict": "fail" if failed else "pass", "checks": checks}

    def _make_room(self, step: Step, limit: int) -> None:
        if not step.req_ids or self.current.fits(step, limit):
            return
        if not self._rotate:
            self.current.close("max_bytes")
            self.over = True
        elif self.current.totals()["passes"]:  # a single pass past the bound has a file to itself
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
            self._before.append(self.current)
            self.current = fresh
            self.files.append(fresh.path)

    def _create_next(self) -> Part:
        """``x.jsonl`` is followed by ``x.2.jsonl``, or the first such name that is free."""
        number = len(self.files) + 1
        facts = {"part": number, "follows": self.current.path.name}
        for suffix in range(number, number + 1000):
            path = self.path.with_name(f"{self.path.stem}.{suffix}{self.path.suffix}")
            try:
                return self._make(path, {**facts, "files": [path.name]})
            except ConflictError:
                continue
        raise ConflictError(f"route log {path} and many before it exist; move them away")

    def _rows_of(self, step: Step) -> int:
        return int(step.num_scheduled_tokens.sum()) * self._num_layers


def _sum(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers added up, name by name and within dictionaries."""
    if len(items) == 1:
        return items[0]
    return {
        name: _sum([item[name] for item in items])
        if isinstance(value, dict)
        else sum(item[name] for item in items)
        for name, value in items[0].items()
    }
