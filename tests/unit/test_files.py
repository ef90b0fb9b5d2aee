# SPDX-License-Identifier: Apache-2.0
"""Files appear whole or not at all, and replace nothing without being told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from expert_profiler import files
from expert_profiler.errors import UserError


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.write(path, "ä")
    files.write(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", ["file", "folder"])
@pytest.mark.parametrize("after", ["file", "folder"])
def test_a_file_may_take_the_place_of_a_folder_and_the_other_way(
    tmp_path: Path, before: str, after: str
) -> None:
    def make(place: Path, kind: str) -> None:
        if kind == "folder":
            place.mkdir()
            place /= "part"
        place.write_text(kind)

    path = tmp_path / "x"
    make(path, before)
    with files.replacing(path) as scratch:
        make(scratch, after)
    assert (path / "part" if after == "folder" else path).read_text() == after
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there_and_no_scraps(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("mine")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as scratch:  # noqa: PT012
        scratch.mkdir()
        raise ZeroDivisionError
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_there_is_removed_already(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    files.remove(tmp_path / "none")
    files.remove(tmp_path / "file" / "below")
    assert (tmp_path / "file").is_file()


def test_a_place_without_its_folder_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*No such file"):
        files.write(tmp_path / "no" / "x", "text")


def test_a_target_is_refused_before_any_work(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("log")
    for path, force, fact in (
        (tmp_path / "no" / "x", True, "mkdir -p"),
        (tmp_path, True, "is a directory"),
        (log, True, "is the log itself"),
        (tmp_path / "x", False, "exists; replace it with --force"),
    ):
        (tmp_path / "x").write_text("mine")
        with pytest.raises(UserError, match=fact):
            files.check_free(path, force, "--out", log)
    files.check_free(tmp_path / "x", True, "--out", log)
    files.check_free(tmp_path / "free", False, "--out", log)


def test_a_folder_is_made_and_its_files_are_kept_unless_forced(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    files.prepare(folder, ["x", "y"], False, "--out")
    (folder / "y").write_text("mine")
    with pytest.raises(UserError, match=r"^y exists in .*another --out"):
        files.prepare(folder, ["x", "y"], False, "--out")
    files.prepare(folder, ["x", "y"], True, "--out")
    with pytest.raises(UserError, match="can't be made a folder"):
        files.prepare(folder / "y", ["x"], False, "--out")
