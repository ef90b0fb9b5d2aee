# SPDX-License-Identifier: Apache-2.0
"""Read a route log of any size, a JSONL file or a Parquet directory.

Opening it takes one pass that counts (``RowCounts``), in memory that does not grow with the rows.
Whatever else is asked goes to DuckDB, as SQL over ``routes``: a Parquet log is read in place, a
JSONL log is loaded into a table first, which DuckDB spills to disk above ``duck.MEMORY_LIMIT``.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from expert_profiler.errors import UserError
from expert_profiler.log import (
    duck,
    expert_counts,
    findings,
    line_file,
    run_files,
    sampling,
    scan,
    sources,
    usable_rows,
)
from expert_profiler.log.expert_counts import Counts
from expert_profiler.log.findings import Check
from expert_profiler.log.log_file import RECORD_AGAIN, End, LogFile, Meta, merge_ends
from expert_profiler.log.row_counts import RowCounts
from expert_profiler.log.schema import PHASES
from expert_profiler.log.usable_rows import IdenticalRuns, UsableRows
from expert_profiler.resources import program

if TYPE_CHECKING:
    import duckdb


@contextmanager
def open_log(
    path: str | Path, on_progress: Callable[[float], None] | None = None
) -> Iterator[RouteLog]:
    """Open a log with the files of the run's other ranks.

        with open_log("moe_routes.jsonl") as log:
            print(log.num_rows, log.notes)

    Args:
        path: a JSONL file or a Parquet directory.
        on_progress: gets the percentage read so far every half second, and 100 at the end.

    Raises:
        UserError: it is no log, or a line of it is malformed.
    """
    files = run_files.open_run(Path(path))
    scratch = tempfile.mkdtemp(prefix="expert-profiler-")
    try:
        log = RouteLog(files, scratch)
        try:
            log._scan(on_progress)
            yield log
        finally:
            log._close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class RouteLog:
    """An opened log; make one with :func:`open_log`. "Rows" are route lines without a flag."""

    def __init__(self, files: list[LogFile], scratch: str) -> None:
        self.files = files
        self._scratch = scratch
        self._row_counts = RowCounts()
        self.path = files[0].path
        self.meta: Meta = files[0].meta
        self.end: End | None = merge_ends([file.end for file in files])
        self._loaded = False

    # ---- facts -------------------------------------------------------------------------------

    @property
    def is_public_logger(self) -> bool:
        """Written by the public logger: no schema version, phase, request or end records."""
        return self.meta.schema_version is None

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that have rows or should have, ascending."""
        seen = set(self._tables[1][:, 0].tolist())
        return tuple(sorted(seen.union(*(file.meta.layers_logged for file in self.files))))

    @cached_property
    def phases(self) -> tuple[str, ...]:
        """Both known phases whenever one occurs, "unknown" only if it occurs."""
        seen = {PHASES[code] for code in self._tables[1][:, 1].tolist()}
        known = PHASES[:2] if seen & set(PHASES[:2]) else ()
        return known + PHASES[2:] if PHASES[2] in seen else known

    @cached_property
    def num_experts(self) -> int:
        """From the header; the highest id + 1 where the header does not say."""
        return self.declared_experts or int(self._tables[0][:, 3].max(initial=-1)) + 1

    @property
    def declared_experts(self) -> int | None:
        sizes = [file.meta.num_experts for file in self.files if file.meta.num_experts]
        return max(sizes, default=None)

    @cached_property
    def num_rows(self) -> int:
        return self._rows_where(flagged=0)

    @cached_property
    def rows_flagged(self) -> int:
        return self._rows_where(flagged=1)

    @property
    def requests(self) -> int:
        return self._row_counts.requests

    @property
    def is_parquet(self) -> bool:
        return bool(self.files[0].parts)

    # ---- questions ---------------------------------------------------------------------------

    def counts(
        self,
        layer: int | None = None,
        *,
        include_flagged: bool = False,
        include_identical: bool = True,
    ) -> Counts:
        """How often each expert was chosen: [layers, phases, experts], and the rows behind it.

            log.counts(layer=3).per_expert  # [experts] int64

        Args:
            layer: this one alone; default, all.
            include_flagged: count recomputed, overrun and rejected rows too.
            include_identical: count rows in long runs of identical rows too.

        Raises:
            UserError: there is no such layer, or an id is not among the header's experts.
        """
        layers = self.layers if layer is None else (self._known(layer),)
        rows = self.usable_rows(
            include_flagged=include_flagged, include_identical=include_identical
        )
        tables = self._tables_where(rows.condition) if rows.identical else self._tables
        choices, num_rows = (
            table[np.isin(table[:, 0], layers) & (include_flagged | (table[:, 2] == 0))]
            for table in tables
        )
        outside = choices[(choices[:, 3] < 0) | (choices[:, 3] >= self.num_experts)]
        if outside.size:
            raise UserError(
                f"{self.path}: expert id {outside[0, 3]} in layer {outside[0, 0]}, but the header "
                f"says {self.num_experts} experts (0 to {self.num_experts - 1}); "
                f"list all faults with: {program()} validate --routes {self.path}"
            )
        return expert_counts.from_cells(choices, num_rows, layers, self.phases, self.num_experts)

    def usable_rows(
        self, *, include_flagged: bool = False, include_identical: bool = False
    ) -> UsableRows:
        """Which rows to count, as a condition on ``routes``; ``log/usable_rows.py`` says why."""
        return usable_rows.choose(
            IdenticalRuns() if include_identical else self.identical_runs,
            num_rows=self.num_rows,
            num_flagged=self.rows_flagged,
            include_flagged=include_flagged,
        )

    @cached_property
    def duplicates(self) -> int:
        """Rows whose (request, position, layer) an earlier row already has."""
        if self._row_counts.surely_no_duplicates:
            return 0
        [(repeats,)] = self.query(
            "SELECT coalesce(sum(n) - count(*), 0) FROM (SELECT count(*) AS n FROM routes "
            "WHERE NOT flagged GROUP BY req_id, token_idx, layer)"
        )
        return int(repeats)

    @cached_property
    def identical_runs(self) -> IdenticalRuns:
        """Rows in long runs of identical rows (same ids and weights, same layer, file order)."""
        # Identical rows have equal ids: nearly every log ends here, without reading weights.
        if self._row_counts.longest_run < usable_rows.SHORTEST_RUN:
            return IdenticalRuns()
        self._load()
        return usable_rows.find_identical_runs(self.connection, self.num_rows)

    def query(self, sql: str, parameters: Sequence[Any] | None = None) -> list[tuple[Any, ...]]:
        """The answer to SQL over ``routes``: one row a route line, flagged ones included.

            log.query("SELECT layer, count(*) FROM routes WHERE NOT flagged GROUP BY layer")

        Columns: req_id, token_idx, layer, phase (index into ``schema.PHASES``: 0 prefill, 1 decode,
        2 unknown), flagged, topk_ids, topk_weights, forward_pass_id (NULL in a public logger's
        file), flag; ORDER BY rowid is the file order. The dialect is DuckDB's.
        """
        self._load()
        rows: list[tuple[Any, ...]] = self.connection.execute(sql, parameters).fetchall()
        return rows

    def arrow(self, sql: str, rows: int) -> Iterator[Any]:
        """The answer of :meth:`query` as record batches of about so many rows."""
        self._load()
        return iter(self.connection.sql(sql).to_arrow_reader(rows))

    @cached_property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """The database behind :meth:`query`; ``routes`` is there once a question was asked."""
        return duck.connect(self._scratch)

    # ---- findings ----------------------------------------------------------------------------

    @cached_property
    def checks_of_end(self) -> list[Check]:
        """Whether the log is complete and right by its own account."""
        return findings.end_record(
            self.files,
            self.end,
            rows=self.num_rows + self.rows_flagged,
            flagged=self.rows_flagged,
            public=self.is_public_logger,
        )

    @cached_property
    def checks_of_rows(self) -> list[Check]:
        """Whether the rows can all be tokens."""
        return findings.plain_rows(self.num_rows, self.duplicates, self.identical_runs)

    @property
    def lost_rows(self) -> list[str]:
        """Why this log cannot be complete, or says itself that it is wrong; empty when sound."""
        return findings.sentences(self.checks_of_end)

    @property
    def suspicions(self) -> list[str]:
        """Findings that make the metrics doubtful though no row is known to be lost."""
        return findings.sentences(reversed(self.checks_of_rows))

    @property
    def verdict(self) -> Literal["pass", "doubtful", "fail"]:
        """pass: complete and self-checked; fail: rows are lost; doubtful: anything else."""
        if self.lost_rows:
            return "fail"
        sound = self.end is not None and self.end.self_check == "pass" and not self.suspicions
        return "pass" if sound else "doubtful"

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

    def _close(self) -> None:
        if "connection" in self.__dict__:
            self.connection.close()

    def _scan(self, on_progress: Callable[[float], None] | None) -> None:
        """Count all rows in one pass, and find what is malformed."""
        if len({bool(file.parts) for file in self.files}) > 1:
            raise UserError(
                f"{self.path}: some ranks' logs are Parquet and some JSONL; convert one"
            )
        bad = 0
        try:
            if self.is_parquet:
                scan.scan_parquet(self.files, self._row_counts, on_progress)
            else:
                with duck.errors_named(self.files), duck.watching(self.connection, on_progress):
                    bad = scan.scan_jsonl(self.connection, self.files, self._row_counts)
        except scan.MalformedError as error:
            line_file.raise_bad_line(self.files)
            raise UserError(f"{self.path}: {error}; {RECORD_AGAIN}") from None
        if bad > sum(file.partial_bytes > 0 for file in self.files):
            line_file.raise_bad_line(self.files)
        if not len(self._tables[1]):
            raise UserError(f"{self.path} has a header but no route rows; {RECORD_AGAIN}")

    def _load(self) -> None:
        """Make ``routes``."""
        if not self._loaded:
            with duck.errors_named(self.files):
                self.connection.execute(sources.make_routes(self.files))
            self._loaded = True

    @cached_property
    def _tables(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """``RowCounts.cells`` and ``RowCounts.cell_rows`` of the whole log."""
        return self._row_counts.cells, self._row_counts.cell_rows

    def _rows_where(self, flagged: int) -> int:
        rows = self._tables[1]
        return int(rows[rows[:, 2] == flagged, 3].sum())

    def _tables_where(self, condition: str) -> tuple[npt.NDArray[np.int64], ...]:
        """``_tables`` of the rows that satisfy ``condition``."""
        choices = self.query(
            "SELECT layer, phase, flagged::INTEGER, expert, count(*) FROM (SELECT *, "  # noqa: S608
            f"unnest(topk_ids) AS expert FROM routes WHERE {condition}) GROUP BY ALL"
        )
        rows = self.query(
            f"SELECT layer, phase, flagged::INTEGER, count(*) FROM routes WHERE {condition} "  # noqa: S608
            "GROUP BY ALL"
        )
        return np.array(choices, dtype=np.int64), np.array(rows, dtype=np.int64)

    def _known(self, layer: int) -> int:
        if layer not in self.layers:
            raise UserError(
                f"{self.path} has no layer {layer}; choose --layer from: {_ranges(self.layers)}"
            )
        return layer


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
