# SPDX-License-Identifier: Apache-2.0
"""Turn a JSONL log into a Parquet one, or back, without loss.

Rows, their order, header, request records and end record stay. What says where a log lies is
restated: the header's ``files`` and the end record's ``bytes``. Parquet to Parquet merges small
parts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from expert_profiler import files
from expert_profiler.errors import UserError
from expert_profiler.log import part_files, records, run_files
from expert_profiler.log.log_file import LogFile
from expert_profiler.resources import program

SUFFIXES = (".jsonl", ".parquet")
OnRows = Callable[[int], Any]


def convert(
    source: Path, target: Path, force: bool = False, on_rows: OnRows | None = None
) -> list[Path]:
    """Write the log at ``source``, every rank's file, to ``target`` and names derived from it.

    force: replace what is there; on_rows gets numbers of rows as they are done.
    Returns the logs written.
    """
    _check(source, target)
    logs = run_files.open_run(source)
    names = [_name(log.path, source, target, i) for i, log in enumerate(logs)]
    places = [target.with_name(name) for name in names]
    for place in places:
        if place.exists() and not force:
            raise UserError(f"{place} exists; replace it with --force, or choose another target")
    for log, place in zip(logs, places, strict=True):
        header = dict(log.meta.raw)
        if "files" in header:
            header["files"] = names
        if log.end is not None and "next" in log.end.raw:  # the header names all files instead
            raw = {key: value for key, value in log.end.raw.items() if key != "next"}
            log = replace(log, end=replace(log.end, raw=raw))
        with files.replacing(place) as scratch:
            told = on_rows or (lambda _: None)
            if place.suffix == ".parquet":
                _write_parquet(log, header, scratch, told)
            else:
                records.write_jsonl(scratch, header, _read(log, told), log.end)
    return places


def size(log: Path) -> int:
    """Bytes of all files of the log's run."""
    return sum(file.size for file in run_files.open_run(log))


def _write_parquet(log: LogFile, header: dict[str, Any], target: Path, on_rows: OnRows) -> None:
    # How small the types may be is known only when all rows were seen: widen and start over.
    for plan in records.plans(log):
        try:
            records.write_parquet(target, header, _read(log, on_rows), log.end, plan)
        except records.UnfitError:
            shutil.rmtree(target)
        else:
            return
    raise UserError(
        f"{log.path} has expert ids that no Parquet log holds; see: {program()} validate"
    )


def _read(log: LogFile, on_rows: OnRows) -> Iterator[records.Chunk]:
    for chunk in records.read_parquet(log) if log.parts else records.read_jsonl(log):
        yield chunk
        on_rows(chunk.rows.num_rows)


def _name(path: Path, source: Path, target: Path, index: int) -> str:
    """``x.pp1.jsonl`` beside ``x.jsonl`` becomes ``y.pp1.parquet`` beside ``y.parquet``."""
    if index == 0:
        return target.name
    if path.stem.startswith(source.stem):
        return f"{target.stem}{path.stem[len(source.stem) :]}{target.suffix}"
    return f"{target.stem}.{index}{target.suffix}"


def _check(source: Path, target: Path) -> None:
    """Refuse before the reading, not after it."""
    if target.suffix not in SUFFIXES:
        raise UserError(f"{target} ends in neither .jsonl nor .parquet, which says what to write")
    if not target.parent.is_dir():
        raise UserError(f"no directory {target.parent}; make it: mkdir -p {target.parent}")
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f"{target} is the log itself; choose another target")
    if target.is_dir() and any(target.iterdir()) and not part_files.is_dataset(target):
        raise UserError(f"{target} is a directory and no route log; choose another target")
