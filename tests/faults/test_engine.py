"""Faults beside a real engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expert_profiler.run.tiny_model import TinyMoeSpec, build
from tests.faults.table import FULL, Row, check_cut, end_of, lost, note, routes_in
from tests.support import harness
from tests.support.paths import REPO

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

LAYERS = 4
ENDINGS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "shallow"
    build(folder, TinyMoeSpec(layers=LAYERS))
    return folder


@pytest.fixture(scope="module")
def engines() -> Iterator[harness.Engines]:
    running = harness.Engines()
    yield running
    running.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that a short generation fills."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can't be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_an_engine_on_a_full_disk_generates_on(
    engines: harness.Engines, model: Path, small_disk: Path, tmp_path: Path
) -> None:
    log = small_disk / "x.jsonl"
    sampling = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    prompts = [f"Question {i}: how many rolls does a baker sell?" for i in range(8)]
    steps: list[dict[str, Any]] = [
        {"generate": prompts, "sampling": sampling},
        {"rpc": "status"},
        {"rpc": "stop"},
        {"rpc": "start", "options": {"path": str(tmp_path / "second.jsonl")}},
        {"generate": prompts, "sampling": sampling},
        {"rpc": "stop"},
    ]
    settings = {
        "model": str(model), "dtype": "float32", "max_model_len": 512, "enforce_eager": True,
        "enable_prefix_caching": False, "seed": 1,
    }  # fmt: skip
    env = {"VLLM_LOG_MOE": str(log), "VLLM_LOG_MOE_FLUSH_SECONDS": "0.05"}
    first, status, [stopped], [started], second, _ = engines.run(
        tmp_path / "run", settings, steps, env=env
    )
    del status
    assert stopped["ok"] is False and "No space left on device" in stopped["error"]
    assert started["ok"], started
    tokens = [
        sum(len(o["prompt_token_ids"]) + len(o["token_ids"]) - 1 for o in run["outputs"])
        for run in (first, second)
    ]
    assert [o["token_ids"] for o in first["outputs"]] == [o["token_ids"] for o in second["outputs"]]
    end = end_of(log)
    assert end is not None and end["reason"] == "error"
    note(
        Row("real engine, disk full", 1, tokens[0] * LAYERS, end["rows"], routes_in(log), lost(end))
    )
    sound = end_of(tmp_path / "second.jsonl")
    assert sound is not None and sound["rows"] == tokens[1] * LAYERS


def _victim(model: Path, log: Path, how: str, seconds: float) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.engine_victim", str(model), str(log), how,
         str(seconds)],
        cwd=REPO,
        env={k: v for k, v in os.environ.items() if not k.startswith("VLLM_LOG_MOE")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=900,
    )  # fmt: skip
    [ended] = re.findall(r"ended (\d+\.\d+)", done.stdout)  # the engine prints there too
    return float(ended)


@pytest.mark.skipif(not FULL, reason="starts engines; python -m tests.faults.full runs it")
def test_an_engine_that_vllm_shuts_down_under_load_ends_its_log(
    model: Path, tmp_path: Path
) -> None:
    for i in range(ENDINGS):
        log = tmp_path / f"{i}.jsonl"
        seconds = _victim(model, log, "shutdown", 0.37 * i)
        end = end_of(log)
        assert end is not None, f"no end record; vLLM gave it {seconds:.1f} s"
        assert end["reason"] == "shutdown"
        held = routes_in(log)
        note(
            Row(
                "real engine, SIGTERM under load", 1, held + lost(end), end["rows"], held, lost(end)
            )
        )
        assert lost(end) == 0
        assert end["passes_unfinished"] <= 1


@pytest.mark.skipif(not FULL, reason="starts engines; python -m tests.faults.full runs it")
def test_an_engine_that_is_killed_leaves_what_was_flushed(model: Path, tmp_path: Path) -> None:
    for i in range(ENDINGS):
        log = tmp_path / f"{i}.jsonl"
        _victim(model, log, "kill", 0.37 * i)
        check_cut(log, 1, LAYERS)


@pytest.mark.skipif(not FULL, reason="starts engines; python -m tests.faults.full runs it")
@pytest.mark.parametrize("where", ["here", "core"])
def test_an_engine_whose_model_raises_dies_of_it_and_ends_its_log(
    model: Path, tmp_path: Path, where: str
) -> None:
    """In the caller's process, and in one of its own; the rows of the pass that raised are none."""
    log = tmp_path / "x.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.engine_raises", str(model), str(log), where],
        cwd=REPO,
        env={k: v for k, v in os.environ.items() if not k.startswith("VLLM_LOG_MOE")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    said = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    cause = "illegal memory access" if where == "here" else "EngineDeadError"
    assert cause in said["told"], "the caller gets the model's error, as without a recorder"
    end = end_of(log)
    assert end is not None and end["reason"] == "shutdown"
    held = routes_in(log)
    executed = said["tokens"] * LAYERS
    note(Row("real engine, exception in the model", 1, executed, end["rows"], held, lost(end)))
    assert held == executed, "every pass before it"
    assert end["passes_unfinished"] == 1
    failed = [c["detail"] for c in end["self_check"]["checks"] if c["verdict"] == "fail"]
    assert failed == ["1 passes began and raised an error"]
