# SPDX-License-Identifier: Apache-2.0
"""Choices of an eager pass on the host: references to what the routers returned.

A copy of a few hundred bytes costs its call, not its bytes. So the hook keeps references, to
tensors that a router makes afresh for every call and nobody writes to, and the pass's end hands
them over. Who resolves them puts them together: the writer thread, or ``stat`` for many passes at
a time. Compiled passes and CUDA graphs can hold no dictionary; they write to the buffer.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.moe_routes.capture.buffer import CaptureBuffer
from vllm.moe_routes.capture.snapshot import Pending, Routes
from vllm.moe_routes.counts import Lost, PassTokens, Shape, count_choices

#: A layer's slot, and the first row of the pass that a call of its router was for.
Place = tuple[int, int]
#: What the calls of one pass returned, in the order in which the layers fired: ids and weights,
#: each [n, >= top_k]. A dictionary, so that passes nobody takes, as idle ranks run, don't pile up.
References = dict[Place, tuple[Tensor, Tensor]]

#: What a tensor takes beside its numbers, in bytes; charged to the queue.
TENSOR_BYTES = 512
#: What waits to be counted, at most: passes counted together cost less than one by one.
WAITING_BYTES = 1 << 20


class ReferenceChoices:
    """A ``choices.Choices`` of what the hooks keep references to.

    Args:
        references: where they keep them.
        slots: [L] of the recorded layers, ascending.
        shape: what to count over.
        buffer: gives K and ``not_an_id``; nothing is read from it.
    """

    def __init__(
        self, references: References, slots: Sequence[int], shape: Shape, buffer: CaptureBuffer
    ) -> None:
        self._references = references
        self._slots = list(slots)
        self._shape = shape
        self._top_k = buffer.ids.shape[2]
        self._not_an_id = buffer.not_an_id

    def begin(self, num_rows: int) -> None:
        self._references.clear()  # of a pass that nobody takes

    def routes(
        self, num_rows: int, token_ids: Tensor | None, rows: npt.NDArray[Any] | None = None
    ) -> Pending:
        taken = self._references.copy()
        self._references.clear()
        tokens = None
        if token_ids is not None:
            tokens = token_ids[:num_rows].numpy()[slice(None) if rows is None else rows].copy()
        size = sum(ids.nbytes + given.nbytes + 2 * TENSOR_BYTES for ids, given in taken.values())
        return Pending(partial(self._resolve_routes, taken, num_rows, rows, tokens), size)

    def counts(self, num_rows: int) -> Pending:
        ids, size = self.take_ids()
        return Pending(lambda: count_choices(self.join_ids(ids, num_rows), self._shape), size)

    def accumulator(self, lost: Lost) -> "ReferenceAccumulator":
        return ReferenceAccumulator(self, self._shape, lost)

    def take_ids(self) -> tuple[dict[Place, Tensor], int]:
        """The pass's ids, without the weights, which nobody needs then; and what they take.

        Bytes of the ids, and of the tensors that hold them.
        """
        taken = {place: ids for place, (ids, _) in self._references.items()}
        self._references.clear()
        return taken, sum(ids.nbytes + TENSOR_BYTES for ids in taken.values())

    def join_ids(self, ids: Mapping[Place, Tensor], num_rows: int) -> npt.NDArray[Any]:
        """[num_rows, L, K] ids, in the router's dtype, so that none wraps around."""
        return self._join(ids, num_rows, self._not_an_id, self._is_whole(ids, num_rows))

    def _resolve_routes(
        self,
        taken: References,
        num_rows: int,
        rows: npt.NDArray[Any] | None,
        token_ids: npt.NDArray[Any] | None,
    ) -> Routes:
        ids = {place: ids for place, (ids, _) in taken.items()}
        weights = {place: weights for place, (_, weights) in taken.items()}
        whole = self._is_whole(ids, num_rows)
        topk_ids = self._join(ids, num_rows, self._not_an_id, whole)
        topk_weights = self._join(weights, num_rows, 0.0, whole)
        if rows is not None:
            topk_ids, topk_weights = topk_ids[rows], topk_weights[rows]
        return Routes(topk_ids, topk_weights, token_ids)

    def _is_whole(self, ids: Mapping[Place, Tensor], num_rows: int) -> bool:
        """Whether every layer was called once for all rows, as nearly always."""
        shapes = {item.shape for item in ids.values()}
        if len(shapes) != 1 or list(ids) != [(slot, 0) for slot in self._slots]:
            return False
        n, k = next(iter(shapes))
        return bool(n >= num_rows and k == self._top_k)

    def _join(
        self, given: Mapping[Place, Tensor], num_rows: int, missing: float, whole: bool
    ) -> npt.NDArray[Any]:
        """The tensors in their places: [num_rows, L, K].

        Args:
            given: [n, >= top_k] each.
            num_rows: rows of the pass.
            missing: stands where nothing was chosen; a float for weights.
            whole: see :meth:`_is_whole`; then the result lies in memory layer by layer.
        """
        if whole:
            # One call for all of them: each tensor's way to numpy takes longer than its numbers.
            stacked = torch.cat(tuple(given.values())).view(len(given), -1, self._top_k)
            if stacked.is_floating_point():
                stacked = stacked.float()
            by_row: npt.NDArray[Any] = stacked.numpy().transpose(1, 0, 2)[:num_rows]
            return by_row
        shape = (num_rows, len(self._slots), self._top_k)
        kind = np.float32 if isinstance(missing, float) else np.int64
        joined = np.full(shape, missing, dtype=kind)
        for (slot, row0), item in given.items():
            n = max(0, min(len(item), num_rows - row0))  # behind them is padding
            k = min(item.shape[1], self._top_k)  # columns past K are fused shared experts
            part = item[:n, :k]
            part = part.float() if part.is_floating_point() else part
            joined[row0 : row0 + n, self._slots.index(slot), :k] = part.numpy()
        return joined


class ReferenceAccumulator:
    """A ``choices.Accumulator`` that counts some passes at a time.

    Args:
        choices: of the passes.
        shape: what to count over.
        lost: told of passes that can't be counted.
    """

    def __init__(self, choices: ReferenceChoices, shape: Shape, lost: Lost) -> None:
        self._choices = choices
        self._shape = shape
        self._counts = shape.zeros()
        self._lost = lost
        self._waiting: list[tuple[PassTokens, dict[Place, Tensor]]] = []
        self._bytes = 0

    def add(self, tokens: PassTokens) -> None:
        taken, size = self._choices.take_ids()
        self._waiting.append((tokens, taken))
        self._bytes += size
        if self._bytes >= WAITING_BYTES:
            self._count()

    def read(self) -> npt.NDArray[np.int64]:
        self._count()
        return self._counts.copy()

    def _count(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        by_mode: dict[int, list[tuple[PassTokens, npt.NDArray[Any]]]] = {}
        for tokens, taken in waiting:
            try:
                choices = self._choices.join_ids(taken, tokens.total)
            except Exception as error:  # the engine must go on
                self._lost(tokens, error)
            else:
                by_mode.setdefault(tokens.forward_mode, []).append((tokens, choices))
        for mode, some in by_mode.items():
            try:
                ids = np.concatenate([choices for _, choices in some])
                self._counts[mode] += count_choices(ids, self._shape)
            except Exception as error:
                for tokens, _ in some:
                    self._lost(tokens, error)
