# SPDX-License-Identifier: Apache-2.0
"""One recording: what its three modes share, and ``stat``, which only adds counts up.

All modes take the same choices of a pass; ``file_recording`` has those that write them. Methods run
on the worker's engine thread unless they say otherwise.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm.logger import init_logger
from vllm.moe_routes.capture.buffer import CaptureBuffer
from vllm.moe_routes.capture.pass_timer import Clock
from vllm.moe_routes.capture.references import Kept, KeptChoices
from vllm.moe_routes.capture.snapshot import Snapshotter
from vllm.moe_routes.config import RouteLogConfig
from vllm.moe_routes.counts import (
    PassTokens,
    Shape,
    Tally,
    activation,
    layer_balance,
    lost_rows,
    pass_tokens,
    verdict,
)
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.recording.choices import BufferChoices, Choices

logger = init_logger(__name__)


class Source(NamedTuple):
    """What every recording of a worker reads from.

    Attributes:
        runner: the model runner.
        buffer: the whole capture buffer.
        snapshotter: the device's.
        clock: the device's.
        config: the switches.
        rank: of this worker among all of the engine's, over data-parallel ranks.
        kept: what the layers of an eager pass keep until it ends; None where they write to the
            buffer themselves.
    """

    runner: Any
    buffer: CaptureBuffer
    snapshotter: Snapshotter
    clock: Clock
    config: RouteLogConfig
    rank: int
    kept: Kept | None


class Recording:
    """What the modes share: the bounds of a step, and who lost what.

    Args:
        source: what to read from.
        layers: the layers of this recording, in slot order.
        slots: their slots in the capture buffer.
    """

    mode: str

    def __init__(self, source: Source, layers: Sequence[MoELayer], slots: Sequence[int]) -> None:
        self._source = source
        self.layers = list(layers)
        self.shape = Shape.of(layers)
        self.since = time.time()
        self.stopped_at: float | None = None
        #: Forward passes that began and never ended: the engine raised an error in them.
        self.passes_unfinished = 0
        self._in_pass = False
        self._choices: Choices = (
            BufferChoices(source.buffer, slots, self.shape, source.snapshotter)
            if source.kept is None
            else KeptChoices(source.kept, slots, self.shape, source.buffer)
        )

    def begin(self, scheduler_output: Any) -> None:
        """Note what a step starts and ends. Also called for steps without a forward pass."""
        # Still set where the pass before raised an error: what it routed is nowhere.
        self.passes_unfinished += self._in_pass
        num_rows = scheduler_output.total_num_scheduled_tokens
        self._in_pass = num_rows > 0
        self._choices.begin(num_rows)

    def end(self, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        """Take the forward pass that just ran. Never raises: the engine must go on.

        Args:
            num_scheduled_tokens: [R] rows of every request, in batch order.
        """
        try:
            self._take(num_scheduled_tokens)
        except Exception as error:
            self._fail(error, num_scheduled_tokens)
        self._in_pass = False

    def stop(self, reason: str, timeout: float) -> None:
        """End the recording; see ``Writer.close`` for ``timeout``.

        A second call waits for what the first began, and changes nothing else.
        """
        self.passes_unfinished += self._in_pass
        self._in_pass = False
        if self.stopped_at is None:
            self.stopped_at = time.time()
        self._close(reason, timeout)

    def dump(self, max_records: int) -> dict[str, Any]:
        """Everything counted so far; changes nothing.

        Args:
            max_records: most records of single passes to return.

        Returns:
            ``counts`` as little-endian int64 bytes of ``shape`` [3, L, E], in the order of
            ``tally.FORWARD_MODES``, and what they belong to.
        """
        counts, facts = self._counted(max_records)
        every = counts.sum(axis=0)
        return {
            "layers": [item.layer for item in self.layers],
            "num_experts": self.shape.num_experts,
            "top_k": max(item.top_k for item in self.layers),
            "shape": [*counts.shape[:2], self.shape.num_experts],
            "counts": counts[:, :, :-1].astype("<i8").tobytes(),
            "activation": activation(every, self.shape),
            "layer_balance": layer_balance(every, self.shape).tolist(),
            **facts,
        }

    def status(self) -> dict[str, Any]:
        """Where the recording stands."""
        return {
            "recorded_mode": self.mode,
            "recorded_layers": [item.layer for item in self.layers],
            "since": self.since,
            "stopped_at": self.stopped_at,
            **self._status(),
        }

    def _arrays(self, num_reqs: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The runner's own arrays: computed tokens and prompt tokens of the batch's requests."""
        batch = self._source.runner.input_batch
        return batch.num_computed_tokens_cpu[:num_reqs], batch.num_prompt_tokens[:num_reqs]

    @property
    def over(self) -> bool:
        """Whether the recording ended by itself, at a bound."""
        return False

    def close_early(self, reason: str) -> None:
        """End the recording from another thread, while the engine's is stuck in a pass, or not."""

    @property
    def closed(self) -> bool:
        """Whether everything is written and the file closed."""
        raise NotImplementedError

    def _take(self, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        raise NotImplementedError

    def _fail(self, error: Exception, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        raise NotImplementedError

    def _close(self, reason: str, timeout: float) -> None:
        raise NotImplementedError

    def _counted(self, max_records: int) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
        raise NotImplementedError

    def _status(self) -> dict[str, Any]:
        raise NotImplementedError


class StatRecording(Recording):
    """Cumulative counts where the choices lie, nothing else."""

    mode = "stat"

    def __init__(self, source: Source, layers: Sequence[MoELayer], slots: Sequence[int]) -> None:
        super().__init__(source, layers, slots)
        self._totals = self._choices.totals(self._lose)
        #: Its counts stay zero: they are in the totals.
        self._tally = Tally(self.shape)
        self._error: str | None = None
        self._verdict: dict[str, Any] | None = None
        self._lost_rows = 0
        self._passes_lost = 0
        self._lost_tokens = 0

    def _take(self, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        computed, prompt = self._arrays(len(num_scheduled_tokens))
        tokens = pass_tokens(num_scheduled_tokens, computed, prompt)
        self._totals.add(tokens)
        self._tally.add_pass(tokens)

    def _lose(self, tokens: PassTokens, error: Exception) -> None:
        self._tally.add_pass(tokens, -1)
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

    @property
    def closed(self) -> bool:
        return True

    def _counted(self, max_records: int) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
        counts = self._totals.read()
        every, tokens = counts.sum(axis=0), sum(self._tally.tokens)
        self._lost_rows = lost_rows(every, tokens, self.shape)
        unfinished = self.passes_unfinished + self._passes_lost
        self._verdict = verdict(every, tokens, self.shape, 0, unfinished)
        return counts, self._status()

    def _status(self) -> dict[str, Any]:
        rows = sum(self._tally.tokens) * len(self.layers)
        return {
            "path": None,
            "so_far": {
                "rows": rows - self._lost_rows,
                "passes": sum(self._tally.passes),
                "passes_unfinished": self.passes_unfinished,
                **self._tally.facts(),
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
