# SPDX-License-Identifier: Apache-2.0
"""Read a log's rows batch by batch into ``RowCounts``: JSONL by DuckDB, Parquet by pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expert_profiler.errors import UserError
from expert_profiler.log.log_file import LogFile
from expert_profiler.log.row_counts import RowBatch, RowCounts
from expert_profiler.log.schema import PHASES
from expert_profiler.log.sources import COUNTED_LINE, KIND, PHASE, json_lines

if TYPE_CHECKING:
    import duckdb

_BATCH_ROWS = 1 << 17
_COLUMNS = ["req_id", "token_idx", "layer", "phase", "flag", "topk_ids"]

_SCAN = f"""
SELECT {KIND} AS kind, req_id, token_idx, layer, {PHASE} AS phase, flag IS NOT NULL AS flagged,
       topk_ids
FROM {{source}} WHERE kind <> 1
"""  # noqa: S608 (no text from outside)


class MalformedError(Exception):
    """A line or a value is no part of a route log; its place is not known yet."""


def scan_jsonl(db: duckdb.DuckDBPyConnection, files: Sequence[LogFile], counts: RowCounts) -> int:
    """Count the rows of JSONL logs; returns the number of lines that are no record."""
    import pyarrow as pa

    bad = 0
    source = json_lines(files, COUNTED_LINE)
    for chunk in db.sql(_SCAN.format(source=source)).to_arrow_reader(_BATCH_ROWS):
        kind = chunk.column("kind").to_numpy()
        if kind.any():
            bad += int(np.count_nonzero(kind))
            chunk = chunk.filter(pa.array(kind == 0))
        if chunk.num_rows:
            names = chunk.column("req_id").dictionary_encode()
            flagged = chunk.column("flagged").to_numpy(zero_copy_only=False)
            counts.add(_batch(names, chunk.column("phase").to_numpy(), flagged, chunk))
    return bad


def scan_parquet(
    files: Sequence[LogFile], counts: RowCounts, on_progress: Callable[[float], None] | None
) -> None:
    """Count the rows of Parquet logs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [part for file in files for part in file.parts]
    try:
        total = sum(pq.read_metadata(part).num_rows for part in parts)
        done = 0
        for batch in _ahead(batch for part in parts for batch in _batches_of(part)):
            counts.add(batch)
            done += len(batch.layer)
            if on_progress:
                on_progress(100 * done / total)
    except (pa.ArrowException, OSError) as error:
        fact = str(error).splitlines()[0]
        raise UserError(f"{files[0].path}: {fact}; copy the directory again") from None


def _ahead(batches: Iterator[RowBatch]) -> Iterator[RowBatch]:
    """The same batches, the next one made by another thread while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, batches, None)
        while (batch := waiting.result()) is not None:
            waiting = pool.submit(next, batches, None)
            yield batch


def _batches_of(part: Path) -> Iterator[RowBatch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    reader = pq.ParquetFile(part, read_dictionary=["req_id", "phase", "flag"])
    missing = [name for name in _COLUMNS if name not in reader.schema_arrow.names]
    if missing:
        raise MalformedError(f"{part} has no column {missing[0]}")
    for chunk in reader.iter_batches(_BATCH_ROWS, columns=_COLUMNS):
        names = chunk.column("req_id")
        if not pa.types.is_dictionary(names.type):
            names = names.cast("string").dictionary_encode()
        phase = chunk.column("phase")
        unknown = len(PHASES) - 1
        known = [PHASES.index(x) if x in PHASES else unknown for x in phase.dictionary.to_pylist()]
        codes = np.array([*known, unknown], dtype=np.uint8)
        indices = phase.indices.fill_null(len(known)).to_numpy()
        flagged = chunk.column("flag").is_valid().to_numpy(zero_copy_only=False)
        for name in ("req_id", "token_idx", "layer", "topk_ids"):
            if chunk.column(name).null_count:
                raise MalformedError(f"{part} has rows without {name}")
        yield _batch(names, codes[indices], flagged, chunk)


def _batch(names: Any, phase: Any, flagged: Any, chunk: Any) -> RowBatch:
    lists = chunk.column("topk_ids")
    values = lists.flatten()
    if values.null_count:
        raise MalformedError("a row's topk_ids holds null")
    lengths: Any
    if hasattr(lists.type, "list_size"):
        lengths = lists.type.list_size
    else:
        lengths = np.diff(np.asarray(lists.offsets))
        if (lengths == lengths[0]).all():
            lengths = int(lengths[0])
    return RowBatch(
        names.dictionary.to_pylist(),
        names.indices.to_numpy(),
        chunk.column("token_idx").to_numpy(),
        chunk.column("layer").to_numpy(),
        phase,
        flagged,
        lengths,
        values.to_numpy(),
    )
