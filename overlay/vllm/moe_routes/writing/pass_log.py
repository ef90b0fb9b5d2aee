# SPDX-License-Identifier: Apache-2.0
"""The log of mode ``per_pass``: a line a forward pass."""

from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm.moe_routes.counts import (
    PassTokens,
    Shape,
    activation,
    lost_rows,
    max_over_mean,
    pass_tokens,
)
from vllm.moe_routes.schema import FORWARD_MODES, PASS, Record
from vllm.moe_routes.writing.formats.jsonl import JsonlFile
from vllm.moe_routes.writing.open_log import END_BYTES, OpenLog, now
from vllm.moe_routes.writing.rows import Step
from vllm.moe_routes.writing.verdicts import Check, check_counts

#: What a full dump can show: the latest passes, within both bounds.
RECENT_PASSES = 1000
RECENT_BYTES = 16 << 20
#: Bounds of a pass's line, and of one count in an end record.
_LINE_BYTES = 2 << 10
_COUNT_BYTES = 20


class RecentPass(NamedTuple):
    """A pass that a full dump can show.

    Attributes:
        record: its line.
        counts: [L, width] int32.
    """

    record: Record
    counts: npt.NDArray[np.int32]


class PassLog(OpenLog):
    """Turns counted steps into lines.

    Args:
        path: file to create; the header is written and flushed before this returns.
        header: the meta record without its ``start_time``.
        shape: what is counted over.
        rank: this worker's, for the records.
        private: the file is its owner's only.

    Attributes:
        first: the first pass's record, of the first file.
        recent: the latest passes, of all files.
    """

    _file: JsonlFile

    def __init__(
        self, path: Path, header: Record, shape: Shape, rank: int, private: bool = False
    ) -> None:
        file = JsonlFile(path, {**header, "start_time": now()}, shape.layers, private)
        super().__init__(path, file, shape)
        self.first: Record | None = None
        self.recent: deque[RecentPass] = deque()
        self._recent_bytes = 0
        self._rank = rank
        self._dropped_tokens = 0

    def follow(self, before: Any) -> None:
        """Go on where ``before`` ended: a dump shows the passes of both."""
        super().follow(before)
        self.first, self.recent = before.first, before.recent
        self._recent_bytes = before._recent_bytes

    def consume(self, step: Step) -> None:
        """Write one pass."""
        if not step.req_ids:
            return
        tokens = pass_tokens(
            step.num_scheduled_tokens, step.num_computed_tokens, step.num_prompt_tokens
        )
        if step.pending is None:
            self._dropped_tokens += tokens.total
            self.drops["queue_full"] += self.rows_of(step)
            return
        counts = step.pending.resolve()
        record = self._record(step, tokens, counts)
        lost = lost_rows(counts, tokens.total, self.shape)
        rows = self.rows_of(step) - lost
        self._file.write_pass(record, rows)
        with self.lock:
            self.counts.add(tokens, counts)
            self.rows += rows
            self.drops["not_captured"] += lost
            self.first = self.first or record
            self._remember(RecentPass(record, counts.astype(np.int32)))

    def _record(self, step: Step, tokens: PassTokens, counts: npt.NDArray[Any]) -> Record:
        touched = activation(counts, self.shape)
        ends = step.num_computed_tokens.astype(np.int64) + step.num_scheduled_tokens
        return {
            "forward_pass_id": step.forward_pass_id,
            "batch_size": int(np.count_nonzero(step.num_scheduled_tokens)),
            "latency": round(step.elapsed(), 6),
            "seq_lens_sum": int(ends[step.num_scheduled_tokens > 0].sum()),
            "forward_mode": FORWARD_MODES[tokens.forward_mode],
            "expert_activation": touched["avg_activated_per_layer"],
            "type": PASS,
            "rank": self._rank,
            "prefill_tokens": tokens.prefill,
            "decode_tokens": tokens.decode,
            "total_activated_experts": touched["total_activated_experts"],
            "expert_utilization": touched["expert_utilization"],
            "max_over_mean": max_over_mean(counts, self.shape),
        }

    def _remember(self, latest: RecentPass) -> None:
        self.recent.append(latest)
        self._recent_bytes += latest.counts.nbytes
        while len(self.recent) > RECENT_PASSES or self._recent_bytes > RECENT_BYTES:
            self._recent_bytes -= self.recent.popleft().counts.nbytes

    def _checks(self) -> list[Check]:
        return check_counts(
            self.counts.counts.sum(axis=0),
            sum(self.counts.tokens),
            self.shape,
            self._dropped_tokens,
            self.passes_unfinished,
        )

    def _most_bytes(self, step: Step) -> int:
        counts = len(self.shape.layers) * self.shape.num_experts
        return _LINE_BYTES + END_BYTES + _COUNT_BYTES * counts

    def _sums(self) -> Record:
        return {"expert_counts": self.counts.counts[:, :, :-1].sum(axis=0).tolist()}
