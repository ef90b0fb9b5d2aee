# SPDX-License-Identifier: Apache-2.0
"""Started and stopped at any moment, by many, in one directory."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.moe_routes.errors import ConflictError
from vllm.moe_routes.recorder import control

from tests.faults.load import Load, arm
from tests.faults.table import FULL, Row, end_of, left_out, lost, note, routes_in

pytestmark = pytest.mark.timeout(240)

TURNS = 300 if FULL else 25


def _do(runner: Any, command: str, **options: Any) -> dict[str, Any]:
    return control(SimpleNamespace(model_runner=runner), command, **options)


@pytest.mark.parametrize("on_max", ["stop", "rotate"])
def test_every_row_between_a_start_and_its_stop_is_in_that_file(
    tmp_path: Path, on_max: str
) -> None:
    """At step boundaries, as vLLM runs commands; requests go on across recordings."""
    runner = arm(tmp_path / "unused.jsonl", autostart=False, max_bytes=150_000, on_max=on_max)
    load, rng = Load(runner, tokens=12), random.Random(3)
    for turn in range(TURNS):
        path = tmp_path / f"{turn}.jsonl"
        for _ in range(rng.randrange(3)):
            load.step()
        assert _do(runner, "start", path=str(path))["ok"]
        before = load.rows
        executed = 0
        for _ in range(rng.randrange(60 if turn % 5 else 5)):
            load.step()
            if runner.moe_routes._active:  # type: ignore[union-attr]
                executed = load.rows - before
        command = rng.choice(["stop", "reset"])
        if command == "reset" and runner.moe_routes._active:  # type: ignore[union-attr]
            after = tmp_path / f"{turn}.after.jsonl"
            assert _do(runner, "reset", path=str(after))["ok"]
            old = runner.moe_routes._previous  # type: ignore[union-attr]
            while not old.closed:  # type: ignore[union-attr]
                pass
            totals = old.status()["so_far"]  # type: ignore[union-attr]
            files = old.status()["files"]  # type: ignore[union-attr]
            assert _do(runner, "stop")["ok"]
            assert end_of(after) is not None and routes_in(after) == 0
        else:
            assert _do(runner, "stop")["ok"]
            while _do(runner, "status")["closing"]:
                pass
            status = _do(runner, "status")
            totals, files = status["so_far"], status["files"]
        held = sum(routes_in(Path(name)) for name in files)
        note(
            Row(
                f"start/stop between passes, {on_max} at the bound",
                1, executed, totals["rows"], held, lost(totals), left_out(totals),
            )
        )  # fmt: skip
        assert all(end_of(Path(item)) is not None for item in files)


def test_many_who_ask_for_one_name_get_one_file(tmp_path: Path) -> None:
    """Two servers, one directory: a name is created exclusively, or refused."""
    runners = [arm(tmp_path / "unused.jsonl", autostart=False) for _ in range(4)]
    for turn in range(TURNS):
        path = str(tmp_path / f"{turn}.jsonl")
        gate = threading.Barrier(len(runners))
        answers: list[dict[str, Any]] = []

        def ask(runner: Any, path: str = path, gate: Any = gate, answers: Any = answers) -> None:
            gate.wait(30)
            answers.append(_do(runner, "start", path=path))

        threads = [threading.Thread(target=ask, args=(runner,)) for runner in runners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sum(answer["ok"] for answer in answers) == 1
        assert all(answer["ok"] or answer["conflict"] for answer in answers)
        for runner in runners:
            if runner.moe_routes._active:  # type: ignore[union-attr]
                Load(runner).step()
                assert _do(runner, "stop")["ok"]
        assert end_of(Path(path)) is not None


def test_a_log_that_exists_is_a_conflict(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("precious")
    with pytest.raises(ConflictError, match="exists"):
        arm(path)
    assert path.read_text() == "precious"


def test_an_error_in_the_model_is_counted_and_the_log_goes_on(tmp_path: Path) -> None:
    """vLLM's engine dies of it, and then its worker is shut down."""
    path = tmp_path / "x.jsonl"
    runner = arm(path)
    load = Load(runner)
    for _ in range(5):
        load.step()
    forward = runner.forward

    def fails(n: int) -> list[list[int]]:
        forward(n)
        raise RuntimeError("an illegal memory access was encountered")

    runner.forward = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        runner.execute(("x-0000000a", 3, 3))
    runner.moe_routes.shutdown()  # type: ignore[union-attr]
    end = end_of(path)
    assert end is not None and end["reason"] == "shutdown"
    held = routes_in(path)
    note(Row("exception in the model", 1, load.rows, end["rows"], held, lost(end)))
    assert end["passes_unfinished"] == 1
    assert end["self_check"]["verdict"] == "fail"
    failed = [c["detail"] for c in end["self_check"]["checks"] if c["verdict"] == "fail"]
    assert failed == ["1 passes began and raised an error"]


def test_an_error_in_the_recorder_is_counted_and_the_engine_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    runner = arm(path)
    load = Load(runner)
    for _ in range(5):
        load.step()
    while not _do(runner, "status")["so_far"]["rows"]:
        time.sleep(0.01)  # what waits when the error comes may be lost

    def exhausted(*_: Any) -> None:
        raise MemoryError("no pinned memory left")

    runner.moe_routes._recording._choices.routes = exhausted  # type: ignore[union-attr, method-assign]
    for _ in range(5):
        load.step()
    assert _do(runner, "stop")["ok"] is False
    end = end_of(path)
    assert end is not None and "no pinned memory left" in end["error"]
    note(Row("exception in the recorder", 1, load.rows, end["rows"], routes_in(path), lost(end)))
    assert end["rows"] > 0
