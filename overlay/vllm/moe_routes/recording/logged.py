# SPDX-License-Identifier: Apache-2.0
"""A recording that writes a log: what the modes ``per_pass`` and ``per_token`` share.

Methods run on the worker's engine thread; the log behind the writer does the rest.
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.recording.base import Recording, Source
from vllm.moe_routes.schema import Record
from vllm.moe_routes.writing.formats.route_file import shortest_flush
from vllm.moe_routes.writing.open_log import OpenLog
from vllm.moe_routes.writing.rotation import RotatingLog
from vllm.moe_routes.writing.rows import Step
from vllm.moe_routes.writing.writer import Writer

#: How long a dump waits for the passes before it to be counted. A slow disk can keep them longer;
#: ``waiting_passes`` tells.
DRAIN_SECONDS = 0.1


class LoggedRecording(Recording):
    """A recording with a log and a writer thread before it.

    Args:
        source: what to read from.
        layers: the layers of this recording, in slot order.
        slots: their slots in the capture buffer.
        path: the log.
        header: its meta record without its ``start_time``.
    """

    def __init__(
        self,
        source: Source,
        layers: Sequence[MoELayer],
        slots: Sequence[int],
        path: Path,
        header: Record,
    ) -> None:
        super().__init__(source, layers, slots)
        config = source.config
        self._log = RotatingLog(
            lambda path, facts: self._open(path, {**header, **facts}),
            path,
            config.max_bytes,
            config.on_max == "rotate",
        )
        flush_seconds = max(config.flush_seconds, shortest_flush(path))
        self._writer = Writer(self._log, config.queue_bytes, config.on_full, flush_seconds)
        self._step_id = 0

    @abstractmethod
    def _open(self, path: Path, header: Record) -> OpenLog:
        """Create the log of one file."""

    @property
    def over(self) -> bool:
        return self._log.over or self._writer.closing

    @property
    def closed(self) -> bool:
        return self.stopped_at is not None and self._writer.closed

    def close_early(self, reason: str) -> None:
        self._log.passes_unfinished = self.passes_unfinished + self._in_pass
        self._writer.close(reason, 0)

    def begin(self, scheduler_output: Any) -> None:
        before = self.passes_unfinished
        super().begin(scheduler_output)
        if self.passes_unfinished != before:
            self._log.passes_unfinished = self.passes_unfinished

    def _fail(self, error: Exception, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        self._writer.fail(error)
        self._writer.put(step_without_routes(num_scheduled_tokens.copy()))

    def _close(self, reason: str, timeout: float) -> None:
        self._log.passes_unfinished = self.passes_unfinished
        self._writer.close(reason, timeout)

    def _counted(self, max_records: int) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
        self._writer.drain(DRAIN_SECONDS)
        with self._log.lock:
            return self._log.counts(), {**self._status(), **self._records(max_records)}

    def _records(self, max_records: int) -> dict[str, Any]:
        """What a dump holds of single passes."""
        return {}

    def _status(self) -> dict[str, Any]:
        end = self._log.end
        return {
            "path": str(self._log.path),
            "files": [str(path) for path in self._log.files],
            "so_far": self._log.counters(),
            "waiting_bytes": self._writer.waiting_bytes,
            "waiting_passes": self._writer.waiting_steps,
            "self_check": end["self_check"] if end else self._log.verdict(),
            "end": end,
            "error": self._writer.error,
        }


def step_without_routes(
    num_scheduled_tokens: npt.NDArray[Any] | None = None, finished: Sequence[str] = ()
) -> Step:
    """A step that can only be counted, or that only ends requests.

    Args:
        num_scheduled_tokens: [R] rows of its requests; None: there was no forward pass.
        finished: requests that end.
    """
    none = np.zeros(0, dtype=np.int32)
    rows = none if num_scheduled_tokens is None else num_scheduled_tokens
    return Step(-1, [], rows, none, none, finished=finished)
