# SPDX-License-Identifier: Apache-2.0
"""Apply the vLLM patch to an installed or unpacked wheel, and revert it.

Everything is computed in memory and proved by blob id before the first byte is written; there is
no fuzz and no offset. Files are replaced, never written in place, because installers hard-link
wheels to a cache that other environments share.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from expert_profiler.errors import UserError
from expert_profiler.patch.file_changes import Change, commit, sweep
from expert_profiler.patch.patch_file import DAMAGED, FileChange, blob_id, transformed
from expert_profiler.patch.patch_state import FileState, Report, State, inspect, read, state_of
from expert_profiler.patch.targets import target_at


def apply(root: Path | None = None, patch: Path | None = None) -> Report:
    """Apply the patch, or raise :class:`UserError` with nothing changed.

    Finishes a half-applied patch too: each file's result is known by blob id.
    """
    with _looked_at(root, patch) as report:
        if report.state is State.APPLIED:
            return report
        if report.foreign or report.state not in (
            State.PRISTINE,
            State.HALF_APPLIED,
            State.LEFTOVER,
        ):
            raise UserError(report.message)
        # Added files first: a hook never imports what is not there yet.
        todo = sorted(report.having(FileState.BEFORE), key=lambda f: f.before is not None)
        commit(_changes(report.target.root, todo, reverse=False))
        return _proved(report, State.APPLIED)


def revert(root: Path | None = None, patch: Path | None = None) -> Report:
    """Give back the wheel's files and remove what the patch added.

    Also undoes a half-applied patch and removes files that a reinstall or an upgrade left behind;
    raises :class:`UserError` with nothing changed otherwise.
    """
    with _looked_at(root, patch) as report:
        target = report.target
        added = [target.root / f.path for f in report.patch.files if f.before is None]
        if report.state is State.PRISTINE:
            _remove_traces(added, target.root)  # a reinstall leaves byte code behind
            return report
        todo = report.having(FileState.AFTER)
        if not todo or report.foreign or report.state is State.CHANGED:
            raise UserError(report.message)
        todo.sort(key=lambda f: f.before is None)  # hooks first, then what they import
        commit(_changes(target.root, todo, reverse=True))
        _remove_traces(added, target.root)
        if report.state in (State.OTHER_VERSION, State.NOT_INSTALLED):
            now = target_at(target.root, explicit=target.explicit)
            return replace(state_of(report.patch, now), did=True)
        return _proved(report, State.PRISTINE)


@contextlib.contextmanager
def _looked_at(root: Path | None, patch: Path | None) -> Iterator[Report]:
    """The state of the target, which no other process changes while the context lasts."""
    seen = inspect(root, patch)
    with _locked(seen.target.root):
        sweep(seen.target.root / f.path for f in seen.patch.files)
        yield state_of(seen.patch, seen.target)


def _proved(before: Report, state: State) -> Report:
    report = state_of(before.patch, before.target)
    if report.state is not state:
        raise UserError(f"after writing, vllm is {report.state.value}: {report.message}")
    return replace(report, did=True)


def _changes(root: Path, todo: Sequence[FileChange], *, reverse: bool) -> dict[Path, Change]:
    """What to write and remove, every content proved by blob id."""
    changes: dict[Path, Change] = {}
    for file in todo:
        path = root / file.path
        expected = file.before if reverse else file.after
        content = (
            None if expected is None else transformed(read(path) or b"", file, reverse=reverse)
        )
        if content is not None and blob_id(content) != expected:
            raise UserError(f"the hunks for {file.path} do not give blob {expected}; {DAMAGED}")
        changes[path] = Change(content, file.executable)
    return changes


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One writer at a time; the lock is on the folder, so no lock file stays behind."""
    folder = None
    # A folder that is not there is diagnosed later; some network file systems know no locks.
    with contextlib.suppress(OSError):
        folder = os.open(root, os.O_RDONLY)
        import fcntl  # not on Windows, which opens no folder

        fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if folder is not None:
            os.close(folder)


def _remove_traces(added: Sequence[Path], root: Path) -> None:
    """Remove the byte code of absent files and the folders that hold nothing else.

    A wheel holds no empty folder, so what is empty now was made by the patch.
    """
    try:
        for path in added:
            if path.suffix == ".py" and not path.exists():
                for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
                    compiled.unlink()
        folders = {p for path in added for p in path.parents if root in p.parents and p.is_dir()}
        for folder in sorted(folders, key=lambda p: len(p.parts), reverse=True):
            cache = folder / "__pycache__"
            if cache.is_dir() and not any(cache.iterdir()):
                cache.rmdir()
            entries = list(folder.iterdir())
            if entries == [cache] and all(p.suffix == ".pyc" for p in cache.iterdir()):
                shutil.rmtree(cache)  # byte code of sources that are gone
                entries = []
            if not entries:
                folder.rmdir()
    except OSError as error:
        raise UserError(
            f"the files are the wheel's, but cannot remove {error.filename}: {error.strerror}; "
            "remove it by hand"
        ) from error
