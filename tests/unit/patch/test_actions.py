# SPDX-License-Identifier: Apache-2.0
"""Apply and revert: nothing is half done, everything can be undone."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expert_profiler.errors import UserError
from expert_profiler.patch import actions, file_changes, patch_state
from expert_profiler.patch.patch_state import State
from tests.support.patch_kit import (
    ADDED,
    PATCHED,
    VERSION,
    WHEEL,
    Wheel,
    make_wheel,
    snapshot,
    state_of,
)


def test_apply_gives_the_patched_files_and_revert_the_wheel(wheel: Wheel) -> None:
    before = snapshot(wheel.outer)
    assert actions.apply(wheel.root, wheel.patch).state is State.APPLIED
    for path, content in {**WHEEL, **PATCHED, **ADDED}.items():
        assert wheel.read(path) == content
    assert actions.revert(wheel.root, wheel.patch).state is State.PRISTINE
    assert snapshot(wheel.outer) == before


def test_apply_touches_only_the_files_of_the_patch(wheel: Wheel) -> None:
    before = snapshot(wheel.outer)
    actions.apply(wheel.root, wheel.patch)
    after = snapshot(wheel.outer)
    prefix = wheel.root.relative_to(wheel.outer).as_posix() + "/"
    differing = {p.removeprefix(prefix) for p in after if after[p] != before.get(p)}
    assert differing == {*PATCHED, *ADDED, "vllm/routes", "vllm/routes/formats"}
    assert before.keys() <= after.keys()


def test_every_step_can_be_repeated(wheel: Wheel) -> None:
    before = snapshot(wheel.outer)
    assert actions.apply(wheel.root, wheel.patch).did
    applied = snapshot(wheel.outer)
    inodes = {p: (wheel.root / p).stat().st_ino for p in PATCHED}
    assert not actions.apply(wheel.root, wheel.patch).did
    assert snapshot(wheel.outer) == applied
    assert {p: (wheel.root / p).stat().st_ino for p in PATCHED} == inodes
    assert patch_state.inspect(wheel.root, wheel.patch).exit_code == 0
    assert actions.revert(wheel.root, wheel.patch).did
    assert not actions.revert(wheel.root, wheel.patch).did
    assert snapshot(wheel.outer) == before
    assert patch_state.inspect(wheel.root, wheel.patch).exit_code == 1
    assert actions.apply(wheel.root, wheel.patch).did
    assert snapshot(wheel.outer) == applied


def test_other_hard_links_keep_the_old_content(wheel: Wheel, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for number, path in enumerate(PATCHED):
        os.link(wheel.root / path, cache / str(number))
    actions.apply(wheel.root, wheel.patch)
    for number, path in enumerate(PATCHED):
        assert (cache / str(number)).read_bytes() == WHEEL[path]
    actions.revert(wheel.root, wheel.patch)
    assert len(list(cache.iterdir())) == len(PATCHED)


def test_a_symbolic_link_is_replaced_and_its_target_kept(wheel: Wheel, tmp_path: Path) -> None:
    target = tmp_path / "cached.py"
    target.write_bytes(WHEEL["vllm/envs.py"])
    wheel.remove("vllm/envs.py")
    (wheel.root / "vllm/envs.py").symlink_to(target)
    actions.apply(wheel.root, wheel.patch)
    assert target.read_bytes() == WHEEL["vllm/envs.py"]
    assert wheel.read("vllm/envs.py") == PATCHED["vllm/envs.py"]


def test_mode_bits_survive(wheel: Wheel) -> None:
    (wheel.root / "vllm/envs.py").chmod(0o750)
    actions.apply(wheel.root, wheel.patch)
    assert (wheel.root / "vllm/envs.py").stat().st_mode & 0o777 == 0o750
    actions.revert(wheel.root, wheel.patch)
    assert (wheel.root / "vllm/envs.py").stat().st_mode & 0o777 == 0o750


def test_revert_removes_byte_code_of_its_own_files_only(wheel: Wheel) -> None:
    wheel.write({"vllm/__pycache__/envs.cpython-311.pyc": b"stays"})
    before = snapshot(wheel.root)
    actions.apply(wheel.root, wheel.patch)
    wheel.write(
        {
            "vllm/routes/__pycache__/__init__.cpython-311.pyc": b"",
            "vllm/routes/__pycache__/core.cpython-311.opt-1.pyc": b"",
            "vllm/routes/__pycache__/renamed_since.cpython-311.pyc": b"",
            "vllm/routes/formats/__pycache__/text.cpython-311.pyc": b"",
        }
    )
    actions.revert(wheel.root, wheel.patch)
    assert snapshot(wheel.root) == before


def test_revert_keeps_a_file_that_somebody_else_put_into_our_folder(wheel: Wheel) -> None:
    actions.apply(wheel.root, wheel.patch)
    wheel.write({"vllm/routes/notes.txt": b"mine", "vllm/routes/__pycache__/core.x.pyc": b""})
    actions.revert(wheel.root, wheel.patch)
    assert sorted(p.name for p in (wheel.root / "vllm/routes").rglob("*")) == ["notes.txt"]


# ---- all or nothing ----------------------------------------------------------


def _breaking(number: int, real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """``real``, but call ``number`` (from 0) raises instead."""
    calls = iter(range(10**6))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise error
        return real(*args, **kwargs)

    return wrapped


FULL = OSError(errno.ENOSPC, "No space left on device")
DENIED = PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("action", [actions.apply, actions.revert])
@pytest.mark.parametrize(
    ("owner", "name", "most"),
    [
        (Path, "replace", 6),
        (Path, "unlink", 40),
        (Path, "mkdir", 2),
        (os, "open", 8),
        (os, "fsync", 6),
        (file_changes, "_keep", 6),
    ],
)
@pytest.mark.parametrize("error", [FULL, DENIED, KeyboardInterrupt()], ids=["full", "denied", "^C"])
def test_a_failure_at_any_step_changes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: Callable[..., patch_state.Report],
    owner: Any,
    name: str,
    most: int,
    error: BaseException,
) -> None:
    wheel = make_wheel(tmp_path)
    wheel.dist_info("vllm", VERSION)
    pristine = snapshot(wheel.outer)
    actions.apply(wheel.root, wheel.patch)
    start, end, opposite = snapshot(wheel.outer), pristine, actions.apply
    if action is actions.apply:
        opposite = actions.revert
        actions.revert(wheel.root, wheel.patch)
        start, end = end, start
    failures = 0
    for number in range(most):
        with monkeypatch.context() as context:
            context.setattr(owner, name, _breaking(number, getattr(owner, name), error))
            try:
                action(wheel.root, wheel.patch)
            except (UserError, KeyboardInterrupt, OSError):
                failures += 1
        if snapshot(wheel.outer) != start:
            # It came too late to matter (or never): all is done, and a working
            # file that is left is removed by the next run.
            action(wheel.root, wheel.patch)
            assert snapshot(wheel.outer) == end
            opposite(wheel.root, wheel.patch)
            assert snapshot(wheel.outer) == start
    assert failures or (name, action) == ("mkdir", actions.revert)


def test_a_write_that_fails_midway_is_rolled_back_and_reported(
    wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(wheel.outer)
    inodes = {p: (wheel.root / p).stat().st_ino for p in PATCHED}
    # The three added files and the first hook are in place when the fifth write fails.
    monkeypatch.setattr(Path, "replace", _breaking(4, Path.replace, DENIED))
    with pytest.raises(UserError) as caught:
        actions.apply(wheel.root, wheel.patch)
    assert re.fullmatch(
        rf"cannot write {wheel.root}/vllm/worker/\w+\.py: Permission denied; "
        r"nothing was changed; run it as a user who may write there",
        str(caught.value),
    )
    assert snapshot(wheel.outer) == before
    assert {p: (wheel.root / p).stat().st_ino for p in PATCHED} == inodes


def test_a_roll_back_that_fails_says_so(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Path.replace, iter(range(100))

    def failing(self: Path, target: Path) -> Path:
        if next(calls) >= 4:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return real(self, target)

    with monkeypatch.context() as context:
        context.setattr(Path, "replace", failing)
        with pytest.raises(UserError, match="so did undoing it"):
            actions.apply(wheel.root, wheel.patch)
    # Whatever that left, it is repaired by the next run.
    assert actions.revert(wheel.root, wheel.patch).state is State.PRISTINE
    assert not [p for p in wheel.root.rglob("*") if "moe-logger" in p.name]


def test_what_a_killed_run_left_is_removed_by_the_next(wheel: Wheel) -> None:
    before = snapshot(wheel.root)
    wheel.write({"vllm/.envs.py.moe-logger-new": b"torn", "vllm/.envs.py.moe-logger-old": b"x"})
    wheel.write({"vllm/envs.py": PATCHED["vllm/envs.py"]})
    actions.revert(wheel.root, wheel.patch)
    assert snapshot(wheel.root) == before


def test_hard_links_that_the_disk_cannot_make_are_copies(
    wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(wheel.root)

    def unsupported(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    actions.apply(wheel.root, wheel.patch)
    actions.revert(wheel.root, wheel.patch)
    assert snapshot(wheel.root) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_environment_is_one_line(wheel: Wheel) -> None:
    (wheel.root / "vllm").chmod(0o555)
    try:
        with pytest.raises(UserError, match="Permission denied; nothing was changed"):
            actions.apply(wheel.root, wheel.patch)
    finally:
        (wheel.root / "vllm").chmod(0o755)


def test_two_at_once_do_not_disturb_each_other(wheel: Wheel) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            actions.apply(wheel.root, wheel.patch)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert state_of(wheel) is State.APPLIED
