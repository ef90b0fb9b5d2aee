# SPDX-License-Identifier: Apache-2.0
"""One recording: one file, from its header to its end record. Runs on the writer thread."""

import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from vllm.moe_routes.counts import Shape, Tally, count_choices, pass_tokens
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.writing import formats
from vllm.moe_routes.writing.rows import Request, RequestBook, Step
from vllm.moe_routes.writing.self_check import SelfCheck

#: Bounds of an end record, and of a request's record without its two ids.
_END_BYTES = 64 << 10
_REQUEST_BYTES = 320


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def with_write_errors(verdict: dict[str, Any], rows: int) -> dict[str, Any]:
    """The verdict, with whether every row reached the file."""
    ended = "fail" if rows else "pass"
    check = {
        "name": "every row reached the file",
        "verdict": ended,
        "detail": f"{rows} rows lost to a write error",
    }
    overall = "fail" if rows else verdict["verdict"]
    return {"verdict": overall, "checks": [*verdict["checks"], check]}


def _json_length(text: str) -> int:
    """Most bytes that a string takes as JSON."""
    return 6 * len(text) if not text.isascii() or not text.isprintable() else 2 * len(text) + 4


class Session:
    """Turns steps into records, and accounts for them.

    Args:
        path: log to create; the header is written and flushed before this returns.
        header: the meta record without its ``start_time``.
        layers: the recorded layers, in slot order; at least one.
        not_an_id: the value of an element that no layer wrote.
        weights: precision to keep weights in, one of ``config.WEIGHTS``.
        private: the log is its owner's only.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        layers: Sequence[MoELayer],
        not_an_id: int,
        weights: str = "float32",
        private: bool = False,
    ) -> None:
        self.path = path
        self._layers = list(layers)
        self._book = RequestBook()
        self._check = SelfCheck(layers, not_an_id)
        self._shape = Shape.of(layers)
        self.tally = Tally(self._shape)
        #: Held while the tally changes, so that a dump sees whole passes only.
        self.lock = threading.Lock()
        self.rows = 0
        self.rows_flagged = 0
        self.passes = 0
        self.requests = 0
        #: Forward passes that began and never ended: the engine raised an error in them.
        self.passes_unfinished = 0
        self.cached_tokens = 0
        self.missed_tokens = 0
        #: Rows lost, by cause. A row is one token in one layer.
        self.drops = {"queue_full": 0, "not_captured": 0, "write_error": 0}
        #: Rows left out because their requests are not sampled.
        self.rows_skipped = 0
        self._abandoned = False
        self.started = time.time()
        #: The end record, once it is written.
        self.end: dict[str, Any] | None = None
        facts = {"weights_dtype": weights, "start_time": now()}
        self._file = formats.create(path, {**header, **facts}, self._layers, weights, private)

    def follow(self, before: "Session") -> None:
        """Go on where ``before`` ended: with the requests that are still running."""
        self._book = before._book
        self.lock = before.lock

    def fits(self, step: Step, limit: int) -> bool:
        """Whether the file, with the step and an end, stays within ``limit`` bytes."""
        tokens = int(step.num_scheduled_tokens.sum()) if step.pending is not None else 0
        longest = max((_json_length(raw_id) for raw_id in step.req_ids), default=0)
        # The records of the requests that are open when the recording ends.
        requests = {*self._book.live_ids, *step.req_ids}
        ends = sum(_REQUEST_BYTES + 2 * _json_length(raw_id) for raw_id in requests)
        most = self._file.most_bytes(tokens * len(self._layers), longest)
        return self._file.bytes + most + ends + _END_BYTES <= limit

    def consume(self, step: Step) -> None:
        """Write one step. The step's finished requests end before its rows."""
        self._end_requests(self._book.finish(step.finished), finished=True)
        self.rows_skipped += step.skipped * len(self._layers)
        if not step.req_ids:
            return
        num_rows = int(step.num_scheduled_tokens.sum())
        if step.pending is None:
            self._book.place(step, None, np.zeros(num_rows, dtype=bool))
            self._check.dropped(num_rows)
            self.drops["queue_full"] += num_rows * len(self._layers)
            return
        routes = step.pending.resolve()
        good = self._check.step(num_rows, routes.topk_ids, routes.topk_weights)
        every = self._check.was_clean  # nearly always, and there is less to look at then
        rows = self._book.place(step, routes.token_ids, None if every else np.all(good, axis=1))
        written = good.size if every else int(good.sum())
        flagged = int(good[rows.flags != 0].sum()) if rows.flags.any() else 0
        self._file.write_routes(
            step.forward_pass_id, rows, routes.topk_ids, routes.topk_weights, good
        )
        tokens = pass_tokens(
            step.num_scheduled_tokens, step.num_computed_tokens, step.num_prompt_tokens
        )
        counts = count_choices(routes.topk_ids, self._shape)
        with self.lock:
            self.tally.add(tokens, counts)
            self.passes += 1
            self.rows += written
            self.rows_flagged += flagged
            self.drops["not_captured"] = self._check.rows_not_captured

    def lose(self, step: Step) -> None:
        """Account for a step that can't be written any more."""
        self.rows_skipped += step.skipped * len(self._layers)
        self.drops["write_error"] += int(step.num_scheduled_tokens.sum()) * len(self._layers)

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        self._file.flush()

    def close(self, reason: str, **facts: Any) -> None:
        """Write the requests still running and the end record, and close the file.

        Args:
            reason: for the end record.
            facts: more for it. With ``next``, the file to go on in, running requests are not ended.
        """
        if self._abandoned:
            self._file.close_abandoned(lambda: self._honest_end(reason, facts))
            return
        if "next" not in facts:
            self._end_requests(self._book.finish_all(), finished=False)
        self._file.flush()  # so that the end record knows every byte before it
        end = self.end_record(reason, **facts)
        self._file.close(end)
        self.end = end

    def abandon(self) -> None:
        """Stop writing after an error, and count what was believed written and is not."""
        self._abandoned = True
        self._file.abandon()
        self._count_what_is_held()

    def discard(self) -> None:
        """Remove the log: nothing was recorded in it."""
        self._file.discard()

    def _count_what_is_held(self) -> None:
        held = self._file.held
        with self.lock:
            # Below zero for a moment, where the pass that failed got into the file in part: all
            # of its rows are about to be counted as lost.
            self.drops["write_error"] += self.rows - held.rows
            self.rows, self.rows_flagged, self.requests = held

    def _honest_end(self, reason: str, facts: dict[str, Any]) -> dict[str, Any]:
        """The end record of a log that was abandoned."""
        self._count_what_is_held()
        self.end = self.end_record(reason, **facts)
        return self.end

    def end_record(self, reason: str, **facts: Any) -> dict[str, Any]:
        """The end record, as the figures stand now."""
        return {
            "type": "end",
            "reason": reason,
            **facts,
            **self.totals(),
            "self_check": self.verdict(),
            "end_time": now(),
        }

    def totals(self) -> dict[str, Any]:
        """The counters as they stand; may be read from any thread."""
        return {
            "rows": self.rows,
            "rows_flagged": self.rows_flagged,
            "passes": self.passes,
            "passes_unfinished": self.passes_unfinished,
            **self.tally.facts(),
            "requests": self.requests,
            "cached_tokens": self.cached_tokens,
            "missed_tokens": self.missed_tokens,
            "bytes": self._file.bytes,
            "drops": dict(self.drops),
            "rows_skipped": self.rows_skipped,
        }

    def verdict(self) -> dict[str, Any]:
        """The self-check as it stands."""
        return with_write_errors(
            self._check.verdict(self.passes_unfinished), self.drops["write_error"]
        )

    def _end_requests(self, requests: Sequence[Request], finished: bool) -> None:
        for request in requests:
            record = {"type": "request", **request.as_dict(), "finished": finished}
            self._file.write_request(record)
            self.requests += 1
            self.cached_tokens += request.cached_tokens
            self.missed_tokens += request.missed_tokens
