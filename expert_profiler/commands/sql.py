# SPDX-License-Identifier: Apache-2.0
"""Ask a log your own questions in SQL.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expert_profiler import errors
from expert_profiler.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="expert-profiler sql",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="next: expert-profiler report LOG --out DIR, for the metrics of the whole log",
    )
    parser.add_argument("log", type=Path, help="a .jsonl file or a .parquet directory")
    parser.add_argument("query", help='such as "SELECT layer, count(*) FROM routes GROUP BY layer"')
    parser.add_argument("--outputs", type=Path, help="[outputs.jsonl beside the log, if any]")
    parser.add_argument("--csv", action="store_true", help="every row, as CSV")
    parser.add_argument("--rows", type=int, default=60, help="rows to show at most [%(default)s]")
    parser.add_argument("--width", type=int, default=160, help="characters a line [%(default)s]")
    args = errors.parsed(parser, argv)
    from expert_profiler.log import open_log, outputs
    from expert_profiler.log.sql_relations import ask, make_relations

    if args.outputs is not None and not args.outputs.is_file():
        raise UserError(
            f"no file {args.outputs}; name the outputs.jsonl of the run, or leave it out"
        )
    with open_log(args.log) as log:
        for note in log.notes:
            print(f"note: {note}", file=sys.stderr)
        answer = ask(make_relations(log, args.outputs or outputs.beside(args.log)), args.query)
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
