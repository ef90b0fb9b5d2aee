"""Turn a JSONL route log into a Parquet one, or back: ``python -m expert_profiler.convert``.

Nothing is lost either way: rows, their order, header, request records and end record. What says
where a log lies is restated: the header's ``files`` and the end record's ``bytes``.
Parquet to Parquet merges small parts.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from expert_profiler import errors
from expert_profiler.errors import UserError
from expert_profiler.log import log_file, part_files, records
from expert_profiler.log.log_file import LogFile

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
    files = log_file.open_run(source)
    names = [_name(file.path, source, target, i) for i, file in enumerate(files)]
    for place in map(target.with_name, names):
        if place.exists() and not force:
            raise UserError(f"{place} exists; replace it with --force, or choose another target")
    written: list[Path] = []
    for file, name in zip(files, names, strict=True):
        header = dict(file.meta.raw)
        if "files" in header:
            header["files"] = names
        place = target.with_name(name)
        if file.end is not None and "next" in file.end.raw:  # the header names all files instead
            raw = {key: value for key, value in file.end.raw.items() if key != "next"}
            file = replace(file, end=replace(file.end, raw=raw))
        with _moved_into(place) as scratch:
            write = _write_parquet if place.suffix == ".parquet" else _write_jsonl
            write(file, header, scratch, on_rows or (lambda _: None))
        written.append(place)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    args = errors.parsed(_parser(), argv)
    from tqdm import tqdm

    with tqdm(desc="converting", unit=" rows", unit_scale=True, delay=2) as bar:
        written = convert(args.source, args.target, args.force, bar.update)
    before = _size(log_file.open_run(args.source))
    after = _size(log_file.open_run(written[0]))
    print(f"written  {', '.join(map(str, written))}")
    print(f"size     {before:,} -> {after:,} bytes")
    print(f"next: python make_hist.py {written[0]}")
    return 0


def _write_jsonl(file: LogFile, header: dict[str, Any], target: Path, on_rows: OnRows) -> None:
    records.write_jsonl(target, header, _read(file, on_rows), file.end)


def _write_parquet(file: LogFile, header: dict[str, Any], target: Path, on_rows: OnRows) -> None:
    # How small the types may be is known only when all rows were seen: widen and start over.
    for plan in records.plans(file):
        try:
            records.write_parquet(target, header, _read(file, on_rows), file.end, plan)
        except records.UnfitError:
            shutil.rmtree(target)
        else:
            return
    raise UserError(
        f"{file.path} has expert ids that no Parquet log holds; see: ./test.sh validate"
    )


def _read(file: LogFile, on_rows: OnRows) -> Iterator[records.Chunk]:
    for chunk in records.read_parquet(file) if file.parts else records.read_jsonl(file):
        yield chunk
        on_rows(chunk.rows.num_rows)


def _name(path: Path, source: Path, target: Path, index: int) -> str:
    """``x.pp1.jsonl`` beside ``x.jsonl`` becomes ``y.pp1.parquet`` beside ``y.parquet``."""
    if index == 0:
        return target.name
    if path.stem.startswith(source.stem):
        return f"{target.stem}{path.stem[len(source.stem) :]}{target.suffix}"
    return f"{target.stem}.{index}{target.suffix}"


@contextmanager
def _moved_into(place: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``place`` when all went well."""
    scratch = place.with_name(f".{place.name}.part")
    _remove(scratch)
    try:
        yield scratch
        _remove(place)
        scratch.rename(place)
    except OSError as error:
        raise UserError(
            f"cannot write {place}: {error.strerror or error}; choose another target"
        ) from None
    finally:
        _remove(scratch)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def _size(files: list[LogFile]) -> int:
    return sum(file.size for file in files)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m expert_profiler.convert",
        description="Turn a JSONL route log into a Parquet one, or back, without loss. "
        "Parquet to Parquet merges small parts.",
    )
    parser.add_argument("source", type=Path, help="a .jsonl file or a .parquet directory")
    parser.add_argument("target", type=Path, help="the log to write; its suffix says the format")
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    return parser


if __name__ == "__main__":
    sys.exit(errors.run(main))
