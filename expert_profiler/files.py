# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, and never over another without being told to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from expert_profiler.errors import UserError


def prepare(folder: Path, names: Sequence[str], force: bool, option: str) -> None:
    """Make ``folder``; refuse, before any work is done, to overwrite one of ``names`` in it.

    Args:
        folder: where the files go.
        names: what will be written there.
        force: overwrite.
        option: how the command line calls the folder, such as "--out".

    Raises:
        UserError: it can't be made, or a file exists.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder} can't be made a folder ({error.strerror})") from None
    existing = [name for name in names if os.path.lexists(folder / name)]
    if existing and not force:
        raise UserError(
            f"{', '.join(existing)} exists in {folder}; replace with --force, or choose another "
            f"{option}"
        )


def check_free(path: Path, force: bool, option: str, log: Path | None = None) -> None:
    """Refuse, before any work is done, a target that can't be written or is not to be replaced.

    Args:
        path: the file to write.
        force: overwrite it.
        option: how the command line calls it, such as "--out".
        log: what is read, and so never overwritten.

    Raises:
        UserError: it has no folder, is the log, no plain file, or exists.
    """
    if not path.parent.is_dir():
        raise UserError(f"no directory {path.parent}; make it: mkdir -p {path.parent}")
    if path.is_dir():
        raise UserError(f"{path} is a directory; name a file as {option}")
    if log is not None and path.exists() and log.exists() and path.samefile(log):
        raise UserError(f"{option} {path} is the log itself; choose another {option}")
    if path.exists() and not path.is_file():
        raise UserError(f"{option} {path} is no plain file; choose another {option}")
    if path.exists() and not force:
        raise UserError(f"{path} exists; replace it with --force, or choose another {option}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch name beside ``path`` for a file or a folder, which becomes ``path`` at the end.

    After an error ``path`` is as it was and no scratch file is left.

    Raises:
        UserError: it can't be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        remove(scratch)
        yield scratch
        if path.is_dir() or scratch.is_dir():
            remove(path)
        scratch.replace(path)
    except OSError as error:
        fact = error.strerror or error
        raise UserError(f"cannot write {path}: {fact}; choose another place") from None
    finally:
        remove(scratch)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def write(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all; text as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as scratch:
        scratch.write_bytes(data)
