# SPDX-License-Identifier: Apache-2.0
"""The relations that a user's own SQL finds, in a database that reads no other file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_profiler.errors import UserError
from expert_profiler.log import outputs, sources
from expert_profiler.log.route_log import RouteLog

if TYPE_CHECKING:
    import duckdb

_VIEWS = """
CREATE TEMP VIEW routes AS SELECT req_id, token_idx, layer,
  CASE phase WHEN 0 THEN 'prefill' WHEN 1 THEN 'decode' END AS phase,
  forward_pass_id, flag, topk_ids, topk_weights FROM recorded;
CREATE TEMP VIEW experts AS SELECT req_id, token_idx, layer, phase, forward_pass_id, flag,
  unnest(range(1, len(topk_ids) + 1)) AS rank, unnest(topk_ids) AS expert,
  unnest(topk_weights) AS weight FROM routes;
CREATE TEMP TABLE meta (file VARCHAR, model_id VARCHAR, vllm_version VARCHAR, device VARCHAR,
  dtype VARCHAR, quantization VARCHAR, top_k INTEGER, num_experts INTEGER,
  layers_logged INTEGER[], header JSON, "end" JSON)
"""


def make_relations(log: RouteLog, outputs_path: Path | None) -> duckdb.DuckDBPyConnection:
    """A connection with the relations of ``log``, locked: it reads no other file, writes none.

    Relations: routes, experts, meta, and outputs where ``outputs_path`` is given.
    """
    log.query("FROM routes LIMIT 0")  # it is there now, whether or not a finding needed it
    db = log.connection
    db.execute(f"ALTER {'VIEW' if log.is_parquet else 'TABLE'} routes RENAME TO recorded")
    db.execute(_VIEWS)
    for file in log.files:
        raw = file.meta.raw
        facts = [raw.get(key) for key in ("vllm_version", "device", "dtype", "quantization")]
        sizes = [file.meta.top_k, file.meta.num_experts, list(file.meta.layers_logged)]
        end = json.dumps(file.end.raw) if file.end else None
        row = [file.path.name, file.meta.model_id, *facts, *sizes, json.dumps(raw), end]
        db.execute(f"INSERT INTO meta VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608
    if outputs_path is not None:
        db.execute(
            f"CREATE TEMP TABLE outputs AS SELECT * FROM read_json({sources.sql_path(outputs_path)}"  # noqa: S608
            f", format = 'newline_delimited', columns = {outputs.SQL_COLUMNS})"
        )
    parts = [sources.literal(part.absolute()) for file in log.files for part in file.parts]
    db.execute(f"SET allowed_paths = [{', '.join(parts)}]")
    db.execute("SET enable_external_access = false")
    db.execute("SET lock_configuration = true")
    return db


def ask(db: duckdb.DuckDBPyConnection, query: str) -> Any:
    """The answer to one SELECT, as a relation.

    Raises:
        UserError: the text is none, or DuckDB refuses it.
    """
    import duckdb

    if any("\ud800" <= character <= "\udfff" for character in query):
        raise UserError("the query is no UTF-8; write it in UTF-8")
    try:
        statements = duckdb.extract_statements(query)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise UserError("only one SELECT is answered, which changes nothing; see --help")
        return db.sql(query)
    except duckdb.Error as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{' '.join(lines[:2])}; the relations are listed by: --help") from None
    except UnicodeDecodeError:  # DuckDB cut its own message within a character of the query
        raise UserError("DuckDB refuses the query; the relations are listed by: --help") from None
