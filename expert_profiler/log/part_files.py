# SPDX-License-Identifier: Apache-2.0
"""A Parquet log: a directory of part files, with the other records in their footers.

The layout is described where it is written:
``overlay/vllm/moe_routes/writing/formats/dataset.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expert_profiler.errors import UserError
from expert_profiler.log.log_file import (
    RECORD_AGAIN,
    LogFile,
    parse_end,
    parse_header,
    parse_object,
)
from expert_profiler.log.schema import schema

_PART = re.compile(r"part-(\d{6,})\.parquet")


def is_dataset(path: Path) -> bool:
    """Whether ``path`` is a directory with Parquet files in it."""
    return path.is_dir() and any(path.glob("*.parquet"))


def open_dataset(path: Path) -> LogFile:
    """Read the footers of the log at ``path``."""
    parts = _parts(path)
    footers = [_footer(part) for part in parts]
    headers = [footer.get(schema.FOOTER_META) for footer in footers]
    for part, header in zip(parts, headers, strict=True):
        if header is None:
            raise UserError(
                f"{part} has no route log's header in its footer: another program wrote it; "
                f"{RECORD_AGAIN}"
            )
        if header != headers[0]:
            raise UserError(
                f"{part} belongs to another recording than {parts[0].name}; move it away"
            )
    meta = parse_header(parts[0], headers[0] or b"")
    ended = [i for i, footer in enumerate(footers) if schema.FOOTER_END in footer]
    if ended and ended[0] != len(parts) - 1:
        raise UserError(
            f"{path} goes on after its end record in {parts[ended[0]].name}; "
            "move the parts after it away"
        )
    sizes = [part.stat().st_size for part in parts]
    end = (
        parse_end(parts[-1], _record(parts[-1], footers[-1][schema.FOOTER_END])) if ended else None
    )
    before_end = sum(sizes[:-1]) if ended else sum(sizes)
    return LogFile(path, sum(sizes), meta, end, before_end, 0, tuple(parts))


def requests(file: LogFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """The request records: (how many rows of the log come before it, the record)."""
    import pyarrow.parquet as pq

    rows = 0
    for part in file.parts:
        metadata = pq.read_metadata(part)
        for line in (metadata.metadata or {}).get(schema.FOOTER_REQUESTS, b"").splitlines():
            record = _record(part, line)
            after, cached = record.pop("after_rows", None), record.get("cached_tokens") or 0
            if "req_id" not in record or not all(_is_count(n) for n in (after, cached)):
                raise UserError(f"{part} has a request record without its keys; {RECORD_AGAIN}")
            yield rows + after, record
        rows += metadata.num_rows


def _record(part: Path, data: bytes) -> dict[str, Any]:
    """A JSON object of a part's footer."""
    record = parse_object(data)
    if record is None:
        raise UserError(f"{part} has a record in its footer that is no JSON object; {RECORD_AGAIN}")
    return record


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _parts(path: Path) -> list[Path]:
    """The part files in order; every number must be there."""
    by_number: dict[int, Path] = {}
    for found in path.glob("*.parquet"):
        match = _PART.fullmatch(found.name)
        if match is None:
            raise UserError(f"{found} is no part of a route log; move it out of {path}")
        by_number[int(match[1])] = found
    for number in range(max(by_number) + 1):
        if number not in by_number:
            missing = path / f"part-{number:06d}.parquet"
            raise UserError(f"{missing} is missing; copy the whole directory again")
    return [by_number[number] for number in sorted(by_number)]


def _footer(part: Path) -> dict[bytes, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return dict(pq.read_metadata(part).metadata or {})
    except (pa.ArrowException, OSError) as error:
        fact = str(error).splitlines()[0]
        raise UserError(f"cannot read {part}: {fact}; copy the file again") from None
