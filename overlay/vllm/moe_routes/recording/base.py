# SPDX-License-Identifier: Apache-2.0
"""One recording: what its modes share. All take the choices of a pass from the same place.

Methods run on the worker's engine thread unless they say otherwise.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm.moe_routes.capture.buffer import CaptureBuffer
from vllm.moe_routes.capture.pass_timer import Clock
from vllm.moe_routes.capture.references import ReferenceChoices, References
from vllm.moe_routes.capture.snapshot import Snapshotter
from vllm.moe_routes.config import RouteLogConfig
from vllm.moe_routes.counts import Shape, activation, layer_balance
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.recording.choices import BufferChoices, Choices


class Source(NamedTuple):
    """What every recording of a worker reads from.

    Attributes:
        runner: the model runner.
        buffer: the whole capture buffer.
        snapshotter: the device's.
        clock: the device's.
        config: the switches.
        rank: of this worker among all of the engine's, over data-parallel ranks.
        references: what the layers of an eager pass chose, until it ends; None where they write
            to the buffer themselves.
    """

    runner: Any
    buffer: CaptureBuffer
    snapshotter: Snapshotter
    clock: Clock
    config: RouteLogConfig
    rank: int
    references: References | None


class Recording(ABC):
    """What the modes share: the bounds of a step, and who lost what.

    Args:
        source: what to read from.
        layers: the layers of this recording, in slot order.
        slots: their slots in the capture buffer.

    Attributes:
        mode: one of ``config.MODES``.
        stopped_at: when it was stopped, in seconds since the epoch, as ``since`` is.
        passes_unfinished: forward passes that began and never ended: the engine raised an error.
    """

    mode: str

    def __init__(self, source: Source, layers: Sequence[MoELayer], slots: Sequence[int]) -> None:
        self._source = source
        self.layers = list(layers)
        self.shape = Shape.of(layers)
        self.since = time.time()
        self.stopped_at: float | None = None
        self.passes_unfinished = 0
        self._in_pass = False
        self._choices: Choices = (
            BufferChoices(source.buffer, slots, self.shape, source.snapshotter)
            if source.references is None
            else ReferenceChoices(source.references, slots, self.shape, source.buffer)
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
            ``schema.FORWARD_MODES``, and what they belong to.
        """
        counts, facts = self._counted(max_records)
        every = counts.sum(axis=0)
        return {
            "layers": [item.layer for item in self.layers],
            "num_experts": self.shape.num_experts,
            "top_k": int(self.shape.top_k.max()),
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

    @property
    def over(self) -> bool:
        """Whether the recording ended by itself, at a bound."""
        return False

    @property
    def closed(self) -> bool:
        """Whether everything is written and the file closed."""
        return True

    def close_early(self, reason: str) -> None:
        """End the recording from another thread, while the engine's is stuck in a pass, or not."""
        del reason  # without a file there is nothing to close

    def _request_arrays(self, num_reqs: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The runner's own arrays: computed tokens and prompt tokens of the batch's requests."""
        batch = self._source.runner.input_batch
        return batch.num_computed_tokens_cpu[:num_reqs], batch.num_prompt_tokens[:num_reqs]

    @abstractmethod
    def _take(self, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        """Take the choices of the forward pass that just ran."""

    @abstractmethod
    def _fail(self, error: Exception, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        """Account for a pass that could not be taken."""

    @abstractmethod
    def _close(self, reason: str, timeout: float) -> None:
        """End what the recording writes."""

    @abstractmethod
    def _counted(self, max_records: int) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
        """[3, L, width] of every pass so far, and what else a dump holds."""

    @abstractmethod
    def _status(self) -> dict[str, Any]:
        """What the mode adds to a status."""
