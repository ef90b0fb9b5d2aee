# SPDX-License-Identifier: Apache-2.0
"""``outputs.jsonl``: the prompt and the generated tokens of each request."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from expert_profiler.artifacts import NAMES
from expert_profiler.errors import UserError
from expert_profiler.log.log_file import RECORD_AGAIN, bad_line_error

#: Columns of a line as DuckDB's read_json takes them.
SQL_COLUMNS = (
    "{req_id: 'VARCHAR', prompt: 'VARCHAR', prompt_token_ids: 'INTEGER[]', "
    "token_ids: 'INTEGER[]', text: 'VARCHAR', finish_reason: 'VARCHAR'}"
)
#: Token ids are below this in any vocabulary: the tokenizers package takes 32 bits.
_MOST_TOKENS = 1 << 31


def beside(log: Path) -> Path | None:
    """The outputs of the run that wrote ``log``, where they lie beside it."""
    path = log.with_name(NAMES["outputs"])
    return path if path.is_file() else None


def read_tokens(path: Path) -> dict[str, npt.NDArray[np.int64]]:
    """The tokens of each request by its ``req_id``: [prompt + generated] int64 ids.

    Raises:
        UserError: the file can't be read, or a line is no output or of a request that it has
            already.
    """
    tokens: dict[str, npt.NDArray[np.int64]] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    ids = [*record["prompt_token_ids"], *record["token_ids"]]
                    if not all(type(token) is int and 0 <= token < _MOST_TOKENS for token in ids):
                        raise ValueError("not a token id")
                    req_id = str(record["req_id"])
                except (KeyError, RecursionError, TypeError, ValueError) as error:
                    what = f"no {error}" if isinstance(error, KeyError) else "not a request object"
                    raise bad_line_error(path, number, what) from None
                if req_id in tokens:
                    raise bad_line_error(path, number, f"request {req_id} comes twice")
                tokens[req_id] = np.array(ids, dtype=np.int64)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {RECORD_AGAIN}") from None
    return tokens


def read_positions(path: Path) -> dict[str, int]:
    """Positions that the engine computed for each request: prompt + generated - 1.

    Raises:
        UserError: as ``read_tokens``, and for a file without a request.
    """
    tokens = read_tokens(path)
    if not tokens:
        raise UserError(f"{path} is empty; {RECORD_AGAIN}")
    return {req_id: len(ids) - 1 for req_id, ids in tokens.items()}
