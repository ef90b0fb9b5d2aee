# SPDX-License-Identifier: Apache-2.0
"""A line that a command prints as the next one works where it is printed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from expert_profiler import resources


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an environment's programs, which is this Python's, with the script in it."""
    folder = tmp_path / "a project" / ".venv" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    script = folder / "expert-profiler"
    script.touch()
    script.chmod(0o755)
    return folder


def test_below_the_current_folder_it_goes_by_its_path(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(environment.parents[1])
    monkeypatch.setenv("PATH", str(environment))
    assert resources.program() == ".venv/bin/expert-profiler"


def test_elsewhere_it_goes_by_its_name_where_the_shell_finds_it(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resources.program() == f"'{environment}/expert-profiler'"
    monkeypatch.setenv("PATH", str(environment))
    assert resources.program() == "expert-profiler"


def test_without_the_script_it_is_the_module(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (environment / "expert-profiler").unlink()
    monkeypatch.chdir(tmp_path)
    python = f"'{environment}/python' -m expert_profiler"
    assert resources.program() == f"PYTHONPATH={resources.ROOT} {python}"
    monkeypatch.chdir(resources.ROOT)
    assert resources.program() == python
