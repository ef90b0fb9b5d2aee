# SPDX-License-Identifier: Apache-2.0
"""Change several files or none: staged beside their targets, renamed, rolled back on failure.

A file is replaced by a new one, never written in place, so its other hard
links keep their content. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from expert_profiler.errors import UserError

# Working names beside each file. They are fixed, not random, so that what a
# killed run left behind is found and removed by the next one.
_NEW, _OLD = "moe-logger-new", "moe-logger-old"


@dataclass(frozen=True)
class Change:
    """What becomes of one file: its new content, or None to remove it."""

    content: bytes | None
    executable: bool = False  # counts for a new file only; a replaced one keeps its mode


def commit(changes: Mapping[Path, Change]) -> None:
    """Make all changes or none, in the order given; raises :class:`UserError`.

    All new contents are on disk beside their files before the first file is
    replaced, so a full disk or a missing permission is met with nothing
    changed; a failure after that is rolled back.
    """
    undo: list[tuple[Path, Path | None]] = []
    folders: list[Path] = []
    current = Path()
    try:
        for current, change in changes.items():
            if change.content is not None:
                _make_folders(current.parent, folders)
                _stage(current, change.content, change.executable)
        for current, change in changes.items():
            backup = _keep(current) if os.path.lexists(current) else None
            undo.append((current, backup))
            if change.content is None:
                current.unlink()
            else:
                _beside(current, _NEW).replace(current)
    except BaseException as error:
        _roll_back(undo, folders, changes)
        if not isinstance(error, OSError):
            raise
        advice = {
            errno.EACCES: "run it as a user who may write there",
            errno.EPERM: "run it as a user who may write there",
            errno.EROFS: "mount it writable",
            errno.ENOSPC: "free some disk space",
        }.get(error.errno or 0, "see to that and run it again")
        raise UserError(
            f"cannot write {current}: {error.strerror or error}; nothing was changed; {advice}"
        ) from error
    sweep(changes)


def sweep(paths: Iterable[Path]) -> None:
    """Remove working files beside ``paths``: this run's, or those of a run that was killed."""
    for path in paths:
        for suffix in (_NEW, _OLD):
            working = _beside(path, suffix)
            try:
                working.unlink()
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                raise UserError(
                    f"cannot remove the working file {working}: {error.strerror}; "
                    "run it as a user who may write there"
                ) from error


def _roll_back(
    undo: Sequence[tuple[Path, Path | None]], folders: Sequence[Path], staged: Iterable[Path]
) -> None:
    try:
        for path, backup in reversed(undo):
            if backup is None:
                path.unlink(missing_ok=True)
            else:
                # A rename between two names of one inode does nothing; the
                # sweep below removes the second name then.
                backup.replace(path)
        sweep(staged)
        for folder in reversed(folders):
            folder.rmdir()
    except OSError as error:
        raise UserError(
            f"writing failed, and so did undoing it at {error.filename}: {error.strerror}; "
            "run: ./apply_patch.sh check"
        ) from error


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _make_folders(folder: Path, made: list[Path]) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        folder.mkdir()
        made.append(folder)


def _stage(path: Path, content: bytes, executable: bool) -> None:
    """Write ``content`` beside ``path``, durably, with the mode and owner of ``path``."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    staged = os.open(_beside(path, _NEW), flags, 0o777 if executable else 0o666)
    with os.fdopen(staged, "wb") as stream:
        stream.write(content)
        stream.flush()
        with contextlib.suppress(FileNotFoundError):
            old = path.stat()
            made = os.fstat(staged)
            if (old.st_uid, old.st_gid) != (made.st_uid, made.st_gid):
                with contextlib.suppress(PermissionError):
                    os.fchown(staged, old.st_uid, old.st_gid)
            os.fchmod(staged, stat.S_IMODE(old.st_mode))
        os.fsync(staged)


def _keep(path: Path) -> Path:
    """Give the file a second name, to put it back under: same inode, same links."""
    backup = _beside(path, _OLD)
    try:
        os.link(path, backup, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(path, backup, follow_symlinks=False)
    return backup
