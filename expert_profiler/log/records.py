# SPDX-License-Identifier: Apache-2.0
"""Read and write a route log of either format as a stream of records, without loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from expert_profiler.errors import UserError
from expert_profiler.log import part_files
from expert_profiler.log.line_file import route_type
from expert_profiler.log.log_file import End, LogFile, bad_line_error
from expert_profiler.log.schema import schema
from expert_profiler.resources import recorder_module

_CHUNK_BYTES = 8 << 20
_CHUNK_ROWS = 1 << 16
PART_ROWS = 1 << 20


class UnfitError(Exception):
    """A value does not fit the types of a :class:`Plan`."""


class Chunk(NamedTuple):
    """Some rows and the request records among them.

    Attributes:
        rows: columns named as the keys of a JSON line; lists of any integer and any float.
        requests: (how many of these rows come before it, the record).
    """

    rows: pa.Table
    requests: list[tuple[int, dict[str, Any]]]


class Plan(NamedTuple):
    """The types of a Parquet log."""

    num_experts: int
    top_k: int | None
    weights: str


def dataset() -> Any:
    """The recorder's own description of a Parquet log, which needs no vLLM."""
    return recorder_module("writing.formats.dataset")


def plans(file: LogFile) -> Iterator[Plan]:
    """Types to try, the smallest that the header suggests first; the last takes every log."""
    experts = file.meta.num_experts or 256
    top_ks: list[int | None] = list({info.top_k for info in file.meta.layers})
    top_ks = top_ks or [file.meta.top_k]
    top_k = top_ks[0] if len(top_ks) == 1 else None
    said = file.meta.raw.get("weights_dtype")
    first = Plan(experts, top_k, "float16" if said == "float16" else "float32")
    widest = Plan(1 << 15, None, "float64")
    tried = [
        first,
        first._replace(weights="float32"),
        first._replace(weights="float64"),
        first._replace(top_k=None),
        first._replace(top_k=None, weights="float64"),
        widest,
    ]
    yield from dict.fromkeys(tried)


# ---- JSONL ---------------------------------------------------------------------------------


_Route = route_type(
    weights=list[float | None], omit_defaults=True, forbid_unknown_fields=True
)  # fmt: skip
_LISTS = {"ids": np.int64, "weights": np.float64}
#: Arrow types of the other columns as they are read; a writer of logs may number its requests.
_SCALARS = {
    "string": None,
    "label": pa.string(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
}
_decode_route = msgspec.json.Decoder(_Route).decode
_encoder = msgspec.json.Encoder()


def read_jsonl(file: LogFile) -> Iterator[Chunk]:
    """The rows and request records of a JSONL log."""
    number = 1
    rows: list[Any] = []
    requests: list[tuple[int, dict[str, Any]]] = []
    with file.path.open("rb") as stream:
        stream.readline()  # the header
        left = file.end_offset - stream.tell()
        while left > 0:
            block = stream.read(min(_CHUNK_BYTES, left))
            block += stream.readline() if len(block) < left else b""
            left -= len(block)
            for line in block.rstrip(b"\n").split(b"\n"):
                number += 1
                try:
                    rows.append(_decode_route(line))
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    record = _other(file.path, number, line, error)
                    if record is not None:
                        requests.append((len(rows), record))
            yield Chunk(_table(file, rows), requests)
            rows, requests = [], []


def _other(path: Path, number: int, line: bytes, error: Exception) -> dict[str, Any] | None:
    """A request record; None for an empty line."""
    if not line.strip():
        return None
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as broken:
        raise bad_line_error(path, number, f"not valid JSON: {broken}") from None
    if isinstance(record, dict) and record.get("type") == "request":
        return record
    reason = f"cannot be kept without loss: {error}"
    raise bad_line_error(path, number, reason) from None


def _table(file: LogFile, rows: list[Any]) -> pa.Table:
    def lists(values: list[list[Any]], kind: Any) -> Any:
        offsets = np.zeros(len(values) + 1, dtype=np.int32)
        np.cumsum([len(item) for item in values], out=offsets[1:])
        flat = [x for item in values for x in item]
        array = np.array(flat, dtype=kind)  # None becomes NaN
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(array))

    def column(name: str, kind: str) -> Any:
        values = [getattr(row, name) for row in rows]
        if kind in _LISTS:
            return lists(values, _LISTS[kind])
        return pa.array(values, _SCALARS[kind])

    try:
        return pa.table({name: column(name, kind) for name, kind, _ in schema.ROUTE_FIELDS})
    except (pa.ArrowException, OverflowError) as error:
        fact = str(error).splitlines()[0]
        raise UserError(f"{file.path} can't become Parquet: {fact}; keep it as it is") from None


def write_jsonl(
    path: Path, header: dict[str, Any], chunks: Iterable[Chunk], end: End | None
) -> None:
    """Write a JSONL log as the recorder would."""
    with path.open("xb") as stream:
        stream.write(_encoder.encode(header) + b"\n")
        for chunk in chunks:
            routes = _routes(chunk.rows)
            done = 0
            for before, record in chunk.requests:
                stream.write(_encoder.encode_lines(routes[done:before]))
                stream.write(_encoder.encode(record) + b"\n")
                done = before
            stream.write(_encoder.encode_lines(routes[done:]))
        if end is not None:
            stream.write(_encoder.encode(_restated(end, stream.tell())) + b"\n")


def _routes(rows: pa.Table) -> list[Any]:
    columns = []
    for name, kind, _ in schema.ROUTE_FIELDS:
        column = rows[name]
        if kind in _LISTS:
            columns.append(_python_lists(column))
        elif pa.types.is_dictionary(column.type):
            columns.append(column.cast("string").to_pylist())
        else:
            columns.append(column.to_pylist())
    return [_Route(*values) for values in zip(*columns, strict=True)]


def _python_lists(column: Any) -> list[list[Any]]:
    array = column.combine_chunks()
    flat, lengths = _flat(array)
    if flat.dtype.kind == "f":
        flat = flat.astype(np.float64)
        values = [None if x != x else x for x in flat.tolist()] if np.isnan(flat).any() else None
    else:
        values = None
    values = flat.tolist() if values is None else values
    ends = np.cumsum(lengths).tolist()
    return [values[end - n : end] for end, n in zip(ends, lengths.tolist(), strict=True)]


# ---- Parquet -------------------------------------------------------------------------------


def read_parquet(file: LogFile) -> Iterator[Chunk]:
    """The rows and request records of a Parquet log."""
    waiting = list(part_files.requests(file))[::-1]
    rows_before = 0
    for part in file.parts:
        for batch in pq.ParquetFile(part).iter_batches(_CHUNK_ROWS):
            requests = []
            while waiting and waiting[-1][0] < rows_before + batch.num_rows:
                at, record = waiting.pop()
                requests.append((at - rows_before, record))
            yield Chunk(pa.Table.from_batches([batch]), requests)
            rows_before += batch.num_rows
    if waiting:
        empty = pq.read_schema(file.parts[0]).empty_table()
        yield Chunk(empty, [(0, record) for _, record in reversed(waiting)])


def write_parquet(
    path: Path, header: dict[str, Any], chunks: Iterable[Chunk], end: End | None, plan: Plan
) -> None:
    """Write a Parquet log as the recorder would.

    Raises:
        UnfitError: a value does not fit ``plan``; an unfinished log is left at ``path``.
    """
    schema: pa.Schema | None = None
    writer: Any = None
    tables: list[pa.Table] = []
    requests: list[dict[str, Any]] = []
    rows = 0

    def flush() -> None:
        nonlocal tables, requests, rows
        table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
        writer.write(table, requests)
        tables, requests, rows = [], [], 0

    for chunk in chunks:
        if schema is None or writer is None:
            kind = chunk.rows.schema.field("req_id").type
            schema = dataset().schema(*plan, pa.int64() if pa.types.is_integer(kind) else None)
            writer = dataset().PartWriter(path, schema, header)
        requests += [{**record, "after_rows": rows + at} for at, record in chunk.requests]
        tables.append(_fitted(chunk.rows, schema))
        rows += chunk.rows.num_rows
        if rows >= PART_ROWS:
            flush()
    if writer is None:
        writer = dataset().PartWriter(path, dataset().schema(*plan), header)
    elif rows or requests:
        flush()
    if end is not None:
        writer.write(writer.columns.empty_table(), (), _restated(end, writer.bytes))


def _fitted(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """``rows`` in the types of ``schema``, every value unchanged."""
    columns = []
    for field in schema:
        array = rows[field.name].combine_chunks()
        if field.name in ("topk_ids", "topk_weights"):
            columns.append(_fitted_lists(array, field.type))
        elif pa.types.is_dictionary(field.type) and not pa.types.is_dictionary(array.type):
            if pa.types.is_integer(array.type):
                raise UserError(f"{field.name} is a number in some rows and text in others")
            columns.append(array.cast("string").dictionary_encode().cast(field.type))
        else:
            columns.append(array.cast(field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _fitted_lists(array: Any, kind: Any) -> Any:
    flat, lengths = _flat(array)
    # The type has no method that says so without pandas.
    target = pa.array([], kind.value_type).to_numpy(zero_copy_only=False).dtype
    fitted = flat.astype(target)
    same = fitted.astype(flat.dtype) == flat
    if flat.dtype.kind == "f":
        same |= np.isnan(flat)
    if not same.all():
        raise UnfitError
    if hasattr(kind, "list_size"):
        if len(lengths) and not (lengths == kind.list_size).all():
            raise UnfitError
        return pa.FixedSizeListArray.from_arrays(pa.array(fitted), type=kind)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(fitted), type=kind)


def _flat(array: Any) -> tuple[Any, Any]:
    """A list array's values and each list's length."""
    values = array.flatten().to_numpy(zero_copy_only=False)
    if hasattr(array.type, "list_size"):
        return values, np.full(len(array), array.type.list_size)
    return values, np.diff(np.asarray(array.offsets))


def _restated(end: End, size: int) -> dict[str, Any]:
    """The end record, with the bytes of the log that it stands in now."""
    return {**end.raw, "bytes": size} if "bytes" in end.raw else end.raw
