# SPDX-License-Identifier: Apache-2.0
"""Choices of an eager pass on the host: references to what the routers returned.

A copy of a few hundred bytes costs its call, not its bytes. So the hook keeps references, to
tensors that a router makes afresh for every call and nobody writes to, and the pass's end hands
them over. Who resolves them puts them together: the writer thread, or ``stat`` for many passes at
a time. Compiled passes and CUDA graphs can hold no dictionary; they write to the buffer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.moe_routes.capture.buffer import CaptureBuffer
from vllm.moe_routes.capture.snapshot import Routes
from vllm.moe_routes.counts import Counts, Lost, PassTokens, Shape, count_choices

#: A layer's slot, and the first row of the pass that a call of its router was for.
Place = tuple[int, int]
#: What the calls of one pass returned, in the order in which the layers fired: ids and weights,
#: each [n, >= top_k]. A dictionary, so that passes nobody takes, as idle ranks run, don't pile up.
References = dict[Place, tuple[Tensor, Tensor]]

#: What a tensor takes beside its numbers, in bytes; charged to the queue.
TENSOR_BYTES = 512
#: What waits to be counted, at most: passes counted together cost less than one by one.
WAITING_BYTES = 1 << 20


class Target(NamedTuple):
    """Target shape for assembling one pass's tensors: [num_rows, L, K].

    Attributes:
        slots: [L] of the recorded layers, ascending.
        top_k: K.
        num_rows: rows of the pass.
        not_an_id: stands for an id where nothing was chosen.
    """

    slots: Sequence[int]
    top_k: int
    num_rows: int
    not_an_id: int

    def is_whole(self, ids: Mapping[Place, Tensor]) -> bool:
        """Whether every layer was called once for all rows, as nearly always."""
        shapes = {item.shape for item in ids.values()}
        if len(shapes) != 1 or list(ids) != [(slot, 0) for slot in self.slots]:
            return False
        n, k = next(iter(shapes))
        return bool(n >= self.num_rows and k == self.top_k)

    def assemble(
        self, given: Mapping[Place, Tensor], missing: float, whole: bool
    ) -> npt.NDArray[Any]:
        """The tensors in their places, with ``missing`` where nothing was chosen.

        Args:
            given: [n, >= top_k] each.
            missing: a float for weights.
            whole: see :meth:`is_whole`; then the result lies in memory layer by layer.
        """
        if whole:
            # One call for all of them: each tensor's way to numpy takes longer than its numbers.
            stacked = torch.cat(tuple(given.values())).view(len(given), -1, self.top_k)
            if stacked.is_floating_point():
                stacked = stacked.float()
            by_row: npt.NDArray[Any] = stacked.numpy().transpose(1, 0, 2)[: self.num_rows]
            return by_row
        shape = (self.num_rows, len(self.slots), self.top_k)
        kind = np.float32 if isinstance(missing, float) else np.int64
        joined = np.full(shape, missing, dtype=kind)
        for (slot, row0), item in given.items():
            n = max(0, min(len(item), self.num_rows - row0))  # behind them is padding
            k = min(item.shape[1], self.top_k)  # columns past K are fused shared experts
            part = item[:n, :k]
            part = part.float() if part.is_floating_point() else part
            joined[row0 : row0 + n, self.slots.index(slot), :k] = part.numpy()
        return joined


class PendingRoutes(NamedTuple):
    """A ``snapshot.Pending`` of one pass.

    Attributes:
        references: of the pass.
        target: what they are assembled to.
        rows: [m] int64, the rows to take; None: all.
        token_ids: [m] input token of every row, or None.
        nbytes: of the choices, and of the tensors that hold them.
    """

    references: References
    target: Target
    rows: npt.NDArray[Any] | None
    token_ids: npt.NDArray[Any] | None
    nbytes: int

    def resolve(self) -> Routes:
        ids = {place: ids for place, (ids, _) in self.references.items()}
        weights = {place: weights for place, (_, weights) in self.references.items()}
        whole = self.target.is_whole(ids)
        # The ids keep the router's dtype, so that none wraps around.
        topk_ids = self.target.assemble(ids, self.target.not_an_id, whole)
        topk_weights = self.target.assemble(weights, 0.0, whole)
        if self.rows is not None:
            topk_ids, topk_weights = topk_ids[self.rows], topk_weights[self.rows]
        return Routes(topk_ids, topk_weights, self.token_ids)


class PendingCounts(NamedTuple):
    """A ``snapshot.Pending`` of one pass's counts, without the weights, which nobody needs then.

    Attributes:
        ids: of the pass.
        target: what they are assembled to.
        shape: what to count over.
        nbytes: of the ids, and of the tensors that hold them.
    """

    ids: dict[Place, Tensor]
    target: Target
    shape: Shape
    nbytes: int

    def choices(self) -> npt.NDArray[Any]:
        """[num_rows, L, K] ids."""
        target = self.target
        return target.assemble(self.ids, target.not_an_id, target.is_whole(self.ids))

    def resolve(self) -> Counts:
        return count_choices(self.choices(), self.shape)


class ReferenceChoices:
    """A ``choices.Choices`` of what the hooks keep references to.

    Args:
        references: where they keep them.
        slots: of the recorded layers.
        shape: what to count over.
        buffer: gives K and ``not_an_id``; nothing is read from it.
    """

    def __init__(
        self, references: References, slots: Sequence[int], shape: Shape, buffer: CaptureBuffer
    ) -> None:
        self._references = references
        self._shape = shape
        self._slots = list(slots)
        self._top_k = buffer.ids.shape[2]
        self._not_an_id = buffer.not_an_id

    def begin(self, num_rows: int) -> None:
        self._references.clear()  # of a pass that nobody takes

    def routes(
        self, num_rows: int, token_ids: Tensor | None, rows: npt.NDArray[Any] | None = None
    ) -> PendingRoutes:
        taken = self._references.copy()
        self._references.clear()
        tokens = None
        if token_ids is not None:
            tokens = token_ids[:num_rows].numpy()[slice(None) if rows is None else rows].copy()
        size = sum(ids.nbytes + given.nbytes + 2 * TENSOR_BYTES for ids, given in taken.values())
        return PendingRoutes(taken, self._target(num_rows), rows, tokens, size)

    def counts(self, num_rows: int) -> PendingCounts:
        taken = {place: ids for place, (ids, _) in self._references.items()}
        self._references.clear()
        size = sum(ids.nbytes + TENSOR_BYTES for ids in taken.values())
        return PendingCounts(taken, self._target(num_rows), self._shape, size)

    def _target(self, num_rows: int) -> Target:
        return Target(self._slots, self._top_k, num_rows, self._not_an_id)

    def accumulator(self, lost: Lost) -> "ReferenceAccumulator":
        return ReferenceAccumulator(self, self._shape, lost)


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
        self._waiting: list[tuple[PassTokens, PendingCounts]] = []
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
        by_mode: dict[int, list[tuple[PassTokens, npt.NDArray[Any]]]] = {}
        for tokens, taken in waiting:
            try:
                choices = taken.choices()
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
