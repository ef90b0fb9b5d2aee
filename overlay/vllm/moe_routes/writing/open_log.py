# SPDX-License-Identifier: Apache-2.0
"""A log that is being written: what the logs of the modes per_pass and per_token share."""

import threading
from abc import ABC, abstractmethod
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vllm.moe_routes.counts import RunningCounts, Shape
from vllm.moe_routes.schema import END, END_KEYS, Record
from vllm.moe_routes.writing.formats.route_file import RouteFile
from vllm.moe_routes.writing.rows import Step
from vllm.moe_routes.writing.verdicts import Check, Verdict, check_none, verdict

#: Bound of an end record without its ``expert_counts``.
END_BYTES = 64 << 10


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class OpenLog(ABC):
    """One log, from its header to its end record. Runs on the writer thread.

    Args:
        path: of the log.
        file: the log's, whose header is in it.
        shape: what is counted over.

    Attributes:
        lock: held while the counters change, so that a dump sees whole passes only.
        rows: rows written. A row is one token in one layer.
        passes_unfinished: forward passes that began and never ended: the engine raised an error.
        drops: rows lost, by cause.
        rows_skipped: rows left out because their requests are not sampled.
        end: the end record without its ``expert_counts``, once it is made.
    """

    def __init__(self, path: Path, file: RouteFile, shape: Shape) -> None:
        self.path = path
        self.shape = shape
        self.counts = RunningCounts(shape)
        self.lock = threading.Lock()
        self.rows = self.rows_flagged = self.requests = 0
        self.passes_unfinished = 0
        self.drops = {"queue_full": 0, "not_captured": 0, "write_error": 0}
        self.rows_skipped = 0
        self.end: Record | None = None
        self._file = file
        self._abandoned = False

    def follow(self, before: Any) -> None:
        """Go on where ``before``, a log of the same kind, ended."""
        self.lock = before.lock

    def fits(self, step: Step, limit: int) -> bool:
        """Whether the file, with the step and an end, stays within ``limit`` bytes."""
        most = self._most_bytes(step)  # first: it makes the lines that wait
        return self._file.bytes + most <= limit

    @abstractmethod
    def consume(self, step: Step) -> None:
        """Write one step."""

    def lose(self, step: Step) -> None:
        """Account for a step that can't be written any more."""
        self.rows_skipped += step.skipped * len(self.shape.layers)
        self.drops["write_error"] += self.rows_of(step)

    def rows_of(self, step: Step) -> int:
        """Rows that the step's tokens amount to."""
        return int(step.num_scheduled_tokens.sum()) * len(self.shape.layers)

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        self._file.flush()

    def close(self, reason: str, **facts: Any) -> None:
        """Write the end record and close the file.

        Args:
            reason: for the end record.
            facts: more for it.
        """
        if self._abandoned:
            self._file.close_abandoned(lambda: self._make_end(reason, facts))
        else:
            self._file.flush()  # so that the end record knows every byte before it
            self._file.close(self._make_end(reason, facts))

    def abandon(self) -> None:
        """Stop writing after an error, and count what was believed written and is not."""
        self._abandoned = True
        self.end = None
        self._file.abandon()
        self._count_durable()

    def discard(self) -> None:
        """Remove the log: nothing was recorded in it."""
        self._file.discard()

    def counters(self) -> dict[str, Any]:
        """The counters as they stand; may be read from any thread."""
        return {
            "rows": self.rows,
            "passes": sum(self.counts.passes),
            "passes_unfinished": self.passes_unfinished,
            **self.counts.facts(),
            "bytes": self._file.bytes,
            "drops": dict(self.drops),
            "rows_skipped": self.rows_skipped,
        }

    def verdict(self) -> Verdict:
        """The self-check as it stands."""
        lost = self.drops["write_error"]
        reached = check_none("every row reached the file", lost, "rows lost to a write error")
        return verdict([*self._checks(), reached])

    @abstractmethod
    def _checks(self) -> list[Check]:
        """What is checked of the rows that were to be written."""

    @abstractmethod
    def _most_bytes(self, step: Step) -> int:
        """A bound of the bytes that the step and an end after it take."""

    def _sums(self) -> Record:
        """What an end record sums up beside the counters."""
        return {}

    def _make_end(self, reason: str, facts: Record) -> Record:
        if self._abandoned:
            self._count_durable()
        known = {"type": END, "reason": reason, **facts, **self.counters(), **self._sums()}
        known |= {"self_check": self.verdict(), "end_time": now()}
        end = {key: known[key] for key in sorted(known, key=END_KEYS.index)}
        self.end = {key: value for key, value in end.items() if key != "expert_counts"}
        return end

    def _count_durable(self) -> None:
        durable = self._file.durable
        with self.lock:
            # Below zero for a moment, where the pass that failed got into the file in part: all
            # of its rows are about to be counted as lost.
            self.drops["write_error"] += self.rows - durable.rows
            self.rows, self.rows_flagged, self.requests = durable
