# SPDX-License-Identifier: Apache-2.0
"""One door: every command is listed, says what it does and what comes next."""

from __future__ import annotations

import subprocess
import sys

import pytest

import expert_profiler
from expert_profiler import commands, errors
from tests.support.paths import REPO


def test_the_help_lists_every_command_and_says_what_it_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert commands.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in commands.NAMES:
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {name} ")]
        assert len(line.split()) > 3, line
    assert "next: " in text
    assert commands.main([]) == 0
    assert capsys.readouterr().out == text


def test_the_table_is_the_folder() -> None:
    folder = REPO / "expert_profiler" / "commands"
    assert sorted(commands.NAMES) == sorted(p.stem for p in folder.glob("[!_]*.py"))


@pytest.mark.parametrize("name", commands.NAMES)
def test_the_help_of_a_command_ends_with_the_next_step(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: expert-profiler {name} ")
    assert "next: " in text


@pytest.mark.parametrize(
    "words",
    [
        ["profile", "--model", "./none", "--max-tokens", "0"],
        ["export", "x.jsonl", "--format", "hot", "--out", "x.csv", "--top", "-1"],
        ["bench", "--model", "./none", "--pairs", "0"],
    ],
)
def test_a_number_of_things_is_positive(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.main(words)
    assert ended.value.code == errors.EXIT_CODE
    assert f"{words[-1]} is not positive" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "meant"),
    [("profil", "did you mean profile? "), ("histogram", "did you mean hist? "), ("x", "")],
)
def test_an_unknown_command_is_told_with_the_closest(
    word: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert errors.run(lambda: commands.main([word])) == errors.EXIT_CODE
    told = capsys.readouterr().err
    assert told == f"error: unknown command {word}; {meant}run: expert-profiler --help\n"


def test_the_version_stands_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["--version"]) == 0
    assert capsys.readouterr().out == f"expert-profiler {expert_profiler.__version__}\n"
    project = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project and expert_profiler.__version__ not in project


@pytest.mark.parametrize("words", [["--help"], ["patch", "--help"], ["preflight", "--help"]])
def test_it_opens_where_nothing_is_installed(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "expert_profiler", *words],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: expert-profiler ")


@pytest.mark.parametrize(
    ("package", "in_checkout", "remedy"),
    [
        ("duckdb", True, "run with .venv/bin/python, which ./test.sh makes"),
        ("datasets", False, "run: pip install 'vllm-expert-profiler[profile]'"),
        ("vllm", False, "run: pip install 'vllm-expert-profiler[cuda]' (or [cpu] without a GPU)"),
    ],
)
def test_a_missing_package_is_one_line_with_the_remedy_that_fits(
    package: str,
    in_checkout: bool,
    remedy: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def needs_it() -> int:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(errors, "IN_CHECKOUT", in_checkout)
    assert errors.run(needs_it) == errors.EXIT_CODE
    told = capsys.readouterr().err
    assert told.startswith(f"error: package {package} is not installed for ")
    assert told.endswith(f"; {remedy}\n")
