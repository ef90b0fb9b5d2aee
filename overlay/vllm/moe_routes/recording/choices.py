# SPDX-License-Identifier: Apache-2.0
"""A forward pass's choices, taken before the next pass runs."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.moe_routes.capture.buffer import CaptureBuffer
from vllm.moe_routes.capture.device_counts import Counter
from vllm.moe_routes.capture.snapshot import Pending, Snapshotter
from vllm.moe_routes.counts import Lost, PassTokens, Shape
from vllm.moe_routes.schema import FORWARD_MODES


class Accumulator(Protocol):
    """Counts of passes, added up by mode of the pass."""

    def add(self, tokens: PassTokens) -> None:
        """Add the pass that just ran, now, or later: then ``lost`` gets what can't be counted."""

    def read(self) -> npt.NDArray[np.int64]:
        """[3, L, width] of every pass so far."""


class Choices(Protocol):
    """Where one recording takes the choices of every pass from, on the engine thread."""

    def begin(self, num_rows: int) -> None:
        """Forget what is there: a pass of ``num_rows`` rows begins."""

    def routes(
        self, num_rows: int, token_ids: Tensor | None, rows: npt.NDArray[Any] | None = None
    ) -> Pending:
        """The pass's ids and weights, to be resolved to ``snapshot.Routes``.

        Args:
            num_rows: rows of the pass.
            token_ids: [>= num_rows] input token of every row, where they are needed.
            rows: [m] int64, the rows to take; None takes all.
        """

    def counts(self, num_rows: int) -> Pending:
        """The pass's counts, to be resolved to [L, width] int64."""

    def accumulator(self, lost: Lost) -> Accumulator:
        """What adds passes up without taking any of them to the host."""


class BufferChoices:
    """Of layers that write to the capture buffer.

    Args:
        buffer: the whole one.
        slots: of the recorded layers.
        shape: what to count over.
        snapshotter: the device's.
    """

    def __init__(
        self,
        buffer: CaptureBuffer,
        slots: Sequence[int],
        shape: Shape,
        snapshotter: Snapshotter,
    ) -> None:
        self._buffer = buffer.narrowed(slots)
        self._snapshotter = snapshotter
        self._counter = Counter(self._buffer, shape)

    def begin(self, num_rows: int) -> None:
        # Warm-up passes, padding and older passes left rows there, which a layer that does not
        # fire would repeat.
        self._buffer.clear(num_rows)

    def routes(
        self, num_rows: int, token_ids: Tensor | None, rows: npt.NDArray[Any] | None = None
    ) -> Pending:
        wanted = num_rows if rows is None else torch.from_numpy(rows).to(self._buffer.ids.device)
        return self._snapshotter.take(self._buffer, wanted, token_ids)

    def counts(self, num_rows: int) -> Pending:
        counts = self._counter.zeros()
        self._counter.add(counts, num_rows)
        return self._snapshotter.copy([counts], lambda array: array)

    def accumulator(self, lost: Lost) -> Accumulator:
        return BufferAccumulator(self._counter)  # it counts at once, and may raise


class BufferAccumulator:
    """Adds up where the buffer lies.

    Args:
        counter: of the buffer.
    """

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._counts = counter.zeros(len(FORWARD_MODES))

    def add(self, tokens: PassTokens) -> None:
        self._counter.add(self._counts[tokens.forward_mode], tokens.total)

    def read(self) -> npt.NDArray[np.int64]:
        # Waits for the passes in flight, for no longer than one of them takes.
        counts: npt.NDArray[np.int64] = self._counts.cpu().numpy()
        return counts
