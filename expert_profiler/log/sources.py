# SPDX-License-Identifier: Apache-2.0
"""SQL text that gives DuckDB the rows of a log."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from expert_profiler.log.line_file import MAX_LINE_BYTES
from expert_profiler.log.log_file import LogFile
from expert_profiler.log.schema import schema

# Types are given, not guessed: a guess reads the start of the file only.
_SQL_TYPES = {
    "string": "VARCHAR",
    "label": "VARCHAR",
    "int16": "INTEGER",
    "int32": "BIGINT",
    "int64": "BIGINT",
    "ids": "INTEGER[]",
    "weights": "DOUBLE[]",
}
_COLUMNS = {field.name: _SQL_TYPES[field.kind] for field in schema.ROUTE_FIELDS}
#: What a line is: 0 a route row with every required field, 1 another record, 2 no record.
KIND = f"""
(CASE WHEN type = '{schema.ROUTE}'
           AND {" AND ".join(f"{f.name} IS NOT NULL" for f in schema.ROUTE_FIELDS if f.required)}
      THEN 0
      WHEN type IN ('{schema.META}', '{schema.REQUEST}', '{schema.END}') THEN 1
      ELSE 2 END)::UTINYINT"""
#: The code of ``phase`` in ``schema.PHASES``.
PHASE = "(CASE phase WHEN 'prefill' THEN 0 WHEN 'decode' THEN 1 ELSE 2 END)::UTINYINT"
#: Columns of a line as ``json_lines`` takes them: all, and those that the counting pass reads.
LINE = {"type": "VARCHAR", **_COLUMNS}
COUNTED_LINE = {name: kind for name, kind in LINE.items() if name != "forward_pass_id"}


def json_lines(files: Sequence[LogFile], columns: Mapping[str, str] = LINE) -> str:
    """A table function over the lines of JSONL logs; columns: SQL type by key."""
    named = ", ".join(f"{name}: '{kind}'" for name, kind in columns.items())
    paths = ", ".join(sql_path(file.path) for file in files)
    # A file without an end may stop inside a line: that line becomes NULL, and is counted.
    lenient = str(not all(file.finished for file in files)).lower()
    return (
        f"read_json([{paths}], format = 'newline_delimited', columns = {{{named}}}, "
        f"ignore_errors = {lenient}, compression = 'uncompressed', hive_partitioning = false, "
        f"maximum_object_size = {MAX_LINE_BYTES})"
    )


def make_routes(files: Sequence[LogFile]) -> str:
    """The statement that makes the relation that ``RouteLog.query`` describes."""
    plain = [name for name in _COLUMNS if name not in ("phase", "flag")]
    columns = ", ".join(f"{name}::{_COLUMNS[name]} AS {name}" for name in plain)
    selected = f"""{columns}, {PHASE} AS phase, flag IS NOT NULL AS flagged, flag,
          hash(topk_ids, topk_weights) AS route_hash"""
    if files[0].parts:
        paths = ", ".join(sql_path(part) for file in files for part in file.parts)
        return f"""
            CREATE TEMP VIEW routes AS SELECT
              (file_index::BIGINT << 40) + file_row_number AS rowid, {selected}
            FROM read_parquet([{paths}], hive_partitioning = false)"""  # noqa: S608 (paths are quoted)
    return f"""
        CREATE TEMP TABLE routes AS SELECT {selected}
        FROM {json_lines(files)} WHERE {KIND} = 0"""  # noqa: S608 (paths are quoted)


def sql_path(path: Path) -> str:
    """An absolute path as a SQL literal in which no character is a wildcard."""
    return literal(re.sub(r"([*?\[])", r"[\1]", str(path.absolute())))


def literal(text: object) -> str:
    """A SQL string."""
    return "'" + str(text).replace("'", "''") + "'"
