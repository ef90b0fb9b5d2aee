# SPDX-License-Identifier: Apache-2.0
"""File names that clients may choose: inside one folder, and nowhere else."""

import re
from datetime import datetime, timezone
from pathlib import Path

from vllm.entrypoints.serve.expert_distribution.guard import ApiError

#: A name, or names of folders and a name: no dot in front, so no way up and nothing hidden.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_LONGEST = 200


def check(name: str) -> str:
    """The name itself.

    Raises:
        ApiError: it could lead out of the folder, or is no plain name.
    """
    if len(name) > _LONGEST or _NAME.fullmatch(name) is None:
        raise ApiError(
            400,
            f"path {name[:80]!r} is no name inside the recording directory; use letters, digits, "
            "'.', '_' and '-', folders with '/', such as path=run1/routes.jsonl",
        )
    return name


def place(directory: Path, name: str) -> Path:
    """Where the file of that name goes; its folder is made. Touches the disk.

    Args:
        directory: absolute path of the recording directory.
        name: as :func:`check` returned it.

    Raises:
        ApiError: a link leads out of the directory, or the folder can't be made.
    """
    path = directory / check(name)
    try:
        _make_private(path.parent)
        inside = path.parent.resolve(strict=True).is_relative_to(directory.resolve(strict=True))
    except OSError as error:
        raise ApiError(
            503, f"recording directory {path.parent}: {error.strerror}; set VLLM_LOG_MOE_DIR"
        ) from None
    if not inside:
        raise ApiError(400, f"path {name!r} leads out of the recording directory")
    return path


def _make_private(folder: Path) -> None:
    """Make the folder and those above it that are missing, for their owner only."""
    missing = [item for item in (folder, *folder.parents) if not item.exists()]
    for item in reversed(missing):
        item.mkdir(mode=0o700, exist_ok=True)


def fresh(mode: str) -> str:
    """A name that was not used before: the mode and the time, in UTC and to the millisecond."""
    return f"{mode}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}"[:-3] + ".jsonl"


def numbered(name: str, number: int) -> str:
    """``a/x.jsonl`` -> ``a/x.2.jsonl``: what a recording goes on in after a reset."""
    path = Path(name)
    return str(path.with_name(f"{path.stem}.{number}{path.suffix}"))


def relative(directory: str, path: str | None) -> str | None:
    """The path as a client would name it, where it lies in the directory."""
    if path is None:
        return None
    try:
        return str(Path(path).relative_to(directory))
    except ValueError:
        return path
