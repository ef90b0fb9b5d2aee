"""Reading a route log of any size, a JSONL file or a Parquet directory.

Opening it takes one pass that counts (``tally``), in memory that does not grow with the rows.
Whatever else is asked goes to DuckDB, as SQL over ``routes``: a Parquet log is read in place, a
JSONL log is loaded into a table first, which DuckDB spills to disk above ``duck.MEMORY_LIMIT``.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from expert_profiler.errors import UserError
from expert_profiler.log import duck, log_file, part_files, sampling, scan, sources
from expert_profiler.log.findings import (
    CONTAMINATION_RUN,
    PHASES,
    Contamination,
    Counts,
    Identity,
    find_contamination,
    hold_against,
    phase_codes,
    selection,
)
from expert_profiler.log.log_file import End, LogFile, Meta
from expert_profiler.log.outputs import read_outputs
from expert_profiler.log.row_counts import Tally

if TYPE_CHECKING:
    import duckdb

__all__ = [
    "CONTAMINATION_RUN",
    "PHASES",
    "Contamination",
    "Counts",
    "Identity",
    "RouteLog",
    "open_log",
    "read_outputs",
]

_REQUEST_COLUMNS = "{type: 'VARCHAR', req_id: 'VARCHAR', cached_tokens: 'BIGINT'}"
_CACHED = """
SELECT req_id, max(cached_tokens) FROM {source}
WHERE type = 'request' AND cached_tokens > 0 GROUP BY req_id
"""
_WEIGHT_FAULTS = """
SELECT count(*) FILTER (len(topk_weights) <> len(topk_ids)),
       count(*) FILTER (list_count(topk_weights) < len(topk_weights)
                        OR NOT isfinite(list_sum(topk_weights)) OR list_min(topk_weights) < 0)
FROM {source}
"""


@contextmanager
def open_log(
    path: str | Path,
    on_progress: Callable[[float], None] | None = None,
    *,
    weights: bool = False,
) -> Iterator[RouteLog]:
    """Open the log at ``path`` with the files of the run's other ranks.

    weights: let queries use ``routes.topk_weights``.

    on_progress, if given, gets the percentage read so far every half second, and 100 at the end.
    """
    files = log_file.open_run(Path(path))
    scratch = tempfile.mkdtemp(prefix="expert-profiler-")
    try:
        log = RouteLog(files, scratch, weights)
        try:
            log._scan(on_progress)
            yield log
        finally:
            log._close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class RouteLog:
    """An opened log; make one with :func:`open_log`. "Rows" are route lines without a flag."""

    def __init__(self, files: list[LogFile], scratch: str, weights: bool) -> None:
        self.files = files
        self._weights = weights
        self._scratch = scratch
        self._tally = Tally()
        self.path = files[0].path
        self.meta: Meta = files[0].meta
        self.end: End | None = log_file.merge_ends([file.end for file in files])
        self._loaded = False

    # ---- facts -------------------------------------------------------------------------------

    @property
    def is_public_logger(self) -> bool:
        """Written by the public logger: no schema version, phase, request or end records."""
        return self.meta.schema_version is None

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that have rows or should have."""
        seen = set(self._cell_rows[:, 0].tolist())
        return tuple(sorted(seen.union(*(file.meta.layers_logged for file in self.files))))

    @cached_property
    def num_experts(self) -> int:
        """From the header; the highest id + 1 where the header does not say."""
        return self.declared_experts or int(self._cells[:, 3].max(initial=-1)) + 1

    @property
    def declared_experts(self) -> int | None:
        sizes = [file.meta.num_experts for file in self.files if file.meta.num_experts]
        return max(sizes, default=None)

    @cached_property
    def num_rows(self) -> int:
        return int(self._cell_rows[self._cell_rows[:, 2] == 0, 3].sum())

    @cached_property
    def rows_flagged(self) -> int:
        return int(self._cell_rows[self._cell_rows[:, 2] == 1, 3].sum())

    @property
    def requests(self) -> int:
        return self._tally.requests

    @property
    def is_parquet(self) -> bool:
        return bool(self.files[0].parts)

    # ---- questions ---------------------------------------------------------------------------

    def counts(self, layer: int | None = None, include_flagged: bool = False) -> Counts:
        """Count the experts of all layers, or of one."""
        layers = self.layers if layer is None else (self._known(layer),)
        wanted = selection(self._cells, layers, include_flagged)
        rows_of = selection(self._cell_rows, layers, include_flagged)
        outside = wanted[(wanted[:, 3] < 0) | (wanted[:, 3] >= self.num_experts)]
        if outside.size:
            raise UserError(
                f"{self.path}: expert id {outside[0, 3]} in layer {outside[0, 0]}, but the header "
                f"says {self.num_experts} experts (0 to {self.num_experts - 1}); "
                f"list all faults with: ./test.sh validate --routes {self.path}"
            )
        codes = phase_codes(self._cell_rows)
        values = np.zeros((len(layers), len(codes), self.num_experts), dtype=np.int64)
        rows = np.zeros((len(layers), len(codes)), dtype=np.int64)
        index = np.searchsorted(layers, wanted[:, 0]), np.searchsorted(codes, wanted[:, 1])
        np.add.at(values, (*index, wanted[:, 3]), wanted[:, 4])
        index = np.searchsorted(layers, rows_of[:, 0]), np.searchsorted(codes, rows_of[:, 1])
        np.add.at(rows, index, rows_of[:, 3])
        return Counts(layers, tuple(PHASES[code] for code in codes), values, rows)

    def duplicates(self) -> int:
        """Rows whose (request, position, layer) an earlier row already has."""
        return self._duplicates

    @cached_property
    def contamination(self) -> Contamination:
        """Rows in long runs of identical rows (same ids and weights, same layer, file order)."""
        # Identical rows have equal ids: nearly every log ends here, without reading weights.
        if self._tally.longest_run < CONTAMINATION_RUN:
            return Contamination(0, 0.0, 0, ())
        self._load()
        return find_contamination(self._db, self.num_rows)

    def identity(self, outputs_path: str | Path) -> Identity:
        """Hold the log against ``outputs.jsonl``, layer by layer and request by request."""
        positions = sampling.sampled(read_outputs(Path(outputs_path)), self.meta.raw)
        self._load()
        return hold_against(self._db, positions, self.cached_tokens(), self.layers)

    def cached_tokens(self) -> dict[str, int]:
        """Positions a request that the prefix cache served, which were never routed."""
        if self.is_parquet:
            found: dict[str, int] = {}
            for file in self.files:
                for _, record in part_files.requests(file):
                    cached, req = int(record.get("cached_tokens") or 0), str(record["req_id"])
                    found[req] = max(cached, found.get(req, 0))
            return {req: n for req, n in found.items() if n}
        source = sources.json_source(self.files, _REQUEST_COLUMNS)
        with duck.told(self.files):
            rows = self._db.execute(_CACHED.format(source=source)).fetchall()
        return {str(req): int(n) for req, n in rows}

    def weight_faults(self) -> tuple[int, int]:
        """Route rows, flagged ones included: (as many weights as ids?, all finite and >= 0?).

        Each figure is the number of rows where the answer is no. Reads the log once more.
        """
        sql = _WEIGHT_FAULTS.format(source=sources.weight_source(self.files))
        with duck.told(self.files):
            [(lengths, values)] = self._db.execute(sql).fetchall()
        return int(lengths), int(values)

    def query(self, sql: str, parameters: list[Any] | None = None) -> list[tuple[Any, ...]]:
        """Ask ``routes`` (one row a usable route line, flagged ones included) anything.

        Columns: req_id, token_idx, layer, phase (index into PHASES), flagged, topk_ids,
        topk_weights (only with ``open_log(weights=True)``), forward_pass_id (NULL in a public
        logger's file), flag; ORDER BY rowid is the file order.
        """
        self._load()
        rows: list[tuple[Any, ...]] = self._db.execute(sql, parameters).fetchall()
        return rows

    def connection(self) -> duckdb.DuckDBPyConnection:
        """The database behind :meth:`query`; ``routes`` is there once a question was asked."""
        return self._db

    def arrow(self, sql: str, rows: int) -> Iterator[Any]:
        """The answer of :meth:`query` as record batches of about so many rows."""
        self._load()
        return iter(self._db.sql(sql).to_arrow_reader(rows))

    # ---- findings ----------------------------------------------------------------------------

    @cached_property
    def lost_rows(self) -> list[str]:
        """Why this log cannot be complete, or says itself that it is wrong; empty when sound."""
        found = []
        for file in self.files:
            if file.partial_bytes:
                found.append(
                    f"{file.path.name} is cut short inside its last line: "
                    f"{file.partial_bytes} bytes left out"
                )
            elif file.end is None and not self.is_public_logger:
                found.append(f"{file.path.name} has no end record: the run was cut short")
        if self.end is not None:
            if self.end.dropped:
                causes = ", ".join(f"{n:,} {cause}" for cause, n in self.end.drops.items() if n)
                found.append(f"the recorder dropped rows: {causes}")
            if self.end.self_check == "fail":
                detail = "; ".join(self.end.failed_checks) or "no detail given"
                found.append(f"the recorder's self-check failed: {detail}")
            held = self.num_rows + self.rows_flagged
            if held != self.end.rows:
                found.append(f"the end record says {self.end.rows:,} rows, the log holds {held:,}")
        return found

    @cached_property
    def suspicions(self) -> list[str]:
        """Findings that make the figures doubtful though no row is known to be lost."""
        found = []
        runs = self.contamination
        if runs.rows:
            found.append(
                f"{runs.rows:,} of {self.num_rows:,} rows ({runs.share:.1%}) lie in long runs of "
                f"identical rows (longest {runs.longest_run:,}): "
                "warm-up or padding was probably logged as tokens"
            )
        if self._duplicates:
            found.append(f"{self._duplicates:,} rows repeat a (request, position, layer)")
        return found

    @cached_property
    def notes(self) -> list[str]:
        """All findings in plain language, the gravest first."""
        notes = self.lost_rows + self.suspicions
        if self.is_public_logger and self.end is None:
            notes.append("no end record (a public logger's file): loss cannot be ruled out")
        if (n := sampling.one_in(self.meta.raw)) > 1:
            notes.append(f"one request in {n:,} was recorded: every figure is of this sample")
        if self.meta.raw.get("part") is not None:
            notes.append(f"{self.path.name} goes on where another file of its run was full")
        if self.end is not None and any(f.end and f.end.reason == "max_bytes" for f in self.files):
            notes.append("the recording ended at its bound on size, VLLM_LOG_MOE_MAX_BYTES")
        if self.declared_experts is None:
            notes.append(
                f"the header does not say how many experts there are: {self.num_experts} assumed, "
                "the highest id seen + 1"
            )
        if self.rows_flagged:
            notes.append(
                f"{self.rows_flagged:,} marked rows (recomputed, overrun or rejected) "
                "are not counted"
            )
        return notes

    # ---- inside ------------------------------------------------------------------------------

    @cached_property
    def _db(self) -> duckdb.DuckDBPyConnection:
        return duck.connect(self._scratch)

    def _close(self) -> None:
        if "_db" in self.__dict__:
            self._db.close()

    def _scan(self, on_progress: Callable[[float], None] | None) -> None:
        """The one pass that every log gets: count, and find what is malformed."""
        if len({bool(file.parts) for file in self.files}) > 1:
            raise UserError(
                f"{self.path}: some ranks' logs are Parquet and some JSONL; convert one"
            )
        bad = 0
        try:
            if self.is_parquet:
                scan.scan_parquet(self.files, self._tally, on_progress)
            else:
                source = sources.json_source(self.files, sources.SCAN_COLUMNS)
                with duck.told(self.files), duck.watching(self._db, on_progress):
                    bad = scan.scan_jsonl(self._db, source, self._tally)
        except scan.MalformedError as error:
            log_file.raise_bad_line(self.files)
            raise UserError(f"{self.path}: {error}; {log_file.RECORD_AGAIN}") from None
        if bad > sum(file.partial_bytes > 0 for file in self.files):
            log_file.raise_bad_line(self.files)
        if not len(self._cell_rows):
            raise UserError(f"{self.path} has a header but no route rows; {log_file.RECORD_AGAIN}")

    def _load(self) -> None:
        """Make ``routes``."""
        if not self._loaded:
            with duck.told(self.files):
                self._db.execute(sources.make_routes(self.files, self._weights))
            self._loaded = True

    @cached_property
    def _cells(self) -> npt.NDArray[np.int64]:
        """[cells, 5] int64: layer, phase, flagged, expert, choices."""
        return self._tally.cells

    @cached_property
    def _cell_rows(self) -> npt.NDArray[np.int64]:
        """[cells, 4] int64: layer, phase, flagged, rows."""
        return self._tally.cell_rows

    @cached_property
    def _duplicates(self) -> int:
        if self._tally.surely_no_duplicates:
            return 0
        return self._one(
            "SELECT coalesce(sum(n) - count(*), 0) FROM (SELECT count(*) AS n FROM routes "
            "WHERE NOT flagged GROUP BY req_id, token_idx, layer)"
        )

    def _known(self, layer: int) -> int:
        if layer not in self.layers:
            raise UserError(
                f"{self.path} has no layer {layer}; choose --layer from: {_ranges(self.layers)}"
            )
        return layer

    def _one(self, sql: str) -> int:
        return int(self.query(sql)[0][0])


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
