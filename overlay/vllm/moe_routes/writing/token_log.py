# SPDX-License-Identifier: Apache-2.0
"""The log of mode ``per_token``: a line a token and layer, and one a request."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from vllm.moe_routes.counts import Shape, count_choices, pass_tokens
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.schema import Record
from vllm.moe_routes.writing.formats import route_file
from vllm.moe_routes.writing.open_log import END_BYTES, OpenLog, now
from vllm.moe_routes.writing.rows import PassRoutes, Request, RequestBook, Step
from vllm.moe_routes.writing.self_check import SelfCheck
from vllm.moe_routes.writing.verdicts import Check, check_unfinished

#: Bound of a request's record without its two ids.
_REQUEST_BYTES = 320


def _json_length(text: str) -> int:
    """Most bytes that a string takes as JSON."""
    return 6 * len(text) if not text.isascii() or not text.isprintable() else 2 * len(text) + 4


class TokenLog(OpenLog):
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
        header: Record,
        layers: Sequence[MoELayer],
        not_an_id: int,
        weights: str = "float32",
        private: bool = False,
    ) -> None:
        facts = {"weights_dtype": weights, "start_time": now()}
        file = route_file.create(path, {**header, **facts}, layers, weights, private)
        super().__init__(path, file, Shape.of(layers))
        self._book = RequestBook()
        self._check = SelfCheck(layers, not_an_id)
        self.cached_tokens = 0
        self.missed_tokens = 0

    def follow(self, before: Any) -> None:
        """Go on where ``before`` ended: with the requests that are still running."""
        super().follow(before)
        self._book = before._book

    def consume(self, step: Step) -> None:
        """Write one step. The step's finished requests end before its rows."""
        self._end_requests(self._book.finish(step.finished), finished=True)
        self.rows_skipped += step.skipped * len(self.shape.layers)
        if not step.req_ids:
            return
        num_rows = int(step.num_scheduled_tokens.sum())
        if step.pending is None:
            self._book.place(step, None, np.zeros(num_rows, dtype=bool))
            self._check.dropped(num_rows)
            self.drops["queue_full"] += self.rows_of(step)
            return
        routes = step.pending.resolve()
        good = self._check.step(num_rows, routes.topk_ids, routes.topk_weights)
        every = self._check.was_clean  # nearly always, and there is less to look at then
        rows = self._book.place(step, routes.token_ids, None if every else np.all(good, axis=1))
        written = good.size if every else int(good.sum())
        flagged = int(good[rows.flags != 0].sum()) if rows.flags.any() else 0
        self._file.write_routes(
            PassRoutes(step.forward_pass_id, rows, routes.topk_ids, routes.topk_weights, good)
        )
        tokens = pass_tokens(
            step.num_scheduled_tokens, step.num_computed_tokens, step.num_prompt_tokens
        )
        counts = count_choices(routes.topk_ids, self.shape)
        with self.lock:
            self.counts.add(tokens, counts)
            self.rows += written
            self.rows_flagged += flagged
            self.drops["not_captured"] = self._check.rows_not_captured

    def close(self, reason: str, **facts: Any) -> None:
        """Write the requests still running and the end record, and close the log.

        Args:
            reason: for the end record.
            facts: more for it. With ``next``, the log to go on in, running requests are not ended.
        """
        if not self._abandoned and "next" not in facts:
            self._end_requests(self._book.finish_all(), finished=False)
        super().close(reason, **facts)

    def counters(self) -> dict[str, Any]:
        return {
            **super().counters(),
            "rows_flagged": self.rows_flagged,
            "requests": self.requests,
            "cached_tokens": self.cached_tokens,
            "missed_tokens": self.missed_tokens,
        }

    def _checks(self) -> list[Check]:
        return [*self._check.checks(), check_unfinished(self.passes_unfinished)]

    def _most_bytes(self, step: Step) -> int:
        rows = self.rows_of(step) if step.pending is not None else 0
        longest = max((_json_length(raw_id) for raw_id in step.req_ids), default=0)
        # The records of the requests that are open when the recording ends.
        requests = {*self._book.live_ids, *step.req_ids}
        ends = sum(_REQUEST_BYTES + 2 * _json_length(raw_id) for raw_id in requests)
        return self._file.most_bytes(rows, longest) + ends + END_BYTES

    def _end_requests(self, requests: Sequence[Request], finished: bool) -> None:
        for request in requests:
            self._file.write_request(request.record(finished))
            self.requests += 1
            self.cached_tokens += request.cached_tokens
            self.missed_tokens += request.missed_tokens
