# SPDX-License-Identifier: Apache-2.0
"""The mode ``per_pass``: a line a forward pass."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from vllm.moe_routes.recording.logged import LoggedRecording
from vllm.moe_routes.schema import Record
from vllm.moe_routes.writing.open_log import OpenLog
from vllm.moe_routes.writing.pass_log import PassLog
from vllm.moe_routes.writing.rows import Step


class PassRecording(LoggedRecording):
    """Takes the counts and the time of every pass."""

    mode = "per_pass"

    def _open(self, path: Path, header: Record) -> OpenLog:
        rank, private = self._source.rank, self._source.config.private
        return PassLog(path, {**header, "mode": self.mode}, self.shape, rank, private)

    def begin(self, scheduler_output: Any) -> None:
        super().begin(scheduler_output)
        self._source.clock.start()

    def _take(self, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        counts = self._choices.counts(int(num_scheduled_tokens.sum()))
        elapsed = self._source.clock.stop()
        computed, prompt = self._request_arrays(len(num_scheduled_tokens))
        step = Step(
            forward_pass_id=self._step_id,
            req_ids=self._source.runner.input_batch.req_ids.copy(),
            num_scheduled_tokens=num_scheduled_tokens.copy(),
            num_computed_tokens=computed.copy(),
            num_prompt_tokens=prompt.copy(),
            pending=counts,
            elapsed=elapsed,
        )
        self._writer.put(step)
        self._step_id += 1

    def _records(self, max_records: int) -> dict[str, Any]:
        log: Any = self._log.current
        recent = list(log.recent)[-max_records:] if max_records else []
        counts = [item.counts[:, :-1] for item in recent]
        return {
            "first_record": log.first,
            # As text, which is quickest on its way through two processes.
            "records": msgspec.json.encode([item.record for item in recent]),
            "record_counts": np.array(counts, dtype="<i4").tobytes(),
        }
