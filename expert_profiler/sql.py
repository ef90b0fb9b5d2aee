"""Ask a route log your own questions: ``python -m expert_profiler.sql LOG "select …"``.

Relations:

routes    one row a token and layer: req_id, token_idx, layer, phase, forward_pass_id, flag,
          topk_ids, topk_weights
experts   one row an expert choice: the same, with rank (1: the router's first), expert, weight
outputs   one row a request, where outputs.jsonl is there: req_id, prompt, prompt_token_ids,
          token_ids, text, finish_reason
meta      one row a file: file, model_id, …, header and end record as JSON

Flagged rows are there; leave them out with WHERE flag IS NULL. The dialect is DuckDB's. A query
reads the log and nothing else, and writes nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_profiler import errors
from expert_profiler.errors import UserError
from expert_profiler.log import sources
from expert_profiler.log.route_log import RouteLog, open_log

if TYPE_CHECKING:
    import duckdb

_VIEWS = """
CREATE TEMP VIEW routes AS SELECT req_id, token_idx, layer,
  CASE phase WHEN 0 THEN 'prefill' WHEN 1 THEN 'decode' END AS phase,
  forward_pass_id, flag, topk_ids, topk_weights FROM recorded;
CREATE TEMP VIEW experts AS SELECT req_id, token_idx, layer, phase, forward_pass_id, flag,
  unnest(range(1, len(topk_ids) + 1)) AS rank, unnest(topk_ids) AS expert,
  unnest(topk_weights) AS weight FROM routes;
"""
_OUTPUTS = """
CREATE TEMP TABLE outputs AS SELECT * FROM read_json({path}, format = 'newline_delimited',
  columns = {{req_id: 'VARCHAR', prompt: 'VARCHAR', prompt_token_ids: 'INTEGER[]',
  token_ids: 'INTEGER[]', text: 'VARCHAR', finish_reason: 'VARCHAR'}})
"""
_META = """
CREATE TEMP TABLE meta (file VARCHAR, model_id VARCHAR, vllm_version VARCHAR, device VARCHAR,
  dtype VARCHAR, quantization VARCHAR, top_k INTEGER, num_experts INTEGER,
  layers_logged INTEGER[], header JSON, "end" JSON)
"""


@contextmanager
def database(log: RouteLog, outputs: Path | None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with the relations of ``log``, locked: it reads no other file, writes none."""
    db = log.connection()
    db.execute(sources.make_routes(log.files, weights=True, name="recorded"))
    db.execute(_VIEWS)
    db.execute(_META)
    for file in log.files:
        raw = file.meta.raw
        facts = [raw.get(key) for key in ("vllm_version", "device", "dtype", "quantization")]
        sizes = [file.meta.top_k, file.meta.num_experts, list(file.meta.layers_logged)]
        end = json.dumps(file.end.raw) if file.end else None
        row = [file.path.name, file.meta.model_id, *facts, *sizes, json.dumps(raw), end]
        db.execute(f"INSERT INTO meta VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608
    if outputs is not None:
        db.execute(_OUTPUTS.format(path=sources.sql_path(outputs)))
    parts = [sources.literal(part.absolute()) for file in log.files for part in file.parts]
    db.execute(f"SET allowed_paths = [{', '.join(parts)}]")
    db.execute("SET enable_external_access = false")
    db.execute("SET lock_configuration = true")
    yield db


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


def main(argv: Sequence[str] | None = None) -> int:
    args = errors.parsed(_parser(), argv)
    outputs = _outputs(args.log, args.outputs)
    with open_log(args.log) as log:
        for note in log.notes:
            print(f"note: {note}", file=sys.stderr)
        with database(log, outputs) as db:
            answer = ask(db, args.query)
            if args.csv:
                writer = csv.writer(sys.stdout)
                writer.writerow(answer.columns)
                for batch in answer.to_arrow_reader(10_000):
                    writer.writerows(map(_cells, batch.to_pylist()))
            else:
                answer.show(max_rows=args.rows, max_width=args.width)
    return 0


def _cells(row: dict[str, Any]) -> list[Any]:
    return [json.dumps(cell) if isinstance(cell, list | dict) else cell for cell in row.values()]


def _outputs(log: Path, named: Path | None) -> Path | None:
    if named is not None:
        if not named.is_file():
            raise UserError(f"no file {named}; name the outputs.jsonl of the run, or leave it out")
        return named
    beside = log.parent / "outputs.jsonl"
    return beside if beside.is_file() else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m expert_profiler.sql",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("log", type=Path, help="a .jsonl file or a .parquet directory")
    parser.add_argument("query", help='such as "SELECT layer, count(*) FROM routes GROUP BY layer"')
    parser.add_argument("--outputs", type=Path, help="[outputs.jsonl beside the log, if any]")
    parser.add_argument("--csv", action="store_true", help="every row, as CSV")
    parser.add_argument("--rows", type=int, default=60, help="rows to show at most [%(default)s]")
    parser.add_argument("--width", type=int, default=160, help="characters a line [%(default)s]")
    return parser


if __name__ == "__main__":
    sys.exit(errors.run(main))
