# SPDX-License-Identifier: Apache-2.0
"""Recordings that write a file: ``per_pass``, a line a forward pass, and ``per_token``.

Methods run on the worker's engine thread; the sink behind the writer does the rest.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.recording.base import Recording, Source
from vllm.moe_routes.recording.request_sample import Sample
from vllm.moe_routes.writing import formats
from vllm.moe_routes.writing.pass_log import PassLog
from vllm.moe_routes.writing.rotation import Chain, Part
from vllm.moe_routes.writing.rows import Step, StopRule
from vllm.moe_routes.writing.token_log import Session
from vllm.moe_routes.writing.writer import Writer

#: How long a dump waits for the passes before it to be counted. A slow disk can keep them longer;
#: ``waiting_passes`` tells.
DRAIN_SECONDS = 0.1


class _FileRecording(Recording):
    """A recording with a sink and a writer thread behind it."""

    def _write_to(self, make: Callable[[Path, dict[str, Any]], Part], path: Path) -> None:
        config = self._source.config
        rotate = config.on_max == "rotate"
        self._sink = Chain(make, path, config.max_bytes, rotate, len(self.layers))
        flush_seconds = max(config.flush_seconds, formats.shortest_flush(path))
        self._writer = Writer(self._sink, config.queue_bytes, config.on_full, flush_seconds)
        self._step_id = 0

    @property
    def over(self) -> bool:
        return self._sink.over or self._writer.closing

    def close_early(self, reason: str) -> None:
        self._sink.passes_unfinished = self.passes_unfinished + self._in_pass
        self._writer.close(reason, 0)

    def begin(self, scheduler_output: Any) -> None:
        super().begin(scheduler_output)
        self._sink.passes_unfinished = self.passes_unfinished

    def _fail(self, error: Exception, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        self._writer.fail(error)
        self._writer.put(_not_taken(num_scheduled_tokens))

    def _close(self, reason: str, timeout: float) -> None:
        self._sink.passes_unfinished = self.passes_unfinished
        self._writer.close(reason, timeout)

    @property
    def closed(self) -> bool:
        return self.stopped_at is not None and self._writer.closed

    def _counted(self, max_records: int) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
        self._writer.drain(DRAIN_SECONDS)
        with self._sink.lock:
            return self._sink.counts(), {**self._status(), **self._records(max_records)}

    def _records(self, max_records: int) -> dict[str, Any]:
        return {}

    def _status(self) -> dict[str, Any]:
        return {
            "path": str(self._sink.path),
            "files": [str(path) for path in self._sink.files],
            "so_far": self._sink.totals(),
            "waiting_bytes": self._writer.waiting_bytes,
            "waiting_passes": self._writer.waiting_steps,
            "self_check": self._sink.end["self_check"] if self._sink.end else self._sink.verdict(),
            "end": self._sink.end,
            "error": self._writer.error,
        }


class PassRecording(_FileRecording):
    """A line a forward pass."""

    mode = "per_pass"

    def __init__(
        self,
        source: Source,
        layers: Sequence[MoELayer],
        slots: Sequence[int],
        path: Path,
        header: dict[str, Any],
    ) -> None:
        super().__init__(source, layers, slots)
        self._write_to(
            lambda path, facts: PassLog(
                path,
                {**header, "mode": self.mode, **facts},
                self.shape,
                source.rank,
                source.config.private,
            ),
            path,
        )

    def begin(self, scheduler_output: Any) -> None:
        super().begin(scheduler_output)
        self._source.clock.start()

    def _take(self, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        num_rows = int(num_scheduled_tokens.sum())
        counts = self._choices.counts(num_rows)
        elapsed = self._source.clock.stop()
        computed, prompt = self._arrays(len(num_scheduled_tokens))
        self._writer.put(
            Step(
                forward_pass_id=self._step_id,
                req_ids=self._source.runner.input_batch.req_ids.copy(),
                num_scheduled_tokens=num_scheduled_tokens.copy(),
                num_computed_tokens=computed.copy(),
                num_prompt_tokens=prompt.copy(),
                new_requests=(),
                stop_rules={},
                finished=(),
                pending=counts,
                elapsed=elapsed,
            )
        )
        self._step_id += 1

    def _records(self, max_records: int) -> dict[str, Any]:
        passes: Any = self._sink.current
        kept = list(passes.kept)[-max_records:] if max_records else []
        counts = [item.counts[:, :-1] for item in kept]
        return {
            "first_record": passes.first,
            # As text, which is quickest on its way through two processes.
            "records": msgspec.json.encode([item.record for item in kept]),
            "record_counts": np.array(counts, dtype="<i4").tobytes(),
        }


class TokenRecording(_FileRecording):
    """A line a token and layer."""

    mode = "per_token"

    def __init__(
        self,
        source: Source,
        layers: Sequence[MoELayer],
        slots: Sequence[int],
        path: Path,
        header: dict[str, Any],
    ) -> None:
        super().__init__(source, layers, slots)
        not_an_id = source.buffer.not_an_id
        weights, private = source.config.weights, source.config.private
        self._write_to(
            lambda path, facts: Session(
                path, {**header, **facts}, layers, not_an_id, weights, private
            ),
            path,
        )
        self._sample = Sample(source.config.sample) if source.config.sample > 1 else None
        self._finished: list[str] = []
        self._new: set[str] = set()
        self._known: set[str] = set()

    def begin(self, scheduler_output: Any) -> None:
        super().begin(scheduler_output)
        self._finished.extend(scheduler_output.finished_req_ids)
        self._known.difference_update(scheduler_output.finished_req_ids)
        if self._sample is not None:
            self._sample.forget(scheduler_output.finished_req_ids)
        self._new = {item.req_id for item in scheduler_output.scheduled_new_reqs}

    def _take(self, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        runner = self._source.runner
        req_ids = runner.input_batch.req_ids
        computed, prompt = self._arrays(len(num_scheduled_tokens))
        runs_ahead = runner.use_async_scheduling
        tokens = runner.input_ids.gpu if runs_ahead else None
        num_rows = int(num_scheduled_tokens.sum())
        wanted, skipped = None, 0
        if self._sample is not None:
            kept = self._sample.rows(req_ids, num_scheduled_tokens)
            req_ids = [req_ids[i] for i in kept.requests]
            computed, prompt = computed[kept.requests], prompt[kept.requests]
            wanted, skipped = kept.rows, num_rows - len(kept.rows)
            num_scheduled_tokens = num_scheduled_tokens[kept.requests]
        some = num_rows > skipped
        step = Step(
            forward_pass_id=self._step_id,
            req_ids=req_ids.copy(),
            num_scheduled_tokens=num_scheduled_tokens.copy(),
            num_computed_tokens=computed.copy(),
            num_prompt_tokens=prompt.copy(),
            new_requests=self._new,
            stop_rules=self._stop_rules(req_ids) if runs_ahead else {},
            finished=self._finished,
            pending=self._choices.routes(num_rows, tokens, wanted) if some else None,
            skipped=skipped,
        )
        self._finished = []
        self._step_id += 1
        self._writer.put(step)

    def _stop_rules(self, req_ids: list[str]) -> dict[str, StopRule]:
        """Rules of the requests that this recording sees for the first time."""
        first_seen = [raw_id for raw_id in req_ids if raw_id not in self._known]
        self._known.update(first_seen)
        requests = self._source.runner.requests
        rules = {raw_id: _stop_rule(requests[raw_id].sampling_params) for raw_id in first_seen}
        return {raw_id: rule for raw_id, rule in rules.items() if rule is not None}

    def _close(self, reason: str, timeout: float) -> None:
        finished, self._finished = self._finished, []
        if finished:
            self._writer.put(_only_finished(finished))
        super()._close(reason, timeout)


def _stop_rule(params: Any) -> StopRule | None:
    """What ends a request that samples with ``params`` (a ``SamplingParams`` or None)."""
    if params is None:
        return None
    stops = params.stop_token_ids if params.ignore_eos else params.all_stop_token_ids
    return StopRule(frozenset(stops or ()), params.min_tokens)


def _not_taken(num_scheduled_tokens: npt.NDArray[Any]) -> Step:
    """A step whose routes nobody has: it can only be counted."""
    num_tokens, none = num_scheduled_tokens.copy(), np.zeros(0, dtype=np.int32)
    return Step(-1, [], num_tokens, none, none, (), {}, (), None)


def _only_finished(finished: list[str]) -> Step:
    """A step without a forward pass, to end requests."""
    none = np.zeros(0, dtype=np.int32)
    return Step(-1, [], none, none, none, (), {}, finished, None)
