# SPDX-License-Identifier: Apache-2.0
"""A JSONL log: what its two ends say, and where it is broken.

Opening reads no route rows, so its cost does not depend on the file's size. :func:`find_bad_line`
reads all of them and runs only when something is already known to be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

import msgspec

from expert_profiler.errors import UserError
from expert_profiler.log.log_file import (
    RECORD_AGAIN,
    LogFile,
    bad_line_error,
    parse_end,
    parse_header,
    parse_object,
)
from expert_profiler.log.schema import schema

#: No line that a reader can use is longer; what is, is not a line.
MAX_LINE_BYTES = 16 * 1024 * 1024
_TAIL_BYTES = 64 * 1024

_JSON_TYPES: dict[str, Any] = {
    "string": str | int,
    "int16": int,
    "int32": int,
    "int64": int,
    "ids": list[int],
    "weights": list[float],
}
_LABELS: dict[str, Any] = {"phase": Literal[schema.PHASES], "flag": Literal[schema.FLAGS]}


def route_type(*, complete: bool = False, weights: Any = list[float], **options: Any) -> Any:
    """The msgspec type of a route line, its fields in the order of the schema.

    Args:
        complete: phase and forward_pass_id must be there, as the recorder writes them; a public
            logger leaves them out.
        weights: the type of topk_weights.
        options: of the type, as ``msgspec.defstruct`` takes them.
    """
    types = _JSON_TYPES | {"weights": weights}
    fields: list[tuple[Any, ...]] = []
    for name, kind, required in schema.ROUTE_FIELDS:
        of_field = _LABELS[name] if kind == "label" else types[kind]
        optional = name == "flag" or not (required or complete)
        fields.append((name, of_field | None, None) if optional else (name, of_field))
    return msgspec.defstruct("Route", fields, tag_field="type", tag="route", **options)


def _other_type(kind: str, *fields: tuple[Any, ...]) -> Any:
    return msgspec.defstruct(kind.title(), fields, tag_field="type", tag=kind)


_OTHER_TYPES = (
    _other_type("request", ("req_id", str | int), ("cached_tokens", int | None, None))
    | _other_type("meta")
    | _other_type("end")
)


def open_lines(path: Path) -> LogFile:
    """Read the header and the end record of the JSONL log at ``path``."""
    size = _require_log(path)
    with path.open("rb") as file:
        meta = parse_header(path, file.readline(MAX_LINE_BYTES))
        last, offset, partial = _read_tail(path, file, size)
    end = parse_end(path, last) if last.get("type") == "end" else None
    return LogFile(path, size, meta, end, offset if end else size - partial, partial)


def find_bad_line(path: Path, public: bool = True) -> tuple[int, str] | None:
    """The first line that is not a complete record: (1-based line number, reason), else None.

    public: route lines need no phase and no forward_pass_id. An unfinished last line is not
    reported: that is a log cut short, not a malformed one.
    """
    decode = msgspec.json.Decoder(route_type(complete=not public) | _OTHER_TYPES).decode
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                if not line.strip() or not line.endswith(b"\n"):
                    continue
                malformed = isinstance(error, msgspec.ValidationError)
                return number, f"not {'a valid record' if malformed else 'valid JSON'}: {error}"
    return None


def raise_bad_line(files: Sequence[LogFile]) -> None:
    """Name the first malformed line of JSONL ``files``; returns when there is none."""
    for file in files:
        if not file.parts and (found := find_bad_line(file.path)):
            raise bad_line_error(file.path, *found)


def _require_log(path: Path) -> int:
    """The size of a file that can be a log, or the reason why it cannot be one."""
    if path.is_dir():
        raise UserError(
            f"{path} is a directory, not a log; name the file: {path / 'moe_routes.jsonl'}"
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        raise UserError(f"no log at {path}; make one with: ./test.sh, or name yours") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check: ls -l {path}") from None
    if not head.strip():
        raise UserError(f"{path} is empty; {RECORD_AGAIN}")
    if head.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is gzip-compressed; unpack it first: gunzip -k {path}")
    if head.startswith(b"PAR1"):
        raise UserError(
            f"{path} is a binary file, one part of a Parquet log; name its directory: {path.parent}"
        )
    # NUL cannot stand in JSON text; the prefix is zstd's. Damage further down is a malformed line
    # and gets its number.
    if b"\0" in head.partition(b"\n")[0] or head.startswith(b"\x28\xb5\x2f\xfd"):
        raise UserError(f"{path} is a binary file, not a JSONL log; {RECORD_AGAIN}")
    return size


def _read_tail(path: Path, file: IO[bytes], size: int) -> tuple[dict[str, Any], int, int]:
    """The last complete line, its offset and the length of an unfinished line after it."""
    span = _TAIL_BYTES
    while True:
        start = max(0, size - span)
        file.seek(start)
        tail = file.read(size - start)
        complete, newline, rest = tail.rpartition(b"\n")
        # An unterminated line that parses is a whole line whose newline is missing.
        if rest.strip() and (record := parse_object(rest)) is not None:
            return record, size - len(rest), 0
        text = complete.rstrip()
        line_start = text.rfind(b"\n") + 1
        if line_start > 0 or start == 0 or span > MAX_LINE_BYTES:
            break
        span *= 8
    record = parse_object(text[line_start:])
    if newline and record is None:
        number, reason = find_bad_line(path) or (0, "not valid JSON")
        raise bad_line_error(path, number, reason)
    return record or {}, start + line_start, len(rest)
