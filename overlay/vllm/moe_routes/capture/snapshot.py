# SPDX-License-Identifier: Apache-2.0
"""Take a pass's rows out of the capture buffer before the next pass overwrites them.

The engine thread calls ``take`` and goes on; the writer thread calls ``resolve``. In host memory
the clone is the snapshot. On CUDA the clone is made on the compute stream, ordered before the next
pass, and a side stream copies it to pinned memory while the next pass runs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt
import torch
from torch import Tensor
from vllm.moe_routes.capture.buffer import CaptureBuffer


class Routes(NamedTuple):
    """One pass on the host.

    Attributes:
        topk_ids: [n, L, K], ids or ``not_an_id``.
        topk_weights: [n, L, K] float32.
        token_ids: [n] input token of every row, or None where the host knows it needs none.
    """

    topk_ids: npt.NDArray[Any]
    topk_weights: npt.NDArray[Any]
    token_ids: npt.NDArray[Any] | None


class Pending(Protocol):
    """A snapshot under way."""

    @property
    def nbytes(self) -> int:
        """Size of the arrays, in bytes."""

    def resolve(self) -> Any:
        """Wait for the copy and return it: ``Routes`` of ``take``, an array of ``take_array``.

        Called once; off the engine thread where it may have to wait.
        """


class Snapshotter(Protocol):
    def take(self, buffer: CaptureBuffer, num_rows: int, token_ids: Tensor | None) -> Pending:
        """Snapshot the first ``num_rows`` rows."""

    def take_array(self, tensor: Tensor) -> Pending:
        """Copy a tensor that nobody writes to any more."""


class _HostPending(NamedTuple):
    arrays: Any
    nbytes: int

    def resolve(self) -> Any:
        return self.arrays


class HostSnapshotter:
    """For a buffer in host memory: the clone is the snapshot."""

    def take(self, buffer: CaptureBuffer, num_rows: int, token_ids: Tensor | None) -> Pending:
        ids = buffer.copy_ids(num_rows)
        weights = buffer.copy_weights(num_rows)
        tokens = None if token_ids is None else token_ids[:num_rows].clone().numpy()
        routes = Routes(ids.numpy(), weights.numpy(), tokens)
        return _HostPending(routes, ids.nbytes + weights.nbytes)

    def take_array(self, tensor: Tensor) -> Pending:
        return _HostPending(tensor.numpy(), tensor.nbytes)


class CudaStreams:
    """The part of ``torch.cuda`` that ordering depends on; tests put a fake in its place.

    Pinned blocks come from torch's caching host allocator.
    """

    def current_stream(self) -> Any:
        return torch.cuda.current_stream()

    def new_stream(self) -> Any:
        return torch.cuda.Stream()

    def new_event(self) -> Any:
        return torch.cuda.Event()

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = torch.cuda.stream(stream)
        return context

    def pinned_like(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class _StreamPending:
    """Keeps the device clones alive until the side stream has read them."""

    def __init__(
        self,
        clones: list[Tensor],
        copies: list[Tensor],
        event: Any,
        make: Callable[..., Any],
    ) -> None:
        self._make = make
        self._clones = clones
        self._copies = copies
        self._event = event
        self.nbytes = sum(item.nbytes for item in copies)

    def resolve(self) -> Any:
        self._event.synchronize()
        self._clones.clear()
        return self._make(*(item.numpy() for item in self._copies))


def _routes(ids: Any, weights: Any, token_ids: Any = None) -> Routes:
    return Routes(ids, weights, token_ids)


def _only(array: Any) -> Any:
    return array


class StreamSnapshotter:
    """For a buffer in device memory: clone on the compute stream, copy to the host aside."""

    def __init__(self, api: CudaStreams) -> None:
        self._api = api
        self._side = api.new_stream()

    def take(self, buffer: CaptureBuffer, num_rows: int, token_ids: Tensor | None) -> Pending:
        clones = [buffer.copy_ids(num_rows), buffer.copy_weights(num_rows)]
        if token_ids is not None:
            clones.append(token_ids[:num_rows].clone())
        return self._copy(clones, _routes)

    def take_array(self, tensor: Tensor) -> Pending:
        return self._copy([tensor], _only)

    def _copy(self, clones: list[Tensor], make: Callable[..., Any]) -> Pending:
        copies = [self._api.pinned_like(item) for item in clones]
        # The side stream may read the clones only after the compute stream has written them.
        self._side.wait_stream(self._api.current_stream())
        event = self._api.new_event()
        with self._api.use(self._side):
            for copy, clone in zip(copies, clones, strict=True):
                copy.copy_(clone, non_blocking=True)
            event.record(self._side)
        return _StreamPending(clones, copies, event, make)


#: Device type -> how to snapshot there. A type that is missing is refused at start.
SNAPSHOTTERS: dict[str, Callable[[], Snapshotter]] = {
    "cpu": HostSnapshotter,
    "cuda": lambda: StreamSnapshotter(CudaStreams()),
}
