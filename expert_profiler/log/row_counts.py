# SPDX-License-Identifier: Apache-2.0
"""Count choices, rows and requests in one pass over the rows, and notice rows that may repeat.

Pure numpy. Memory depends on the layers, experts and requests of a log, not on its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# phase 0 to 2, flagged or not
_KINDS = 6
# Layers and ids below this index tables; what lies outside is no real layer or expert.
_DENSE = 1 << 16
# Layers times positions up to which rows are checked by checksum: 128 MB of hashes.
_MAX_HASHES = 1 << 24

Ints = npt.NDArray[Any]


class RowBatch(NamedTuple):
    """Consecutive route rows of one file, in file order.

    Attributes:
        names: request ids that ``request`` points into.
        request: [n] index into ``names``.
        position, layer: [n].
        phase: [n] 0 prefill, 1 decode, 2 unknown.
        flagged: [n] bool.
        lengths: [n] ids of each row, or an int where all have as many.
        ids: [sum of lengths].
    """

    names: Sequence[str]
    request: Ints
    position: Ints
    layer: Ints
    phase: Ints
    flagged: Ints
    lengths: Ints | int
    ids: Ints


class RowCounts:
    """Adds up batches of rows; the properties hold the results."""

    def __init__(self) -> None:
        self._slot_of: dict[int, int] = {}
        self._slots: Ints = np.full(64, -1, dtype=np.int64)  # by layer, of those below _DENSE
        self._choices: Ints = np.zeros((0, _KINDS, 0), dtype=np.int64)
        self._rows: Ints = np.zeros((0, _KINDS), dtype=np.int64)
        self._strange: dict[tuple[int, int, int], int] = {}  # (slot, kind, id outside _DENSE)
        self._positions = _Positions()
        self._runs = _Runs()

    def add(self, batch: RowBatch) -> None:
        n = len(batch.layer)
        if n == 0:
            return
        slot = self._slot(batch.layer)
        kind = batch.phase * np.uint8(2) + batch.flagged
        self._count(slot * _KINDS + kind, batch)
        routes = _route_hash(batch.lengths, batch.ids, n)
        codes = self._positions.see(batch.names, batch.request)
        position = batch.position
        if batch.flagged.any():
            plain = ~batch.flagged
            slot, codes, position, routes = (x[plain] for x in (slot, codes, position, routes))
        if len(slot):
            self._positions.add(codes, position, slot)
            self._runs.add(slot, routes)

    # ---- results -----------------------------------------------------------------------------

    @property
    def cells(self) -> Ints:
        """[cells, 5] int64, sorted: layer, phase, flagged, expert, choices."""
        layers = self._layers()
        slot, kind, expert = (np.asarray(axis) for axis in np.nonzero(self._choices))
        found = [layers[slot], kind // 2, kind % 2, expert, self._choices[slot, kind, expert]]
        rows: Ints = np.stack(found, axis=1)
        strange = [
            (int(layers[slot]), kind // 2, kind % 2, expert, n)
            for (slot, kind, expert), n in self._strange.items()
        ]
        if strange:
            rows = np.concatenate([rows, np.array(strange, dtype=np.int64)])
        ordered: Ints = rows[np.lexsort(rows[:, 3::-1].T)].astype(np.int64)
        return ordered

    @property
    def cell_rows(self) -> Ints:
        """[cells, 4] int64, sorted: layer, phase, flagged, rows."""
        layers = self._layers()
        slot, kind = np.nonzero(self._rows)
        found = [layers[slot], kind // 2, kind % 2, self._rows[slot, kind]]
        rows = np.stack(found, axis=1).astype(np.int64)
        ordered: Ints = rows[np.lexsort(rows[:, 2::-1].T)]
        return ordered

    @property
    def requests(self) -> int:
        """Distinct request ids, flagged rows' included."""
        return self._positions.requests

    @property
    def surely_no_duplicates(self) -> bool:
        """Every request's unflagged rows are consecutive positions, once in every layer.

        Compared by a 64-bit checksum over random numbers, so a false True has odds of 1 in 10^19.
        A False says nothing: positions may be missing, which no duplicate need fill.
        """
        return self._positions.whole

    @property
    def longest_run(self) -> int:
        """Most rows in a row, in file order and within one layer, with equal ids; unflagged.

        Counted by hash, so never too low.
        """
        return self._runs.longest

    # ---- inside ------------------------------------------------------------------------------

    def _layers(self) -> Ints:
        return np.array(list(self._slot_of), dtype=np.int64)

    def _slot(self, layer: Ints) -> Ints:
        """[n] int64: a small number for each layer, the same throughout the log."""
        low, high = int(layer.min()), int(layer.max())
        if low < 0 or high >= _DENSE:
            found, index = np.unique(layer, return_inverse=True)
            slots: Ints = np.array([self._new_slot(int(item)) for item in found])
            return slots[index]
        if high >= len(self._slots):
            self._slots = np.concatenate([self._slots, np.full(high + 1, -1, dtype=np.int64)])
        slot: Ints = self._slots[layer]
        if slot.min() < 0:
            for item in np.unique(layer[slot < 0]).tolist():
                self._slots[item] = self._new_slot(item)
            slot = self._slots[layer]
        return slot

    def _new_slot(self, layer: int) -> int:
        return self._slot_of.setdefault(layer, len(self._slot_of))

    def _count(self, cell: Ints, batch: RowBatch) -> None:
        slots = len(self._slot_of)
        ids, lengths = batch.ids, batch.lengths
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, -1)
        if low < 0 or high >= _DENSE:
            of_id = np.repeat(cell, lengths)
            outside = (ids < 0) | (ids >= _DENSE)
            for c, expert in zip(of_id[outside].tolist(), ids[outside].tolist(), strict=True):
                place = (c // _KINDS, c % _KINDS, expert)
                self._strange[place] = self._strange.get(place, 0) + 1
            cell_of_id, ids, lengths = of_id[~outside], ids[~outside], 1
            high = int(ids.max(initial=-1))
        else:
            cell_of_id = cell
        width = max(high + 1, self._choices.shape[2])
        self._choices = _grown(self._choices, (slots, _KINDS, width))
        self._rows = _grown(self._rows, (slots, _KINDS))
        first = cell_of_id * width  # of the cell's row in the flat table
        if isinstance(lengths, int):
            key: Ints = (first[:, None] + ids.reshape(len(first), lengths)).reshape(-1)
        else:
            key = np.asarray(np.repeat(first, lengths) + ids)
        counted = np.bincount(key, minlength=slots * _KINDS * width)
        self._choices += counted.reshape(slots, _KINDS, width)
        self._rows += np.bincount(cell, minlength=slots * _KINDS).reshape(slots, _KINDS)


class _Positions:
    """Which rows there are, as one checksum a request.

    A row's number is a hash of its position and layer slot; a request's rows sum up to the sum
    over its positions and all layers exactly when each is there once.
    """

    def __init__(self) -> None:
        self._code_of: dict[str, int] = {}
        self._rows: Ints = np.zeros(0, dtype=np.int64)
        self._first: Ints = np.zeros(0, dtype=np.int64)
        self._sums: Ints = np.zeros(0, dtype=np.uint64)
        self._slots: set[int] = set()
        self._lowest = self._highest = 0
        self._hashes: Ints = np.zeros((0, 0), dtype=np.uint64)  # [slots, positions]

    @property
    def requests(self) -> int:
        return len(self._code_of)

    def see(self, names: Sequence[str], request: Ints) -> Ints:
        """[n] the requests' codes; a new request gets the next one."""
        used = np.flatnonzero(np.bincount(request)).tolist()
        codes = np.full(len(names), -1, dtype=np.int64)
        for i in used:
            codes[i] = self._code_of.setdefault(names[i], len(self._code_of))
        size = len(self._code_of)
        if size > len(self._rows):
            room = (max(size, 2 * len(self._rows)),)
            self._rows, self._sums = _grown(self._rows, room), _grown(self._sums, room)
            before = len(self._first)
            self._first = _grown(self._first, room)
            self._first[before:] = np.iinfo(np.int64).max
        found: Ints = codes[request]
        return found

    def add(self, codes: Ints, position: Ints, slot: Ints) -> None:
        """Unflagged rows, at least one: [n] codes that :meth:`see` gave, positions, layer slots."""
        self._slots.update(np.flatnonzero(np.bincount(slot)).tolist())
        low, high = int(position.min()), int(position.max())
        self._lowest, self._highest = min(self._lowest, low), max(self._highest, high)
        if not self._checkable:
            return
        if high >= self._hashes.shape[1] or max(self._slots) >= len(self._hashes):
            size = 1 << max(high, self._hashes.shape[1] - 1).bit_length()
            slots = np.arange(max(max(self._slots) + 1, len(self._hashes)))
            self._hashes = _row_hash(np.arange(size + 1), slots[:, None])
        # Rows of one request come in runs: sum those up first.
        starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
        of_run = codes[starts]
        flat = slot * self._hashes.shape[1] + position
        hashes = np.take(self._hashes.reshape(-1), flat)
        np.add.at(self._rows, of_run, np.diff(np.append(starts, len(codes))))
        np.minimum.at(self._first, of_run, np.minimum.reduceat(position, starts))
        np.add.at(self._sums, of_run, np.add.reduceat(hashes, starts))

    @property
    def _checkable(self) -> bool:
        """Whether the table of hashes that the check needs is of a sensible size."""
        size = (self._highest + 1) * (max(self._slots, default=0) + 1)
        return self._lowest >= 0 and size <= _MAX_HASHES

    @property
    def whole(self) -> bool:
        if not self._checkable:
            return False
        rows = self._rows[: len(self._code_of)]
        seen = rows > 0
        rows, first, sums = (
            rows[seen],
            self._first[: len(seen)][seen],
            self._sums[: len(seen)][seen],
        )
        if not len(rows):
            return True
        layers = len(self._slots)
        last = first + rows // layers
        if (rows % layers).any() or int(last.max()) - 1 > self._highest:
            return False
        # upto[p]: the sum over all layers and the positions below p.
        upto = np.zeros(self._highest + 2, dtype=np.uint64)
        upto[1:] = self._hashes[sorted(self._slots), : self._highest + 1].sum(axis=0)
        np.cumsum(upto, out=upto)
        return bool(np.array_equal(upto[last] - upto[first], sums))


class _Runs:
    """The longest run of equal routes within a layer."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, int]] = {}  # by slot: hash and length of the open run
        self.longest = 0

    def add(self, slot: Ints, routes: npt.NDArray[np.uint64]) -> None:
        """[n] layer slots and route hashes, in file order; n > 0."""
        order = np.argsort(slot.astype(np.uint16), kind="stable")
        slot, routes = slot[order], routes[order]
        starts = np.empty(len(slot) + 1, dtype=bool)
        starts[0] = starts[-1] = True
        np.not_equal(routes[1:], routes[:-1], out=starts[1:-1])
        new_layer = np.flatnonzero(slot[1:] != slot[:-1]) + 1
        starts[new_layer] = True
        at = np.flatnonzero(starts)
        self.longest = max(self.longest, int(np.diff(at).max()))
        firsts = np.concatenate([[0], new_layer])
        ends = np.append(new_layer, len(slot))
        first_run = np.searchsorted(at, firsts)
        last_run = np.searchsorted(at, ends) - 1
        for i, item in enumerate(slot[firsts].tolist()):
            value, length = self._last.get(item, (None, 0))
            first_length = int(at[first_run[i] + 1] - at[first_run[i]])
            carried = length if value == int(routes[firsts[i]]) else 0
            self.longest = max(self.longest, carried + first_length)
            open_length = int(at[last_run[i] + 1] - at[last_run[i]])
            if first_run[i] == last_run[i]:
                open_length += carried
            self._last[item] = int(routes[ends[i] - 1]), open_length


def _route_hash(lengths: Ints | int, ids: Ints, n: int) -> Ints:
    """[n] uint64: equal for rows with the same ids in the same order.

    The sum of a hash of each id with its place, so that it does not depend on the batch's shape.
    """
    if isinstance(lengths, int):
        total = np.zeros(n, dtype=np.uint64)
        wide = ids.reshape(n, lengths)
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        tables = np.arange(high + 1) if low >= 0 and high < _DENSE else None
        for k in range(lengths):
            place = np.int64(k + 1)
            column = wide[:, k]
            total += (
                _row_hash(column.astype(np.int64), place)
                if tables is None
                else _row_hash(tables, place)[column]
            )
        return total
    starts = np.cumsum(lengths) - lengths
    places = np.arange(len(ids)) - np.repeat(starts, lengths) + 1
    hashes = np.append(_row_hash(ids.astype(np.int64), places), np.uint64(0))
    sums: Ints = np.add.reduceat(hashes, starts)
    sums[lengths == 0] = 0  # reduceat gives the next row's first
    return sums


def _row_hash(position: Any, layer: Any) -> npt.NDArray[np.uint64]:
    """splitmix64 of (position, layer)."""
    x = np.asarray(position).astype(np.uint64) + (
        np.asarray(layer).astype(np.uint64) << np.uint64(40)
    )
    x *= np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _grown(array: Any, shape: tuple[int, ...]) -> Any:
    """``array`` with zeros up to ``shape``."""
    if array.shape == shape:
        return array
    larger = np.zeros(shape, dtype=array.dtype)
    larger[tuple(slice(0, n) for n in array.shape)] = array
    return larger
