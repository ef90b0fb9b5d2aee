# SPDX-License-Identifier: Apache-2.0
"""The hot path: a static device buffer and the one op that writes it.

The op mutates its first two arguments, so a compiler keeps it, and touches no Python state, so a
CUDA graph replays it. The buffers are allocated once and never reassigned: graphs bake in their
addresses.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.moe_routes.layers import MoELayer
from vllm.utils.torch_utils import direct_register_custom_op


def moe_routes_capture(
    ids: Tensor, weights: Tensor, topk_ids: Tensor, topk_weights: Tensor, row0: int, slot: int
) -> None:
    """Copy one layer's choices into the step's buffer.

    Args:
        ids: [T, L, K], mutated.
        weights: [T, L, K] float32, mutated.
        topk_ids: [n, >= top_k] of any integer dtype. Columns past K are fused shared experts.
        topk_weights: [n, >= top_k] of any float dtype.
        row0: first buffer row.
        slot: the layer's place on the buffer's second axis.
    """
    n = topk_ids.shape[0]
    k = min(topk_ids.shape[1], ids.shape[2])
    ids[row0 : row0 + n, slot, :k].copy_(topk_ids[:, :k])
    weights[row0 : row0 + n, slot, :k].copy_(topk_weights[:, :k])


direct_register_custom_op(
    op_name="moe_routes_capture",
    op_func=moe_routes_capture,
    mutates_args=["ids", "weights"],
    fake_impl=lambda *_: None,
)


def ids_dtype(num_experts: int) -> torch.dtype:
    """Smallest dtype that holds every id and one value that is no id."""
    return torch.uint8 if num_experts <= 255 else torch.int16


def copy_rows(tensor: Tensor, rows: int | Tensor) -> Tensor:
    """Some rows of a tensor, in memory that nobody writes to.

    Args:
        tensor: [>= n, ...].
        rows: n, for the first n rows; or [n] int64 indices on the tensor's device.
    """
    return tensor[:rows].clone() if isinstance(rows, int) else tensor[rows]


class CaptureBuffer(NamedTuple):
    """Where a forward pass leaves its choices.

    Attributes:
        ids: [T, S, K], logical expert ids; ``not_an_id`` where nothing was captured.
        weights: [T, S, K] float32, as the router gave them to the kernel.
        not_an_id: the value that marks an element nothing was captured for.
        slots: [L] int64, the slots that a recording of some layers reads; None: all of them.
    """

    ids: Tensor
    weights: Tensor
    not_an_id: int
    slots: Tensor | None = None

    def narrowed(self, slots: Sequence[int]) -> "CaptureBuffer":
        """The same memory, read in ``slots`` only."""
        if list(slots) == list(range(self.ids.shape[1])):
            return self
        return self._replace(slots=torch.tensor(slots, device=self.ids.device))

    def select_ids(self, num_rows: int) -> Tensor:
        """The ids of the first rows: [num_rows, L, K], a view unless narrowed."""
        ids = self.ids[:num_rows]
        return ids if self.slots is None else ids.index_select(1, self.slots)

    def copies(self, rows: int | Tensor) -> list[Tensor]:
        """Ids and weights of some rows, each [n, L, K]; see :func:`copy_rows`."""
        if self.slots is None:
            return [copy_rows(self.ids, rows), copy_rows(self.weights, rows)]
        wanted = slice(rows) if isinstance(rows, int) else rows
        return [item[wanted].index_select(1, self.slots) for item in (self.ids, self.weights)]

    def clear(self, num_rows: int | None = None) -> None:
        """Mark the first ``num_rows`` rows (all by default) as not captured."""
        self.ids[:num_rows].fill_(self.not_an_id)

    @property
    def nbytes(self) -> int:
        return int(self.ids.nbytes + self.weights.nbytes)


def allocate(layers: Sequence[MoELayer], num_rows: int, device: torch.device) -> CaptureBuffer:
    """Allocate the buffer for ``layers``: one slot each, in the order given.

    Args:
        layers: the recorded layers; must not be empty.
        num_rows: most rows a forward pass can have on this rank.
        device: the model's device.
    """
    shape = (num_rows, len(layers), max(item.top_k for item in layers))
    dtype = ids_dtype(max(item.num_experts for item in layers))
    buffer = CaptureBuffer(
        ids=torch.empty(shape, dtype=dtype, device=device),
        weights=torch.zeros(shape, dtype=torch.float32, device=device),
        not_an_id=255 if dtype == torch.uint8 else -1,
    )
    buffer.clear()
    return buffer
