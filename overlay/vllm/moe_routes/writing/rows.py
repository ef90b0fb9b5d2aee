# SPDX-License-Identifier: Apache-2.0
"""From a step's metadata to (request, position, phase, flag) of every row. Pure.

The engine thread only copies what the host already knows (:class:`Step`); :class:`RequestBook`
works it out on the writer thread, step by step and in order.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm.moe_routes.capture.pass_timer import Elapsed, not_timed
from vllm.moe_routes.capture.snapshot import Pending
from vllm.moe_routes.schema import REQUEST, REQUEST_KEYS, Flag, Record


class StopRule(NamedTuple):
    """When a generated token ends its request.

    Attributes:
        token_ids: tokens that stop it.
        min_tokens: generated tokens before which nothing stops it.
    """

    token_ids: frozenset[int]
    min_tokens: int


class Step(NamedTuple):
    """One real forward pass, as the host knows it.

    Attributes:
        forward_pass_id: 0, 1, … within a recording.
        req_ids: [R] vLLM's own request ids, in batch order.
        num_scheduled_tokens: [R] rows of every request.
        num_computed_tokens: [R] position of every request's first row.
        num_prompt_tokens: [R].
        new_requests: those of ``req_ids`` that are scheduled for the first time.
        stop_rules: of requests that this recording sees for the first time; empty where the engine
            does not run ahead of its sampled tokens.
        finished: requests that ended since the last step.
        pending: the routes, or the counts where only those are recorded; None when the pass was
            dropped.
        elapsed: how long it took, where that is recorded.
        skipped: tokens of the pass that were left out, because their requests are not sampled.
    """

    forward_pass_id: int
    req_ids: Sequence[str]
    num_scheduled_tokens: npt.NDArray[Any]
    num_computed_tokens: npt.NDArray[Any]
    num_prompt_tokens: npt.NDArray[Any]
    new_requests: Collection[str] = ()
    stop_rules: Mapping[str, StopRule] = MappingProxyType({})
    finished: Sequence[str] = ()
    pending: Pending | None = None
    elapsed: Elapsed = not_timed
    skipped: int = 0


class RowTable(NamedTuple):
    """The rows of a step, in buffer order.

    Attributes:
        req_ids: [n] ids as the user knows them.
        positions: [n] int64, absolute position in the sequence.
        is_decode: [n] bool, whether the row's token was generated (not part of the prompt).
        flags: [n] uint8, a :class:`schema.Flag`.
    """

    req_ids: list[str]
    positions: npt.NDArray[Any]
    is_decode: npt.NDArray[Any]
    flags: npt.NDArray[Any]


class PassRoutes(NamedTuple):
    """One pass as it is written, token by token and layer by layer.

    Attributes:
        forward_pass_id: the pass.
        rows: request, position, phase and flag of the n tokens.
        topk_ids: [n, L, K].
        topk_weights: [n, L, K] float32.
        good: [n, L] bool; rows that are not are left out.
    """

    forward_pass_id: int
    rows: RowTable
    topk_ids: npt.NDArray[Any]
    topk_weights: npt.NDArray[Any]
    good: npt.NDArray[Any]


@dataclass
class Request:
    """What a recording knows of one request.

    Attributes:
        req_id: id as the user knows it; unique within the recording.
        raw_id: vLLM's own id.
        num_prompt_tokens: prompt length.
        cached_tokens: leading positions taken from the prefix cache: never routed.
        missed_tokens: leading positions executed before the recording started.
        next_position: one past the highest position executed so far.
        positions: rows recorded that count, one per position and layer.
        rows_flagged: rows recorded that don't.
        rows_dropped: rows not recorded in every layer: dropped, or not captured.
        stopped_at: position of the token that stopped it, once that token was seen as an input.
        dropped: positions executed of which no row was recorded.
    """

    req_id: str
    raw_id: str
    num_prompt_tokens: int
    stop: StopRule | None
    cached_tokens: int = 0
    missed_tokens: int = 0
    next_position: int = 0
    positions: int = 0
    rows_flagged: int = 0
    rows_dropped: int = 0
    stopped_at: int | None = None
    dropped: set[int] = field(default_factory=set)

    def resume(self, first: int, num_prompt_tokens: int) -> None:
        """A streaming session goes on with more prompt: what it generated last may be replaced."""
        self.num_prompt_tokens = num_prompt_tokens
        self.next_position = first
        self.stopped_at = None

    def take_prompt(self, first: int, size: int) -> bool:
        """:meth:`take` of a chunk of prompt that is recorded, at once.

        Args:
            first: position of its first row.
            size: rows.

        Returns:
            Whether it was taken: only where none of its rows has a flag.
        """
        end = first + size
        is_new = first >= self.next_position and self.stopped_at is None
        if not is_new or end > self.num_prompt_tokens:
            return False
        self.next_position = end
        self.positions += size
        return True

    def take(self, position: int, token_id: int | None, recorded: bool) -> int:
        """Flag and count one row of this request; moves the request on.

        Args:
            position: of the row.
            token_id: its input token, needed where the engine runs ahead.
            recorded: whether the row gets into the file.

        Returns:
            A :class:`schema.Flag`.
        """
        again = position < self.next_position and position not in self.dropped
        flag = Flag.RECOMPUTED if again else Flag.NONE
        if self.stop is not None and token_id is not None and self.stopped_at is None:
            generated = position - self.num_prompt_tokens + 1
            if generated >= max(self.stop.min_tokens, 1) and token_id in self.stop.token_ids:
                self.stopped_at = position
        if self.stopped_at is not None and position >= self.stopped_at:
            flag = Flag.OVERRUN
        self.next_position = max(self.next_position, position + 1)
        if not recorded:
            self.rows_dropped += 1
            if not again:
                self.dropped.add(position)
            return flag
        self.dropped.discard(position)
        if flag is Flag.NONE:
            self.positions += 1
        else:
            self.rows_flagged += 1
        return flag

    def record(self, finished: bool) -> Record:
        """What the log says of it; ``finished`` is false where the recording ended before it."""
        known = {"type": REQUEST, **vars(self), "finished": finished}
        return {key: known[key] for key in REQUEST_KEYS}


def external_id(raw_id: str) -> str:
    """vLLM's own id without the eight hex digits it appends: ``"7-1a2b3c4d"`` -> ``"7"``."""
    stem, dash, tail = raw_id.rpartition("-")
    if dash and len(tail) == 8 and all(c in "0123456789abcdef" for c in tail):
        return stem
    return raw_id


class RequestBook:
    """The requests of one recording."""

    def __init__(self) -> None:
        self._live: dict[str, Request] = {}
        self._taken: set[str] = set()

    def place(
        self,
        step: Step,
        token_ids: npt.NDArray[Any] | None,
        recorded: npt.NDArray[Any] | None = None,
    ) -> RowTable:
        """Work out the rows of ``step`` and move its requests on.

        Args:
            step: the step; its rows are the requests' rows one after another.
            token_ids: [n] input tokens, or None.
            recorded: [n] bool, which rows get into the file; None: all.
        """
        counts = step.num_scheduled_tokens.astype(np.int64)
        starts = np.cumsum(counts) - counts
        total = int(counts.sum())
        offsets = np.arange(total) - np.repeat(starts, counts)
        positions = np.repeat(step.num_computed_tokens.astype(np.int64), counts) + offsets
        flags = np.zeros(total, dtype=np.uint8)
        if recorded is None:
            recorded = np.ones(total, dtype=bool)
        req_ids: list[str] = []
        sizes, firsts, places = counts.tolist(), starts.tolist(), positions.tolist()
        for i, raw_id in enumerate(step.req_ids):
            request = self._live.get(raw_id)
            if request is None:
                request = self._open(step, i)
            elif raw_id in step.new_requests:
                first, prompt = step.num_computed_tokens[i], step.num_prompt_tokens[i]
                request.resume(int(first), int(prompt))
            row0, size = firsts[i], sizes[i]
            req_ids += [request.req_id] * size
            is_whole = size > 1 and recorded[row0 : row0 + size].all()
            if is_whole and request.take_prompt(places[row0], size):
                continue
            for row in range(row0, row0 + size):
                token = None if token_ids is None else int(token_ids[row])
                flag = request.take(places[row], token, bool(recorded[row]))
                if flag:
                    flags[row] = flag
        is_decode = positions >= np.repeat(step.num_prompt_tokens.astype(np.int64), counts)
        return RowTable(req_ids, positions, is_decode, flags)

    def finish(self, raw_ids: Sequence[str]) -> list[Request]:
        """Close requests; those that the recording never saw are passed over."""
        return [self._live.pop(raw_id) for raw_id in raw_ids if raw_id in self._live]

    @property
    def live_ids(self) -> Iterable[str]:
        """vLLM's own ids of the requests that are not closed."""
        return self._live

    def finish_all(self) -> list[Request]:
        """Close what is still running when the recording stops."""
        return self.finish(list(self._live))

    def _open(self, step: Step, i: int) -> Request:
        raw_id = step.req_ids[i]
        req_id = external_id(raw_id)
        # A client's own id, used twice: only vLLM's id tells them apart, if it was not guessed.
        for other in itertools.chain([raw_id], (f"{raw_id}#{n}" for n in itertools.count(2))):
            if req_id not in self._taken:
                break
            req_id = other
        self._taken.add(req_id)
        first = int(step.num_computed_tokens[i])
        is_new = raw_id in step.new_requests
        request = Request(
            req_id=req_id,
            raw_id=raw_id,
            num_prompt_tokens=int(step.num_prompt_tokens[i]),
            stop=step.stop_rules.get(raw_id),
            cached_tokens=first if is_new else 0,
            missed_tokens=0 if is_new else first,
            next_position=first,
        )
        self._live[raw_id] = request
        return request
