"""Reading a route log of any size: one pass into DuckDB, then every question is a query.

The JSON is parsed once into a temporary table of about 80 bytes a row that DuckDB spills to disk
above ``MEMORY_LIMIT``, so memory does not grow with the log.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from expert_profiler import logfile
from expert_profiler.errors import UserError
from expert_profiler.logfile import End, LogFile, Meta

if TYPE_CHECKING:
    import duckdb

MEMORY_LIMIT = "1GB"
PHASES = ("prefill", "decode", "unknown")
# Distinct tokens never route alike this long, bit for bit; padding and warm-up passes do.
CONTAMINATION_RUN = 64

# Types are given, not guessed: a guess reads the start of the file only.
_COLUMNS = (
    "{type: 'VARCHAR', req_id: 'VARCHAR', token_idx: 'BIGINT', layer: 'INTEGER', "
    "topk_ids: 'INTEGER[]', topk_weights: 'DOUBLE[]', phase: 'VARCHAR', forward_pass_id: 'BIGINT', "
    "flag: 'VARCHAR'}"
)
_REQUEST_COLUMNS = "{type: 'VARCHAR', req_id: 'VARCHAR', cached_tokens: 'BIGINT'}"

# kind: 0 a usable route row, 1 another record, 2 neither.
_LOAD = """
CREATE TEMP TABLE lines AS SELECT
  (CASE WHEN type = 'route' AND req_id IS NOT NULL AND token_idx IS NOT NULL AND layer IS NOT NULL
             AND topk_ids IS NOT NULL AND topk_weights IS NOT NULL THEN 0
        WHEN type IN ('meta', 'request', 'end') THEN 1 ELSE 2 END)::UTINYINT AS kind,
  req_id, token_idx, layer,
  (CASE phase WHEN 'prefill' THEN 0 WHEN 'decode' THEN 1 ELSE 2 END)::UTINYINT AS phase,
  flag IS NOT NULL AS flagged,
  topk_ids, {weights}
  forward_pass_id,
  hash(topk_ids, topk_weights) AS route_hash
FROM {source}
"""

_CACHED = """
SELECT req_id, max(cached_tokens) FROM {source}
WHERE type = 'request' AND cached_tokens > 0 GROUP BY req_id
"""

_WEIGHT_FAULTS = """
SELECT count(*) FILTER (len(topk_weights) <> len(topk_ids)),
       count(*) FILTER (list_count(topk_weights) < len(topk_weights)
                        OR NOT isfinite(list_sum(topk_weights)) OR list_min(topk_weights) < 0)
FROM {source} WHERE type = 'route'
"""


@dataclass(frozen=True)
class Counts:
    """How often each expert was chosen.

    values: [layers, phases, experts] int64; rows: [layers, phases] int64, the rows behind them.
    Expert ids are logical and run from 0 to experts - 1.
    """

    layers: tuple[int, ...]
    phases: tuple[str, ...]
    values: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    @property
    def num_experts(self) -> int:
        return int(self.values.shape[2])

    @property
    def per_expert(self) -> npt.NDArray[np.int64]:
        """[experts] int64: over all layers and phases."""
        total: npt.NDArray[np.int64] = self.values.sum(axis=(0, 1))
        return total

    @property
    def per_phase(self) -> npt.NDArray[np.int64]:
        """[phases, experts] int64: over all layers."""
        total: npt.NDArray[np.int64] = self.values.sum(axis=0)
        return total

    def phase_rows(self) -> dict[str, int]:
        return dict(zip(self.phases, self.rows.sum(axis=0).tolist(), strict=True))


@dataclass(frozen=True)
class Contamination:
    """Rows inside runs of at least CONTAMINATION_RUN identical rows of one layer."""

    rows: int
    share: float  # of all unflagged rows, 0 to 1
    longest_run: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Identity:
    """The row identity: unique positions a layer = sum(prompt + generated - 1) - cached."""

    expected: int
    cached: int
    requests: int
    per_layer: dict[int, int]
    mismatches: tuple[str, ...]  # one sentence a request whose positions differ

    @property
    def holds(self) -> bool:
        return not self.mismatches and all(n == self.expected for n in self.per_layer.values())


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
    files = _open_files(Path(path))
    scratch = tempfile.mkdtemp(prefix="expert-profiler-")
    try:
        log = RouteLog(files, scratch, weights)
        try:
            log._load(on_progress)
            yield log
        finally:
            log._db.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class RouteLog:
    """An opened log; make one with :func:`open_log`. "Rows" are route lines without a flag."""

    def __init__(self, files: list[LogFile], scratch: str, weights: bool) -> None:
        import duckdb  # 50 ms; only where a log is really read

        self.files = files
        self._weights = weights
        self.path = files[0].path
        self.meta: Meta = files[0].meta
        self.end: End | None = logfile.merge_ends([file.end for file in files])
        self._db: duckdb.DuckDBPyConnection = duckdb.connect(
            config={"memory_limit": MEMORY_LIMIT, "temp_directory": scratch}
        )
        self._db.execute("SET enable_progress_bar = true")
        self._db.execute("SET enable_progress_bar_print = false")

    # ---- facts -------------------------------------------------------------------------------

    @property
    def is_public_logger(self) -> bool:
        """Written by the public logger: no schema version, phase, request or end records."""
        return self.meta.schema_version is None

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that have rows or should have."""
        seen = {int(layer) for (layer,) in self.query("SELECT DISTINCT layer FROM routes")}
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

    @cached_property
    def requests(self) -> int:
        return self._one("SELECT count(DISTINCT req_id) FROM routes")

    # ---- questions ---------------------------------------------------------------------------

    def counts(self, layer: int | None = None, include_flagged: bool = False) -> Counts:
        """Count the experts of all layers, or of one."""
        layers = self.layers if layer is None else (self._known(layer),)
        wanted = _selection(self._cells, layers, include_flagged)
        rows_of = _selection(self._cell_rows, layers, include_flagged)
        outside = wanted[(wanted[:, 3] < 0) | (wanted[:, 3] >= self.num_experts)]
        if outside.size:
            raise UserError(
                f"{self.path}: expert id {outside[0, 3]} in layer {outside[0, 0]}, but the header "
                f"says {self.num_experts} experts (0 to {self.num_experts - 1}); "
                f"list all faults with: ./test.sh validate --routes {self.path}"
            )
        codes = _phase_codes(self._cell_rows)
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
        # Nearly every log ends here: this first look is cheap.
        repeats = self._one(
            "SELECT count(*) FROM (SELECT route_hash = lag(route_hash) OVER "
            "(PARTITION BY layer ORDER BY rowid) AS same FROM routes WHERE NOT flagged) WHERE same"
        )
        if repeats < CONTAMINATION_RUN - 1:
            return Contamination(0, 0.0, 0, ())
        # A run starts where a row differs from the one before it and ends where the next starts.
        runs = self.query(
            """
            SELECT layer, sum(size), max(size) FROM (
              SELECT layer, lead(i, 1, n + 1) OVER (PARTITION BY layer ORDER BY i) - i AS size
              FROM (SELECT layer, row_number() OVER w AS i, count(*) OVER (PARTITION BY layer) AS n,
                           route_hash IS DISTINCT FROM lag(route_hash) OVER w AS starts
                    FROM routes WHERE NOT flagged WINDOW w AS (PARTITION BY layer ORDER BY rowid))
              WHERE starts)
            WHERE size >= ? GROUP BY layer ORDER BY layer""",
            [CONTAMINATION_RUN],
        )
        rows = sum(int(size) for _, size, _ in runs)
        longest = max((int(size) for *_, size in runs), default=0)
        share = rows / self.num_rows if rows else 0.0
        return Contamination(rows, share, longest, tuple(int(layer) for layer, *_ in runs))

    def identity(self, outputs_path: str | Path) -> Identity:
        """Hold the log against ``outputs.jsonl``, layer by layer and request by request."""
        positions = read_outputs(Path(outputs_path))
        cached = self.cached_tokens()
        expected = {req: n - cached.get(req, 0) for req, n in positions.items()}
        found = self.query(
            "SELECT req_id, min(n), max(n), count(*) FROM (SELECT req_id, layer, "
            "count(DISTINCT token_idx) AS n FROM routes WHERE NOT flagged GROUP BY req_id, layer) "
            "GROUP BY req_id"
        )
        seen = {str(req): (int(low), int(high), int(n)) for req, low, high, n in found}
        # A logger that does not know the requests can still satisfy the sums.
        nothing = (0, 0, 0)
        joined = expected.keys() & seen.keys()
        mismatches = []
        if joined:
            mismatches = [
                f"request {req}: {_span(*seen.get(req, nothing)[:2])} positions, {want} expected"
                for req, want in expected.items()
                if seen.get(req, nothing) != (want, want, len(self.layers))
            ]
            strangers = sorted(seen.keys() - expected.keys())
            mismatches += [f"request {req}: not in the outputs" for req in strangers]
        per_layer = self.query(
            "SELECT layer, count(*) FROM (SELECT DISTINCT req_id, token_idx, layer FROM routes "
            "WHERE NOT flagged) GROUP BY layer"
        )
        unique = dict.fromkeys(self.layers, 0) | {int(layer): int(n) for layer, n in per_layer}
        return Identity(
            expected=sum(expected.values()),
            cached=sum(cached.get(req, 0) for req in positions),
            requests=len(positions),
            per_layer=unique,
            mismatches=tuple(mismatches),
        )

    def cached_tokens(self) -> dict[str, int]:
        """Positions a request that the prefix cache served, which were never routed."""
        rows = self.query(_CACHED.format(source=self._source(_REQUEST_COLUMNS)))
        return {str(req): int(n) for req, n in rows}

    def weight_faults(self) -> tuple[int, int]:
        """Route rows, flagged ones included: (as many weights as ids?, all finite and >= 0?).

        Each figure is the number of rows where the answer is no. Reads the log once more.
        """
        [(lengths, values)] = self.query(_WEIGHT_FAULTS.format(source=self._source(_COLUMNS)))
        return int(lengths), int(values)

    def query(self, sql: str, parameters: list[Any] | None = None) -> list[tuple[Any, ...]]:
        """Ask ``routes`` (one row a usable route line, flagged ones included) anything.

        Columns: req_id, token_idx, layer, phase (index into PHASES), flagged, topk_ids,
        topk_weights (only with ``open_log(weights=True)``), forward_pass_id (NULL in a public
        logger's file); rowid is the file order.
        """
        rows: list[tuple[Any, ...]] = self._db.execute(sql, parameters).fetchall()
        return rows

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

    def _load(self, on_progress: Callable[[float], None] | None) -> None:
        import duckdb

        sql = _LOAD.format(
            source=self._source(_COLUMNS), weights="topk_weights," if self._weights else ""
        )
        try:
            with _watching(self._db, on_progress):
                self._db.execute(sql)
            self._db.execute("CREATE TEMP VIEW routes AS SELECT rowid, * FROM lines WHERE kind = 0")
            bad = self._one("SELECT count(*) FROM lines WHERE kind = 2")
            bad += self._one(
                "SELECT count(*) FROM routes WHERE list_count(topk_ids) < len(topk_ids)"
            )
        except (duckdb.InvalidInputException, duckdb.ConversionException) as error:
            self._raise_bad_line()
            fact = str(error).splitlines()[0]
            raise UserError(f"{self.path}: {fact}; {logfile.RECORD_AGAIN}") from None
        except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
            fact = str(error).splitlines()[0]
            raise UserError(
                f"{self.path}: {fact}; free disk space or set TMPDIR to a larger disk"
            ) from None
        if bad > sum(file.partial_bytes > 0 for file in self.files):
            self._raise_bad_line()
        if not self._one("SELECT count(*) FROM routes"):
            raise UserError(f"{self.path} has a header but no route rows; {logfile.RECORD_AGAIN}")

    def _raise_bad_line(self) -> None:
        for file in self.files:
            if found := logfile.find_bad_line(file.path):
                raise logfile.bad_line_error(file.path, *found)

    def _source(self, columns: str) -> str:
        paths = ", ".join(_sql_path(file.path) for file in self.files)
        # A file without an end may stop inside a line: that line becomes NULL, and is counted.
        lenient = str(not all(file.finished for file in self.files)).lower()
        return (
            f"read_json([{paths}], format = 'newline_delimited', columns = {columns}, "
            f"ignore_errors = {lenient}, compression = 'uncompressed', hive_partitioning = false, "
            f"maximum_object_size = {logfile.MAX_LINE_BYTES})"
        )

    @cached_property
    def _cells(self) -> npt.NDArray[np.int64]:
        """[cells, 5] int64: layer, phase, flagged, expert, choices."""
        return _matrix(
            self.query(
                "SELECT layer, phase, flagged, expert, count(*) FROM "
                "(SELECT layer, phase, flagged, unnest(topk_ids) AS expert FROM routes) "
                "GROUP BY ALL ORDER BY ALL"
            ),
            width=5,
        )

    @cached_property
    def _cell_rows(self) -> npt.NDArray[np.int64]:
        """[cells, 4] int64: layer, phase, flagged, rows."""
        return _matrix(
            self.query("SELECT layer, phase, flagged, count(*) FROM routes GROUP BY ALL"), width=4
        )

    @cached_property
    def _duplicates(self) -> int:
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


def read_outputs(path: Path) -> dict[str, int]:
    """Positions that the engine computed for each request: prompt + generated - 1."""
    positions: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    req_id = str(record["req_id"])
                    length = len(record["prompt_token_ids"]) + len(record["token_ids"]) - 1
                except (KeyError, TypeError, ValueError) as error:
                    what = f"no {error}" if isinstance(error, KeyError) else "not a request object"
                    raise logfile.bad_line_error(path, number, what) from None
                if req_id in positions:
                    raise logfile.bad_line_error(path, number, f"request {req_id} comes twice")
                positions[req_id] = length
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {logfile.RECORD_AGAIN}") from None
    if not positions:
        raise UserError(f"{path} is empty; {logfile.RECORD_AGAIN}")
    return positions


def _open_files(path: Path) -> list[LogFile]:
    """The named file and its siblings of the same run, in the header's order."""
    main = logfile.open_file(path)
    names = list(main.meta.files)
    if path.name not in names:
        names[:1] = [path.name]  # renamed since it was written; the main file comes first
    files = []
    for name in names:
        if Path(name).name != name:
            raise UserError(
                f'{path}, line 1: "files" must hold plain file names, found {name!r}; '
                f"{logfile.RECORD_AGAIN}"
            )
        sibling = path.with_name(name)
        if name != path.name and not sibling.exists():
            raise UserError(
                f"{sibling} is missing: {path.name} says that it belongs to the same run "
                f"({len(names)} files); copy it to {path.parent}"
            )
        files.append(main if name == path.name else logfile.open_file(sibling))
    return files


def _selection(
    cells: npt.NDArray[np.int64], layers: tuple[int, ...], include_flagged: bool
) -> npt.NDArray[np.int64]:
    mask = np.isin(cells[:, 0], layers)
    return cells[mask if include_flagged else mask & (cells[:, 2] == 0)]


def _phase_codes(cells: npt.NDArray[np.int64]) -> list[int]:
    """The phases to show: both known ones whenever one occurs, "unknown" only if it occurs."""
    seen = set(cells[:, 1].tolist())
    return [code for code in (0, 1) if seen & {0, 1}] + ([2] if 2 in seen else [])


def _matrix(rows: list[tuple[Any, ...]], width: int) -> npt.NDArray[np.int64]:
    return np.array(rows, dtype=np.int64).reshape(-1, width)


def _sql_path(path: Path) -> str:
    """An absolute path as a SQL literal in which no character is a wildcard."""
    text = re.sub(r"([*?\[])", r"[\1]", str(path.absolute()))
    return "'" + text.replace("'", "''") + "'"


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


@contextmanager
def _watching(
    db: duckdb.DuckDBPyConnection, on_progress: Callable[[float], None] | None
) -> Iterator[None]:
    """Report the running query's percentage from a second thread."""
    if on_progress is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            on_progress(min(99.0, max(0.0, db.query_progress())))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        on_progress(100.0)
