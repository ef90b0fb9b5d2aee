# SPDX-License-Identifier: Apache-2.0
"""JSON lines: one object a token and layer.

The writer thread shares Python's lock with the engine thread, which waits whenever a line is made
with the lock held. So lines are put together in numpy, which lets go of it, from columns of bytes:
a row of a matrix is a line, padded with NUL, and the NULs are taken out at the end. JSON has none
of its own. Only the weights' digits are made one by one.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.schema import PHASES, ROUTE, ROUTE_FIELDS, Flag, Record
from vllm.moe_routes.writing.formats.linefile import Contents, LineFile, refusal
from vllm.moe_routes.writing.rows import PassRoutes, RowTable

_encoder = msgspec.json.Encoder()
#: The keys of a route record as they stand in a line, in the schema's order.
_REQ_ID, _TOKEN_IDX, _LAYER, _IDS, _WEIGHTS, _PHASE, _PASS_ID, _FLAG = (
    f'"{field.name}":' for field in ROUTE_FIELDS
)
#: Lines that are put together at once: few enough to stay in a core's cache.
CHUNK = 2048


class JsonlFile:
    """A ``route_file.RouteFile``, and the file of a log of passes."""

    def __init__(
        self, path: Path, header: Record, layers: Sequence[MoELayer], private: bool
    ) -> None:
        first_line = encode_object(header)
        self._lines = LineMaker(layers)
        #: Passes whose lines are not made yet: made together, small ones cost less.
        self._waiting: list[PassRoutes] = []
        self._rows = 0
        self._top_k = max(item.top_k for item in layers)
        self._file = LineFile(path, private)
        try:
            self._file.put(first_line, Contents())
            self._file.flush()
        except OSError as error:
            self._file.discard()
            raise refusal(path, error) from None
        self._file.seal_header()

    @property
    def bytes(self) -> int:
        return self._file.size

    @property
    def durable(self) -> Contents:
        return self._file.durable

    def write_routes(self, routes: PassRoutes) -> None:
        self._waiting.append(routes)
        self._rows += routes.good.size
        if self._rows >= CHUNK:
            self._make_lines()

    def write_request(self, record: Record) -> None:
        self._put(record, Contents(requests=1))

    def write_pass(self, record: Record, rows: int) -> None:
        """Add the record of a pass of ``rows`` rows."""
        self._put(record, Contents(rows))

    def most_bytes(self, num_rows: int, id_bytes: int) -> int:
        self._make_lines()  # their size is known then
        # The longest line: a float32 as a double takes 24 characters, an id 5, a position 10.
        return num_rows * (190 + 31 * self._top_k + id_bytes)

    def flush(self) -> None:
        self._make_lines()
        self._file.flush()

    def close(self, end: Record) -> None:
        self._put(end, Contents())
        self._file.flush()
        self._file.close()

    def abandon(self) -> None:
        with contextlib.suppress(Exception):  # the first error was reported; these rows are counted
            self._make_lines()
        self._file.cut_back()

    def close_abandoned(self, make_end: Callable[[], Record]) -> None:
        self._file.end_with(lambda: encode_object(make_end()))

    def discard(self) -> None:
        self._file.discard()

    def _put(self, record: Record, contents: Contents) -> None:
        self._make_lines()
        self._file.put(encode_object(record), contents)

    def _make_lines(self) -> None:
        passes, self._waiting, self._rows = self._waiting, [], 0
        for data, contents in self._lines.lines(passes):
            self._file.put(data, contents)


def encode_object(record: Record) -> bytes:
    """One line: the header, a request or the end record."""
    line: bytes = _encoder.encode(record)
    return line + b"\n"


class LineMaker:
    """Turns passes into lines.

    Args:
        layers: the recorded layers, in slot order.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self._top_k = np.array([item.top_k for item in layers])
        self._layer = _column([f"{item.layer},{_IDS}[".encode() for item in layers])
        self._digits = _numbers(
            1000 if max(item.num_experts for item in layers) <= 1000 else 1 << 16
        )
        self._weights_key = _column([f"],{_WEIGHTS}[".encode()] * CHUNK)

    def lines(self, passes: Sequence[PassRoutes]) -> Iterator[tuple[bytes, Contents]]:
        """The lines of ``passes``, some thousand at a time, and their contents."""
        if not any(item.rows.req_ids for item in passes):
            return
        head = _column([text for item in passes for text in _heads(item.rows)])
        tail = _column([text for item in passes for text in _tails(item.forward_pass_id)])
        codes = [item.rows.is_decode + 2 * item.rows.flags.astype(np.intp) for item in passes]
        code = np.concatenate([item + 2 * len(Flag) * i for i, item in enumerate(codes)])
        flagged = np.concatenate([item.rows.flags for item in passes]) != 0
        topk_ids = np.concatenate([item.topk_ids for item in passes])
        topk_weights = np.concatenate([item.topk_weights for item in passes])
        token, slot = np.nonzero(np.concatenate([item.good for item in passes]))
        columns = np.arange(topk_ids.shape[2])
        for first in range(0, len(token), CHUNK):
            t, i = token[first : first + CHUNK], slot[first : first + CHUNK]
            top_k = self._top_k[i]
            filled = columns < top_k[:, None]  # the rest is no expert id
            ids = np.where(filled, self._digits[np.where(filled, topk_ids[t, i], 0)], 0)
            ids = ids.view(np.uint8)
            ids[:, 0] = 0  # no comma before the first
            text = np.concatenate(
                [
                    head.take(t, 0),
                    self._layer.take(i, 0),
                    ids,
                    self._weights_key[: len(t)],
                    _join(topk_weights[t, i][filled], top_k),
                    tail.take(code[t], 0),
                ],
                axis=1,
            ).reshape(-1)
            yield text[text != 0].tobytes(), Contents(len(t), int(np.count_nonzero(flagged[t])))


def _heads(rows: RowTable) -> list[bytes]:
    """A token's lines up to the layer's index."""
    names = {req_id: _encoder.encode(req_id) for req_id in set(rows.req_ids)}
    head = f'{{"type":"{ROUTE}",{_REQ_ID}%b,{_TOKEN_IDX}%d,{_LAYER}'.encode()
    return [
        head % (names[req_id], position)
        for req_id, position in zip(rows.req_ids, rows.positions.tolist(), strict=True)
    ]


def _tails(forward_pass_id: int) -> list[bytes]:
    """What follows the weights, by ``is_decode + 2 * flag``."""
    tails = []
    for flag in Flag:
        mark = f',{_FLAG}"{flag.name.lower()}"' if flag else ""
        tails += [
            f',{_PHASE}"{phase}",{_PASS_ID}{forward_pass_id}{mark}}}\n'.encode() for phase in PHASES
        ]
    return tails


def _column(texts: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    """Texts as rows of a matrix, padded with NUL: [len(texts), longest]."""
    column = np.array(texts, dtype=np.bytes_)
    return column.view(np.uint8).reshape(len(texts), column.itemsize)


@functools.cache
def _numbers(count: int) -> npt.NDArray[Any]:
    """The numbers below ``count`` as text, a comma before each: [count] integers of its bytes."""
    texts = [b",%d" % number for number in range(count)]
    word = np.uint32 if len(texts[-1]) <= 4 else np.uint64
    return np.array(texts, dtype=f"S{np.dtype(word).itemsize}").view(word)


def _join(values: npt.NDArray[Any], counts: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Numbers as text, separated by commas and closed by a bracket, as a column.

    Args:
        values: [sum(counts)] floats, written exactly, as doubles.
        counts: [R] how many stand in each row, at least one.
    """
    text = np.frombuffer(_encoder.encode(values.tolist()), dtype=np.uint8)[1:].copy()
    last = np.flatnonzero(text == ord(","))
    ends = np.append(last, len(text) - 1)[np.cumsum(counts) - 1]
    text[ends] = ord("]")
    sizes = np.diff(ends, prepend=-1).astype(np.int32)
    filled = np.arange(sizes.max(), dtype=np.int32) < sizes[:, None]
    column = np.zeros(filled.shape, dtype=np.uint8)
    column[filled] = text
    return column
