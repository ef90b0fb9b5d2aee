# SPDX-License-Identifier: Apache-2.0
"""The mode ``stat``: cumulative counts where the choices lie, and no file."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.logger import init_logger
from vllm.moe_routes.counts import PassCounts, PassTokens, lost_rows, pass_tokens
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.recording.base import Recording, Source
from vllm.moe_routes.writing.verdicts import Verdict, check_counts, verdict

logger = init_logger(__name__)


class StatRecording(Recording):
    """Adds counts up, pass by pass."""

    mode = "stat"

    def __init__(self, source: Source, layers: Sequence[MoELayer], slots: Sequence[int]) -> None:
        super().__init__(source, layers, slots)
        self._accumulator = self._choices.accumulator(self._lose)
        self._passes = PassCounts()
        self._error: str | None = None
        self._verdict: Verdict | None = None
        self._lost_rows = 0
        self._passes_lost = 0
        self._lost_tokens = 0

    def _take(self, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        computed, prompt = self._request_arrays(len(num_scheduled_tokens))
        tokens = pass_tokens(num_scheduled_tokens, computed, prompt)
        self._accumulator.add(tokens)
        self._passes.add_pass(tokens)

    def _lose(self, tokens: PassTokens, error: Exception) -> None:
        self._passes.add_pass(tokens, -1)
        self._count_as_lost(tokens.total, error)

    def _fail(self, error: Exception, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        self._count_as_lost(int(num_scheduled_tokens.sum()), error)

    def _count_as_lost(self, num_tokens: int, error: Exception) -> None:
        self._passes_lost += 1
        self._lost_tokens += num_tokens
        if self._error is None:
            self._error = f"{type(error).__name__}: {error}"
            logger.error(
                "A pass could not be counted; generation goes on. %s", self._error, exc_info=error
            )

    def _close(self, reason: str, timeout: float) -> None:
        self._counted(0)

    def _counted(self, max_records: int) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
        counts = self._accumulator.read()
        every, tokens = counts.sum(axis=0), sum(self._passes.tokens)
        self._lost_rows = lost_rows(every, tokens, self.shape)
        unfinished = self.passes_unfinished + self._passes_lost
        self._verdict = verdict(check_counts(every, tokens, self.shape, 0, unfinished))
        return counts, self._status()

    def _status(self) -> dict[str, Any]:
        rows = sum(self._passes.tokens) * len(self.layers)
        return {
            "path": None,
            "so_far": {
                "rows": rows - self._lost_rows,
                "passes": sum(self._passes.passes),
                "passes_unfinished": self.passes_unfinished,
                **self._passes.facts(),
                "bytes": 0,
                "drops": {
                    "not_captured": self._lost_rows,
                    "not_counted": self._lost_tokens * len(self.layers),
                },
                "rows_skipped": 0,
            },
            "waiting_bytes": 0,
            "waiting_passes": 0,
            "self_check": self._verdict,
            "end": None,
            "error": self._error,
        }
