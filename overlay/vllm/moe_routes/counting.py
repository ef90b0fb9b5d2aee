# SPDX-License-Identifier: Apache-2.0
"""Count a pass's choices where they lie: no copy to the host, no wait for a device."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from vllm.moe_routes import tally
from vllm.moe_routes.capture import CaptureBuffer
from vllm.moe_routes.snapshot import Pending, Snapshotter
from vllm.moe_routes.tally import Counts, Shape

#: Choices that are counted at once. Bounds the int64 indices that counting needs for a moment.
CHUNK = 1 << 20


class Counter(Protocol):
    """Counts passes of one recording."""

    def add(self, totals: Tensor, choices: CaptureBuffer, num_rows: int) -> None:
        """Add a pass's first ``num_rows`` rows to ``totals`` [L, width] int64."""

    def take(self, choices: CaptureBuffer, num_rows: int, snapshotter: Snapshotter) -> Pending:
        """A pass's counts, to be resolved off the engine thread: [L, width] int64."""


class DeviceCounter:
    """For choices in device memory.

    Args:
        device: where they lie.
        shape: what to count over.
    """

    def __init__(self, device: torch.device, shape: Shape) -> None:
        self._shape = shape
        starts = torch.arange(len(shape.layers), device=device) * shape.width
        self._starts = starts.view(1, -1, 1)
        self._one = torch.ones(1, dtype=torch.int64, device=device)

    def add(self, totals: Tensor, choices: CaptureBuffer, num_rows: int) -> None:
        ids = choices.select_ids(num_rows)
        rows = max(1, CHUNK // max(1, ids[0].numel())) if num_rows else 1
        flat = totals.view(-1)
        for chunk in ids.split(rows):
            # -1, "not captured" as int16, must not count for an expert: it is 65535 then.
            index = chunk.to(torch.int64).bitwise_and_(0xFFFF)
            index = index.clamp_(max=self._shape.num_experts).add_(self._starts).flatten()
            flat.scatter_add_(0, index, self._one.expand(index.shape))

    def take(self, choices: CaptureBuffer, num_rows: int, snapshotter: Snapshotter) -> Pending:
        shape = (len(self._shape.layers), self._shape.width)
        counts = torch.zeros(shape, dtype=torch.int64, device=choices.ids.device)
        self.add(counts, choices, num_rows)
        return snapshotter.take_array(counts)


class _Uncounted(NamedTuple):
    """Ids that the writer thread counts."""

    ids: Tensor
    shape: Shape

    @property
    def nbytes(self) -> int:
        return int(self.ids.nbytes)

    def resolve(self) -> Counts:
        return tally.count_choices(self.ids.numpy(), self.shape)


class HostCounter:
    """For choices in host memory, where numpy's calls cost a fraction of torch's.

    Args:
        device: the host.
        shape: what to count over.
    """

    def __init__(self, device: torch.device, shape: Shape) -> None:
        self._shape = shape

    def add(self, totals: Tensor, choices: CaptureBuffer, num_rows: int) -> None:
        into = totals.numpy()
        into += tally.count_choices(choices.select_ids(num_rows).numpy(), self._shape)

    def take(self, choices: CaptureBuffer, num_rows: int, snapshotter: Snapshotter) -> Pending:
        return _Uncounted(choices.copy_ids(num_rows), self._shape)


#: Device type -> its counter; the same types as ``snapshot.SNAPSHOTTERS``.
COUNTERS: dict[str, type[DeviceCounter] | type[HostCounter]] = {
    "cpu": HostCounter,
    "cuda": DeviceCounter,
}
