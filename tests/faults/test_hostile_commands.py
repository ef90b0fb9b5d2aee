"""Every command line of the project, given words that nobody meant: one line, and soon."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import make_hist
from expert_profiler import compare, convert, errors, export, sql, validate
from expert_profiler.commands import bench, patch, preflight, profile
from expert_profiler.commands import models as models_command
from expert_profiler.patch import patch_state
from expert_profiler.run import engine, hub, machine, tiny_model
from tests.faults.table import FULL
from tests.support import logs
from tests.support.build import QUICK
from tools import make_tiny_moe

pytestmark = pytest.mark.timeout(900)

Main = Callable[[list[str]], int]


class TooFar(BaseException):
    """A command got past its checks; what it would do next takes minutes."""


def _heavy(*_: Any, **__: Any) -> Any:
    raise TooFar


def _benchmark(words: list[str]) -> int:
    bench.parse(words, "")
    return 0


#: Of every command, its entry and options that lead far into it. LOG is a sound log, OUT a folder
#: that is there, FREE a name that is not.
COMMANDS: dict[str, tuple[Main, list[str]]] = {
    "validate": (validate.main, ["--dir", "OUT", "--routes", "LOG", "--prompts", "--timing"]),
    "sql": (sql.main, ["LOG", "SELECT 1", "SELECT * FROM routes"]),
    "convert": (convert.main, ["LOG", "FREE.parquet", "FREE.jsonl", "--force"]),
    "make_hist": (
        make_hist.main,
        ["LOG", "--out", "FREE.png", "--layer", "0", "--report", "FREE", "--outputs",
         "--tokenizer", "OUT", "--include-flagged"],
    ),
    "compare": (
        compare.main,
        ["LOG", "LOG", "--out", "FREE", "--names", "a,b", "--phase", "all", "prefill", "gptq"],
    ),
    "export": (
        export.main,
        ["LOG", "--format", "hot", "npz", "eplb", "sglang", "--out", "FREE.npz", "FREE.json",
         "FREE.npy", "FREE.pt", "--steps", "--num-layers", "--top", "1"],
    ),
    "model_sizes": (models_command.main, ["--gib", "16", "0", "1e308"]),
    "preflight": (preflight.main, ["--model", "OUT", "demo", "--brief"]),
    "apply_patch": (
        patch.main,
        ["apply", "check", "revert", "--root", "OUT", "--patch", "LOG"],
    ),
    "run_profile": (
        profile.main,
        ["--model", "demo", "OUT", "--mode", "log", "both", "--out", "FREE", "--prompts", "LOG",
         "--max-tokens", "8", "--layers", "0,3-5", "all", "--repeats", "--temperature", "--seed",
         "--tensor-parallel-size", "2", "--max-model-len", "--dtype", "--no-enforce-eager"],
    ),
    "benchmarks.overhead": (_benchmark, ["--quick", "--model", "OUT", "--out", "--pairs"]),
    "make_tiny_moe": (
        make_tiny_moe.main,
        ["FREE", "--layers", "--experts", "--top-k", "--hidden", "--seed", "--force", "--reuse"],
    ),
}  # fmt: skip

# Whoever runs this may be root: no name here leads out of the ground, but to what nobody can write.
strangers = st.one_of(
    st.text(max_size=12).map(lambda text: text.replace("/", "|")),
    st.sampled_from([
        "-1", "0", "1", "3", "1e400", "nan", "inf", "-inf", "99999999999999999999", "9" * 5000,
        "--", "-", "", " ", "..", ".", "/proc", "/proc/self/mem", "/proc/self/fd", "x" * 5000,
        "a/" * 3000, "\udcff", "a\nb", "\x1b[31m", "<script>", "'; DROP TABLE routes; --",
        "--help", "--force", "--no-such-option", "-x", "=", "--out=", "٣", "½", "0-99999999999",
        "LOG", "OUT", "FREE",
    ]),
)  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to make a mess of, which commands that name none find themselves in."""
    folder = tmp_path_factory.mktemp("ground")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture
def harmless(monkeypatch: pytest.MonkeyPatch, ground: Path) -> Path:
    """No engine, no hub, no checkpoint of gigabytes, and no vLLM to change but an empty one."""
    monkeypatch.setattr(engine, "quiet", _heavy)
    monkeypatch.setattr(compare.subprocess, "run", _heavy)
    monkeypatch.setattr(tiny_model, "build", _heavy)
    monkeypatch.setattr(hub, "answer", lambda path: None)
    monkeypatch.setattr(machine, "gpus", list)
    find = patch_state.find_target
    monkeypatch.setattr(
        patch_state, "find_target", lambda root=None, **k: find(root if root else ground, **k)
    )
    return ground


def _lay_out(ground: Path) -> dict[str, str]:
    """LOG and OUT, made where an earlier command line has broken them; FREE is free."""
    log, out = ground / "log" / "x.jsonl", ground / "out"
    log.parent.mkdir(exist_ok=True)
    logs.write_log(log, logs.run_rows())
    out.mkdir(exist_ok=True)
    number = len(list(ground.iterdir()))
    return {"LOG": str(log), "OUT": str(out), "FREE": str(ground / f"free-{number}")}


def _filled(word: str, places: dict[str, str]) -> str:
    for name, path in places.items():
        word = word.replace(name, path)
    return word


def run_command(main: Main, words: list[str]) -> tuple[Any, str, str]:
    """(exit code, output, errors); code 0 where it was about to do what takes minutes."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = errors.run(lambda: main(words))
        except SystemExit as end:  # argparse
            code = end.code
        except TooFar:
            code = 0
    return code, out.getvalue(), err.getvalue()


def check_answer(words: list[str], code: Any, out: str, err: str) -> None:
    assert code in (0, 1, 2), code
    assert "Traceback" not in err
    if "check" in words and out.startswith("state:"):
        return  # apply_patch.sh check: its exit code is the state
    told = [line for line in err.splitlines() if "error:" in line]
    if code == 2:
        assert len(told) == 1, err[-2000:]
        assert len(told[0]) < 2_000 + 5 * sum(map(len, words)), "no longer than what it is about"
        # What argparse repeats of the words themselves may have line ends in it; nothing else does.
        assert err.count("error:") == 1 or "usage:" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_any_command_line_is_answered_in_a_line(command: str, harmless: Path) -> None:
    main, known = COMMANDS[command]

    @settings(
        QUICK,
        max_examples=600 if FULL else 25,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(
        words=st.lists(st.one_of(strangers, st.sampled_from(known)), max_size=6),
        as_told=st.booleans(),
    )
    def check(words: list[str], as_told: bool) -> None:
        places = _lay_out(harmless)
        given = [*(_well_meant(command) if as_told else []), *words]
        # No command line holds a NUL.
        line = [_filled(word, places) for word in given if "\0" not in word]
        code, out, err = run_command(main, line)
        try:
            check_answer(line, code, out, err)
        except AssertionError as error:
            raise AssertionError(f"{command} {shlex.join(line)[:500]!r}: {error}") from error

    check()


def test_a_plot_or_an_export_never_takes_the_place_of_what_is_no_file(ground: Path) -> None:
    """Such as /dev/null, for somebody who may do that."""
    places = _lay_out(ground)
    pipe = ground / "pipe.npz"
    os.mkfifo(pipe)
    for main, words in (
        (make_hist.main, [places["LOG"], "--out", str(pipe), "--force"]),
        (export.main, [places["LOG"], "--format", "npz", "--out", str(pipe), "--force"]),
    ):
        code, _, err = run_command(main, words)
        assert code == 2 and "is no plain file" in err
    assert pipe.is_fifo()


@pytest.mark.parametrize("main", [convert.main, export.main, make_hist.main, make_tiny_moe.main])
@pytest.mark.parametrize("words", [["--", "--"], ["LOG", "--", "--"], ["--", "--", "--"]])
def test_words_that_end_the_options_are_no_names(
    main: Main, words: list[str], harmless: Path
) -> None:
    places = _lay_out(harmless)
    line = [_filled(word, places) for word in words]
    code, out, err = run_command(main, line)
    check_answer(line, code, out, err)


def _well_meant(command: str) -> list[str]:
    """What the command needs to get past its parser."""
    return {
        "make_hist": ["LOG", "--out", "FREE.png"],
        "compare": ["LOG", "LOG", "--out", "FREE"],
        "export": ["LOG", "--format", "hot", "--out", "FREE.json"],
        "convert": ["LOG", "FREE.parquet"],
        "sql": ["LOG"],
        "validate": ["--routes", "LOG"],
        "make_tiny_moe": ["FREE"],
        "run_profile": ["--model", "demo", "--out", "FREE"],
    }.get(command, [])
