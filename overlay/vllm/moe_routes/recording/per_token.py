# SPDX-License-Identifier: Apache-2.0
"""The mode ``per_token``: a line a token and layer."""

from pathlib import Path
from typing import Any

import numpy.typing as npt
from vllm.moe_routes.recording.logged import LoggedRecording, step_without_routes
from vllm.moe_routes.recording.request_sample import RequestSample
from vllm.moe_routes.schema import Record
from vllm.moe_routes.writing.open_log import OpenLog
from vllm.moe_routes.writing.rows import Step, StopRule
from vllm.moe_routes.writing.token_log import TokenLog


class TokenRecording(LoggedRecording):
    """Takes the routes of every pass, of all requests or of a sample."""

    mode = "per_token"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        one_in = self._source.config.sample
        self._sample = RequestSample(one_in) if one_in > 1 else None
        self._finished: list[str] = []
        self._new: set[str] = set()
        self._known: set[str] = set()

    def _open(self, path: Path, header: Record) -> OpenLog:
        config, not_an_id = self._source.config, self._source.buffer.not_an_id
        return TokenLog(path, header, self.layers, not_an_id, config.weights, config.private)

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
        computed, prompt = self._request_arrays(len(num_scheduled_tokens))
        runs_ahead = runner.use_async_scheduling
        tokens = runner.input_ids.gpu if runs_ahead else None
        num_rows = int(num_scheduled_tokens.sum())
        wanted, skipped = None, 0
        if self._sample is not None:
            sampled = self._sample.rows(req_ids, num_scheduled_tokens)
            req_ids = [req_ids[i] for i in sampled.requests]
            computed, prompt = computed[sampled.requests], prompt[sampled.requests]
            wanted, skipped = sampled.rows, num_rows - len(sampled.rows)
            num_scheduled_tokens = num_scheduled_tokens[sampled.requests]
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
            self._writer.put(step_without_routes(finished=finished))
        super()._close(reason, timeout)


def _stop_rule(params: Any) -> StopRule | None:
    """What ends a request that samples with ``params`` (a ``SamplingParams`` or None)."""
    if params is None:
        return None
    stops = params.stop_token_ids if params.ignore_eos else params.all_stop_token_ids
    return StopRule(frozenset(stops or ()), params.min_tokens)
