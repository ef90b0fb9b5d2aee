"""How DuckDB reaches the rows of a log: SQL text, nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from expert_profiler.log import log_file
from expert_profiler.log.log_file import LogFile
from expert_profiler.log.scan import KIND, PHASE

# Types are given, not guessed: a guess reads the start of the file only.
ROUTE_COLUMNS = (
    "{type: 'VARCHAR', req_id: 'VARCHAR', token_idx: 'BIGINT', layer: 'INTEGER', "
    "topk_ids: 'INTEGER[]', topk_weights: 'DOUBLE[]', phase: 'VARCHAR', forward_pass_id: 'BIGINT', "
    "flag: 'VARCHAR'}"
)
SCAN_COLUMNS = ROUTE_COLUMNS.replace("forward_pass_id: 'BIGINT', ", "")


def json_source(files: Sequence[LogFile], columns: str) -> str:
    """A table function over the lines of JSONL logs."""
    paths = ", ".join(sql_path(file.path) for file in files)
    # A file without an end may stop inside a line: that line becomes NULL, and is counted.
    lenient = str(not all(file.finished for file in files)).lower()
    return (
        f"read_json([{paths}], format = 'newline_delimited', columns = {columns}, "
        f"ignore_errors = {lenient}, compression = 'uncompressed', hive_partitioning = false, "
        f"maximum_object_size = {log_file.MAX_LINE_BYTES})"
    )


def make_routes(files: Sequence[LogFile], weights: bool, name: str = "routes") -> str:
    """The statement that makes the relation that ``RouteLog.query`` describes."""
    weight_column = "topk_weights::DOUBLE[] AS topk_weights," if weights else ""
    weight_column += " hash(topk_ids, topk_weights) AS route_hash,"
    if files[0].parts:
        paths = ", ".join(sql_path(part) for file in files for part in file.parts)
        return f"""
            CREATE TEMP VIEW {name} AS SELECT
              (file_index::BIGINT << 40) + file_row_number AS rowid,
              req_id::VARCHAR AS req_id, token_idx::BIGINT AS token_idx, layer::INTEGER AS layer,
              {PHASE} AS phase, flag IS NOT NULL AS flagged,
              topk_ids::INTEGER[] AS topk_ids, {weight_column} forward_pass_id, flag
            FROM read_parquet([{paths}], hive_partitioning = false)"""  # noqa: S608 (paths are quoted)
    return f"""
        CREATE TEMP TABLE {name} AS SELECT
          req_id, token_idx, layer, {PHASE} AS phase, flag IS NOT NULL AS flagged,
          topk_ids, {weight_column} forward_pass_id, flag
        FROM {json_source(files, ROUTE_COLUMNS)} WHERE {KIND} = 0"""  # noqa: S608 (paths are quoted)


def weight_source(files: Sequence[LogFile]) -> str:
    """A relation with ``topk_ids`` and ``topk_weights`` of every route row."""
    if files[0].parts:
        paths = ", ".join(sql_path(part) for file in files for part in file.parts)
        return f"read_parquet([{paths}], hive_partitioning = false)"
    return f"(FROM {json_source(files, ROUTE_COLUMNS)} WHERE type = 'route')"


def sql_path(path: Path) -> str:
    """An absolute path as a SQL literal in which no character is a wildcard."""
    return literal(re.sub(r"([*?\[])", r"[\1]", str(path.absolute())))


def literal(text: object) -> str:
    """A SQL string."""
    return "'" + str(text).replace("'", "''") + "'"
