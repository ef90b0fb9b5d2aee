"""``outputs.jsonl``: what each request was asked and what it answered."""

from __future__ import annotations

import json
from pathlib import Path

from expert_profiler.errors import UserError
from expert_profiler.log import log_file


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
                except (KeyError, RecursionError, TypeError, ValueError) as error:
                    what = f"no {error}" if isinstance(error, KeyError) else "not a request object"
                    raise log_file.bad_line_error(path, number, what) from None
                if req_id in positions:
                    raise log_file.bad_line_error(path, number, f"request {req_id} comes twice")
                positions[req_id] = length
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {log_file.RECORD_AGAIN}") from None
    if not positions:
        raise UserError(f"{path} is empty; {log_file.RECORD_AGAIN}")
    return positions
