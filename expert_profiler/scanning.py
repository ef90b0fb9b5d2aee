"""A log's rows, batch by batch, for ``tally``: JSONL by DuckDB, Parquet by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from expert_profiler.logfile import LogFile
from expert_profiler.tally import Batch

if TYPE_CHECKING:
    import duckdb

PHASES = ("prefill", "decode", "unknown")
_BATCH_ROWS = 1 << 17
_COLUMNS = ["req_id", "token_idx", "layer", "phase", "flag", "topk_ids"]

# kind: 0 a usable route row, 2 no record; the lines of other records are left out.
KIND = """
(CASE WHEN type = 'route' AND req_id IS NOT NULL AND token_idx IS NOT NULL AND layer IS NOT NULL
           AND topk_ids IS NOT NULL AND topk_weights IS NOT NULL THEN 0
      WHEN type IN ('meta', 'request', 'end') THEN 1 ELSE 2 END)::UTINYINT"""
PHASE = "(CASE phase WHEN 'prefill' THEN 0 WHEN 'decode' THEN 1 ELSE 2 END)::UTINYINT"

_SCAN = f"""
SELECT {KIND} AS kind, req_id, token_idx, layer, {PHASE} AS phase, flag IS NOT NULL AS flagged,
       topk_ids
FROM {{source}} WHERE kind <> 1
"""  # noqa: S608 (no text from outside)


class MalformedError(Exception):
    """A line or a value that no writer of route logs writes; where it is has yet to be found."""


class JsonlScan:
    """Batches of JSONL files. ``bad``: lines so far that are no record."""

    def __init__(self, db: duckdb.DuckDBPyConnection, source: str) -> None:
        self._db = db
        self._source = source
        self.bad = 0

    def __iter__(self) -> Iterator[Batch]:
        import pyarrow as pa

        for chunk in self._db.sql(_SCAN.format(source=self._source)).to_arrow_reader(_BATCH_ROWS):
            kind = chunk.column("kind").to_numpy()
            if kind.any():
                self.bad += int(np.count_nonzero(kind))
                chunk = chunk.filter(pa.array(kind == 0))
            if chunk.num_rows:
                yield _batch(
                    chunk.column("req_id").dictionary_encode(),
                    chunk.column("phase").to_numpy(),
                    chunk.column("flagged").to_numpy(zero_copy_only=False),
                    chunk,
                )


def parquet_batches(file: LogFile) -> Iterator[Batch]:
    """Batches of one Parquet log."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for part in file.parts:
        reader = pq.ParquetFile(part, read_dictionary=["req_id", "phase", "flag"])
        missing = [name for name in _COLUMNS if name not in reader.schema_arrow.names]
        if missing:
            raise MalformedError(f"{part} has no column {missing[0]}")
        for chunk in reader.iter_batches(_BATCH_ROWS, columns=_COLUMNS):
            names = chunk.column("req_id")
            if not pa.types.is_dictionary(names.type):
                names = names.cast("string").dictionary_encode()
            phase = chunk.column("phase")
            known = {"prefill": 0, "decode": 1}
            codes = np.array([known.get(name, 2) for name in phase.dictionary.to_pylist()] + [2])
            indices = phase.indices.fill_null(len(codes) - 1).to_numpy()
            flagged = chunk.column("flag").is_valid().to_numpy(zero_copy_only=False)
            for name in ("req_id", "token_idx", "layer", "topk_ids"):
                if chunk.column(name).null_count:
                    raise MalformedError(f"{part} has rows without {name}")
            yield _batch(names, codes.astype(np.uint8)[indices], flagged, chunk)


def parquet_rows(files: Sequence[LogFile]) -> int:
    """Rows of all logs, from their footers."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(part).num_rows for file in files for part in file.parts)


def _batch(names: Any, phase: Any, flagged: Any, chunk: Any) -> Batch:
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
    return Batch(
        names.dictionary.to_pylist(),
        names.indices.to_numpy(),
        chunk.column("token_idx").to_numpy(),
        chunk.column("layer").to_numpy(),
        phase,
        flagged,
        lengths,
        values.to_numpy(),
    )
