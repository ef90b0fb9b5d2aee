# SPDX-License-Identifier: Apache-2.0
"""Count a pass's choices where they lie, on the device: no copy to the host, no wait."""

import torch
from torch import Tensor
from vllm.moe_routes.capture.buffer import CaptureBuffer
from vllm.moe_routes.counts import Shape

#: Choices that are counted at once. Bounds the int64 indices that counting needs for a moment.
CHUNK = 1 << 20


class Counter:
    """Adds the choices of passes up on the device.

    Args:
        buffer: the capture buffer, or a narrowed one; its layers are those of ``shape``.
        shape: what to count over.
    """

    def __init__(self, buffer: CaptureBuffer, shape: Shape) -> None:
        self._buffer = buffer
        self._shape = shape
        device = buffer.ids.device
        starts = torch.arange(len(shape.layers), device=device) * shape.width
        self._starts = starts.view(1, -1, 1)
        self._one = torch.ones(1, dtype=torch.int64, device=device)

    def zeros(self, *leading: int) -> Tensor:
        """A tensor to count into: [*leading, L, width] int64."""
        shape = (*leading, len(self._shape.layers), self._shape.width)
        return torch.zeros(shape, dtype=torch.int64, device=self._buffer.ids.device)

    def add(self, counts: Tensor, num_rows: int) -> None:
        """Add the buffer's first ``num_rows`` rows to ``counts`` [L, width]."""
        ids = self._buffer.select_ids(num_rows)
        rows = max(1, CHUNK // max(1, ids[0].numel())) if num_rows else 1
        flat = counts.view(-1)
        for chunk in ids.split(rows):
            # -1, "not captured" as int16, must not count for an expert: it is 65535 then.
            index = chunk.to(torch.int64).bitwise_and_(0xFFFF)
            index = index.clamp_(max=self._shape.num_experts).add_(self._starts).flatten()
            flat.scatter_add_(0, index, self._one.expand(index.shape))
