# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, and never over another without being told to."""

from __future__ import annotations

import os
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


def check_free(path: Path, force: bool, option: str) -> None:
    """Refuse a target that is no plain file, or that exists and is not to be replaced.

    Raises:
        UserError: naming ``option``, the command line's name of it.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no plain file; choose another {option}")
    if path.exists() and not force:
        raise UserError(f"{path} exists; replace it with --force, or choose another {option}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file beside ``path``, which becomes ``path`` at the end.

    After an error ``path`` is as it was and no scratch file is left.

    Raises:
        UserError: it can't be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield scratch
        scratch.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from None
    finally:
        scratch.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all; text as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as scratch:
        scratch.write_bytes(data)
