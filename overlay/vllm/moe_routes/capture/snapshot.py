# SPDX-License-Identifier: Apache-2.0
"""Take a pass's rows out of the capture buffer before the next pass overwrites them.

The engine thread calls ``take`` and goes on; the writer thread calls ``resolve``. In host memory
the clone is the snapshot. On CUDA the clone is made on the compute stream, ordered before the next
pass, and a side stream copies it to pinned memory while the next pass runs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor
from vllm.moe_routes.capture.buffer import CaptureBuffer, copy_rows


class Routes(NamedTuple):
    """One pass on the host.

    Attributes:
        topk_ids: [n, L, K], ids or ``not_an_id``.
        topk_weights: [n, L, K] float32.
        token_ids: [n] input token of every row, or None where the host knows it needs none.
    """

    topk_ids: npt.NDArray[Any]
    topk_weights: npt.NDArray[Any]
    token_ids: npt.NDArray[Any] | None = None


class Pending(NamedTuple):
    """A snapshot under way.

    Attributes:
        resolve: waits for the copy and returns it: ``Routes``, or counts [L, width] int64. Called
            once; off the engine thread where it may have to wait.
        nbytes: size of the arrays, in bytes.
    """

    resolve: Callable[[], Any]
    nbytes: int


class Snapshotter(ABC):
    """Takes what a pass left, before the next pass runs."""

    def take(self, buffer: CaptureBuffer, rows: int | Tensor, token_ids: Tensor | None) -> Pending:
        """Snapshot some rows of the buffer, to be resolved to :class:`Routes`.

        Args:
            buffer: whole or narrowed.
            rows: how many of the first, or [n] int64 indices on the buffer's device.
            token_ids: [>= n] input token of every row of the pass, where they are needed.
        """
        tensors = buffer.copies(rows)
        if token_ids is not None:
            tensors.append(copy_rows(token_ids, rows))
        return self.copy(tensors, Routes)

    @abstractmethod
    def copy(self, tensors: list[Tensor], make: Callable[..., Any]) -> Pending:
        """Copy tensors that nobody writes to any more; ``make`` is given their arrays."""


class HostSnapshotter(Snapshotter):
    """For a buffer in host memory: the tensors are the arrays."""

    def copy(self, tensors: list[Tensor], make: Callable[..., Any]) -> Pending:
        arrays = make(*(item.numpy() for item in tensors))
        return Pending(lambda: arrays, sum(item.nbytes for item in tensors))


class CudaStreams:
    """The part of ``torch.cuda`` that ordering depends on; tests put a fake in its place.

    Pinned blocks come from torch's caching host allocator.
    """

    current_stream = staticmethod(torch.cuda.current_stream)
    new_stream = torch.cuda.Stream
    new_event = torch.cuda.Event
    use = staticmethod(torch.cuda.stream)

    def pinned_like(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class _StreamCopy:
    """Keeps the device clones alive until the side stream has read them."""

    def __init__(
        self, clones: list[Tensor], copies: list[Tensor], event: Any, make: Callable[..., Any]
    ) -> None:
        self._make = make
        self._clones = clones
        self._copies = copies
        self._event = event

    def resolve(self) -> Any:
        self._event.synchronize()
        self._clones.clear()
        return self._make(*(item.numpy() for item in self._copies))


class StreamSnapshotter(Snapshotter):
    """For a buffer in device memory: clone on the compute stream, copy to the host aside."""

    def __init__(self, api: CudaStreams) -> None:
        self._api = api
        self._side = api.new_stream()

    def copy(self, tensors: list[Tensor], make: Callable[..., Any]) -> Pending:
        copies = [self._api.pinned_like(item) for item in tensors]
        # The side stream may read the clones only after the compute stream has written them.
        self._side.wait_stream(self._api.current_stream())
        event = self._api.new_event()
        with self._api.use(self._side):
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            event.record(self._side)
        size = sum(item.nbytes for item in copies)
        return Pending(_StreamCopy(tensors, copies, event, make).resolve, size)


#: Device type -> how to snapshot there. A type that is missing is refused at start.
SNAPSHOTTERS: dict[str, Callable[[], Snapshotter]] = {
    "cpu": HostSnapshotter,
    "cuda": lambda: StreamSnapshotter(CudaStreams()),
}
