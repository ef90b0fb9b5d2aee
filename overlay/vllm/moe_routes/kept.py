# SPDX-License-Identifier: Apache-2.0
"""Choices of an eager pass on the host: kept as the router returned them.

A copy of a few hundred bytes costs its call, not its bytes. So the hook keeps references, to
tensors that a router makes afresh for every call and nobody writes to, and the pass's end hands
them over. Who resolves them puts them together: the writer thread, or ``stat`` for many passes at
a time. Compiled passes and CUDA graphs can hold no dictionary; they write to the buffer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor
from vllm.moe_routes import tally
from vllm.moe_routes.capture import CaptureBuffer
from vllm.moe_routes.snapshot import Pending, Routes
from vllm.moe_routes.tally import FORWARD_MODES, Counts, Lost, PassTokens, Shape

#: By slot and first row, what a call of that layer's router returned: ids and weights, each
#: [n, >= top_k]. A dictionary, so that passes nobody takes, as idle ranks run, don't pile up.
Kept = dict[tuple[int, int], tuple[Tensor, Tensor]]

#: What a tensor takes beside its numbers, in bytes; charged to the queue.
TENSOR_BYTES = 512
#: What waits to be counted, at most: passes counted together cost less than one by one.
WAITING_BYTES = 1 << 20


class KeptRoutes(NamedTuple):
    """A ``snapshot.Pending`` of one pass.

    Attributes:
        kept: in the order in which the layers fired.
        slots: [L] of the recorded layers, ascending.
        buffer: gives dtype, K and ``not_an_id``; nothing is read from it.
        num_rows: rows of the pass.
        rows: [m] int64, the rows to take; None: all.
        token_ids: [m] input token of every row, or None.
        nbytes: of the choices, and of the tensors that hold them.
    """

    kept: Kept
    slots: Sequence[int]
    buffer: CaptureBuffer
    num_rows: int
    rows: npt.NDArray[Any] | None
    token_ids: npt.NDArray[Any] | None
    nbytes: int

    def resolve(self) -> Routes:
        whole = self._is_whole()
        ids = [ids for ids, _ in self.kept.values()]
        weights = [given.float() for _, given in self.kept.values()]
        return Routes(
            # The ids keep the router's dtype, so that none wraps around.
            self._join(ids, self.buffer.not_an_id, whole),
            self._join(weights, 0.0, whole),
            self.token_ids,
        )

    def ids(self) -> npt.NDArray[Any]:
        """[n, L, K], without the weights: all that counting needs."""
        ids = [ids for ids, _ in self.kept.values()]
        return self._join(ids, self.buffer.not_an_id, self._is_whole())

    def _join(self, tensors: Sequence[Tensor], missing: float, whole: bool) -> npt.NDArray[Any]:
        """One of the two of all layers, with ``missing`` where nothing was chosen."""
        rows = slice(self.num_rows) if self.rows is None else self.rows
        if not whole:
            some: npt.NDArray[Any] = self._pieces(tensors, missing)[rows]
            return some
        n, k = tensors[0].shape
        # In memory layer by layer.
        joined: npt.NDArray[Any] = np.concatenate([item.numpy() for item in tensors])
        by_row: npt.NDArray[Any] = joined.reshape(len(tensors), n, k).transpose(1, 0, 2)[rows]
        return by_row

    def _is_whole(self) -> bool:
        """Whether every layer was called once for all rows, as nearly always."""
        shapes = {ids.shape for ids, _ in self.kept.values()}
        if len(shapes) != 1 or list(self.kept) != [(slot, 0) for slot in self.slots]:
            return False
        n, k = next(iter(shapes))
        return bool(n >= self.num_rows and k == self.buffer.ids.shape[2])

    def _pieces(self, tensors: Sequence[Tensor], missing: float) -> npt.NDArray[Any]:
        shape = (self.num_rows, len(self.slots), self.buffer.ids.shape[2])
        kind = np.float32 if isinstance(missing, float) else np.int64
        joined = np.full(shape, missing, dtype=kind)
        for (slot, row0), item in zip(self.kept, tensors, strict=True):
            n = max(0, min(len(item), self.num_rows - row0))  # behind them is padding
            k = min(item.shape[1], shape[2])  # columns past K are fused shared experts
            joined[row0 : row0 + n, self.slots.index(slot), :k] = item[:n, :k].numpy()
        return joined


class KeptCounts(NamedTuple):
    """A ``snapshot.Pending`` that counts once it is resolved."""

    routes: KeptRoutes
    shape: Shape

    @property
    def nbytes(self) -> int:
        return self.routes.nbytes

    def resolve(self) -> Counts:
        return tally.count_choices(self.routes.ids(), self.shape)


class KeptChoices:
    """A ``choices.Choices`` of what the hooks keep.

    Args:
        kept: where they keep it.
        slots: of the recorded layers.
        shape: what to count over.
        buffer: as of :class:`KeptRoutes`.
    """

    def __init__(
        self, kept: Kept, slots: Sequence[int], shape: Shape, buffer: CaptureBuffer
    ) -> None:
        self._kept = kept
        self._slots = list(slots)
        self._shape = shape
        self._buffer = buffer

    def begin(self, num_rows: int) -> None:
        self._kept.clear()  # of a pass that nobody takes

    def routes(
        self, num_rows: int, token_ids: Tensor | None, rows: npt.NDArray[Any] | None = None
    ) -> KeptRoutes:
        kept = dict(self._kept)
        self._kept.clear()
        tokens = None
        if token_ids is not None:
            tokens = token_ids[:num_rows].numpy()[slice(None) if rows is None else rows].copy()
        size = sum(ids.nbytes + given.nbytes + 2 * TENSOR_BYTES for ids, given in kept.values())
        return KeptRoutes(kept, self._slots, self._buffer, num_rows, rows, tokens, size)

    def counts(self, num_rows: int) -> Pending:
        return KeptCounts(self.routes(num_rows, None), self._shape)

    def totals(self, lost: Lost) -> "KeptTotals":
        return KeptTotals(self, self._shape, lost)


class KeptTotals:
    """A ``choices.Totals`` that counts some passes at a time.

    Args:
        choices: of the passes.
        shape: what to count over.
        lost: told of passes that can't be counted.
    """

    def __init__(self, choices: KeptChoices, shape: Shape, lost: Lost) -> None:
        self._choices = choices
        size = (len(FORWARD_MODES), len(shape.layers), shape.width)
        self._counts = np.zeros(size, dtype=np.int64)
        self._lost = lost
        self._waiting: list[tuple[PassTokens, Pending]] = []
        self._bytes = 0

    def add(self, tokens: PassTokens) -> None:
        taken = self._choices.counts(tokens.total)
        self._waiting.append((tokens, taken))
        self._bytes += taken.nbytes
        if self._bytes >= WAITING_BYTES:
            self._count()

    def read(self) -> npt.NDArray[np.int64]:
        self._count()
        return self._counts.copy()

    def _count(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        for tokens, taken in waiting:
            try:
                self._counts[tokens.forward_mode] += taken.resolve()
            except Exception as error:  # the engine must go on
                self._lost(tokens, error)
