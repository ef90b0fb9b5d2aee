# SPDX-License-Identifier: Apache-2.0
"""The ``per_pass`` mode's file: one line a forward pass. Runs on the writer thread."""

import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm.moe_routes.counts import (
    FORWARD_MODES,
    PassTokens,
    Shape,
    Tally,
    activation,
    lost_rows,
    max_over_mean,
    pass_tokens,
    verdict,
)
from vllm.moe_routes.writing.formats.jsonl import JsonlLog
from vllm.moe_routes.writing.rows import Step
from vllm.moe_routes.writing.token_log import now, with_write_errors

#: What a full dump can show: the latest passes, within both bounds.
KEPT_RECORDS = 1000
KEPT_BYTES = 16 << 20
#: Bounds of a pass's line, of an end record without its counts, and of one of those.
_LINE_BYTES = 2 << 10
_END_BYTES = 64 << 10
_COUNT_BYTES = 20


class Kept(NamedTuple):
    """A pass that a full dump can show.

    Attributes:
        record: its line.
        counts: [L, width] int32.
    """

    record: dict[str, Any]
    counts: npt.NDArray[np.int32]


class PassLog:
    """Turns counted steps into lines.

    Args:
        path: file to create; the header is written and flushed before this returns.
        header: the meta record without its ``start_time``.
        shape: what is counted over.
        rank: this worker's, for the records.
        private: the file is its owner's only.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        shape: Shape,
        rank: int,
        private: bool = False,
    ) -> None:
        self.path = path
        self.tally = Tally(shape)
        #: Held while the figures below change, so that a dump sees whole passes only.
        self.lock = threading.Lock()
        self.first: dict[str, Any] | None = None
        self.kept: deque[Kept] = deque()
        self._kept_bytes = 0
        self._shape = shape
        self._rank = rank
        self.passes_unfinished = 0
        self.rows = 0
        #: Rows lost, by cause. A row is one token in one layer.
        self.drops = {"queue_full": 0, "not_captured": 0, "write_error": 0}
        self._dropped_tokens = 0
        self.started = time.time()
        self.end: dict[str, Any] | None = None
        self._file = JsonlLog(
            path, {**header, "start_time": now()}, shape.layers, "float32", private
        )
        self._abandoned = False

    def follow(self, before: "PassLog") -> None:
        """Go on where ``before`` ended: a dump shows the passes of both."""
        self.lock = before.lock
        self.first, self.kept, self._kept_bytes = before.first, before.kept, before._kept_bytes

    def fits(self, step: Step, limit: int) -> bool:
        """Whether the file, with the step's line and an end, stays within ``limit`` bytes."""
        end = _END_BYTES + _COUNT_BYTES * len(self._shape.layers) * self._shape.num_experts
        return self._file.bytes + _LINE_BYTES + end <= limit

    def consume(self, step: Step) -> None:
        """Write one pass."""
        if not step.req_ids:
            return
        tokens = pass_tokens(
            step.num_scheduled_tokens, step.num_computed_tokens, step.num_prompt_tokens
        )
        if step.pending is None:
            self._dropped_tokens += tokens.total
            self.drops["queue_full"] += tokens.total * len(self._shape.layers)
            return
        counts = step.pending.resolve()
        record = self._record(step, tokens, counts)
        lost = lost_rows(counts, tokens.total, self._shape)
        rows = tokens.total * len(self._shape.layers) - lost
        self._file.write_record(record, rows)
        with self.lock:
            self.tally.add(tokens, counts)
            self.rows += rows
            self.drops["not_captured"] += lost
            self.first = self.first or record
            self._keep(Kept(record, counts.astype(np.int32)))

    def _record(self, step: Step, tokens: PassTokens, counts: npt.NDArray[Any]) -> dict[str, Any]:
        touched = activation(counts, self._shape)
        ends = step.num_computed_tokens.astype(np.int64) + step.num_scheduled_tokens
        return {
            "forward_pass_id": step.forward_pass_id,
            "batch_size": int(np.count_nonzero(step.num_scheduled_tokens)),
            "latency": round(step.elapsed(), 6),
            "seq_lens_sum": int(ends[step.num_scheduled_tokens > 0].sum()),
            "forward_mode": FORWARD_MODES[tokens.forward_mode],
            "expert_activation": touched["avg_activated_per_layer"],
            "type": "pass",
            "rank": self._rank,
            "prefill_tokens": tokens.prefill,
            "decode_tokens": tokens.decode,
            "total_activated_experts": touched["total_activated_experts"],
            "expert_utilization": touched["expert_utilization"],
            "max_over_mean": max_over_mean(counts, self._shape),
        }

    def _keep(self, kept: Kept) -> None:
        self.kept.append(kept)
        self._kept_bytes += kept.counts.nbytes
        while len(self.kept) > KEPT_RECORDS or self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= self.kept.popleft().counts.nbytes

    def lose(self, step: Step) -> None:
        """Account for a pass that can't be written any more."""
        tokens = int(step.num_scheduled_tokens.sum())
        self.drops["write_error"] += tokens * len(self._shape.layers)

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        self._file.flush()

    def close(self, reason: str, **facts: Any) -> None:
        """Write the end record, with the sum of all counts, and close the file.

        Args:
            reason: for the end record.
            facts: more for it.
        """
        if self._abandoned:
            self._file.close_abandoned(lambda: self._end_record(reason, facts))
        else:
            self._file.flush()  # so that the end record knows every byte before it
            self._file.close(self._end_record(reason, facts))

    def _end_record(self, reason: str, facts: dict[str, Any]) -> dict[str, Any]:
        if self._abandoned:
            self._count_what_is_held()
        end = {
            "type": "end",
            "reason": reason,
            **facts,
            **self.totals(),
            "self_check": self.verdict(),
            "expert_counts": self.tally.counts[:, :, :-1].sum(axis=0).tolist(),
            "end_time": now(),
        }
        self.end = {name: value for name, value in end.items() if name != "expert_counts"}
        return end

    def abandon(self) -> None:
        """Stop writing after an error, and count what was believed written and is not."""
        self._abandoned = True
        self._file.abandon()
        self._count_what_is_held()

    def discard(self) -> None:
        """Remove the file: nothing was recorded in it."""
        self._file.discard()

    def _count_what_is_held(self) -> None:
        held = self._file.held
        with self.lock:
            self.drops["write_error"] += self.rows - held.rows
            self.rows = held.rows

    def totals(self) -> dict[str, Any]:
        """The counters as they stand; may be read from any thread."""
        return {
            "rows": self.rows,
            "passes": sum(self.tally.passes),
            "passes_unfinished": self.passes_unfinished,
            **self.tally.facts(),
            "bytes": self._file.bytes,
            "drops": dict(self.drops),
            "rows_skipped": 0,
        }

    def verdict(self) -> dict[str, Any]:
        """The self-check as it stands."""
        found = verdict(
            self.tally.counts.sum(axis=0),
            sum(self.tally.tokens),
            self._shape,
            self._dropped_tokens,
            self.passes_unfinished,
        )
        return with_write_errors(found, self.drops["write_error"])
