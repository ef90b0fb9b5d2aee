"""What the modes do beside the pass that works: errors, waiting, and who may start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.moe_routes import recorder as module
from vllm.moe_routes.config import MODES, RouteLogConfig
from vllm.moe_routes.recorder import Recorder, control
from vllm.moe_routes.recording import provenance

from tests.support.build import read_lines
from tests.support.fake_runner import FakeRunner, group

pytestmark = pytest.mark.timeout(60)

Arm = Callable[..., FakeRunner]


@pytest.fixture
def arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Arm]:
    """A runner whose recorder is armed by the API: nothing recorded yet."""
    monkeypatch.setattr(module, "get_pp_group", group())
    monkeypatch.setattr(module, "get_tp_group", group())
    monkeypatch.setattr(provenance, "patch_id", lambda: "0123abcd")
    armed: list[FakeRunner] = []

    def arm(**switches: Any) -> FakeRunner:
        runner = FakeRunner()
        runner.moe_routes = Recorder(RouteLogConfig(None, api=True, **switches), runner)
        armed.append(runner)
        return runner

    yield arm
    for runner in armed:
        assert runner.moe_routes is not None
        runner.moe_routes.shutdown()


def do(runner: FakeRunner, command: str, **options: Any) -> dict[str, Any]:
    return control(SimpleNamespace(model_runner=runner), command, **options)


def begin(runner: FakeRunner, mode: str, folder: Path) -> None:
    do(runner, "configure", mode=mode)
    path = None if mode == "stat" else str(folder / f"{mode}.jsonl")
    assert do(runner, "start", path=path)["ok"]


@pytest.mark.parametrize("mode", MODES)
def test_warm_up_never_counts(arm: Arm, tmp_path: Path, mode: str) -> None:
    runner = arm()
    runner.dummy_run()
    begin(runner, mode, tmp_path)
    runner.dummy_run()
    runner.execute(("7-0000000a", 3, 3))
    runner.dummy_run()
    status = do(runner, "stop")
    assert status["so_far"]["rows"] == 3 * 3
    assert status["self_check"]["verdict"] == "pass"


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_falls_silent_is_lost_rows_in_every_mode(
    arm: Arm, tmp_path: Path, mode: str
) -> None:
    runner = arm()
    begin(runner, mode, tmp_path)
    runner.execute(("7-0000000a", 3, 3))
    runner.layers["model.layers.3.mlp.experts"].moe_route_tap = None
    runner.execute(("8-0000000b", 2, 2))
    status = do(runner, "stop")
    assert status["so_far"]["rows"] == 3 * 3 + 2 * 2
    assert status["so_far"]["drops"]["not_captured"] == 2
    assert status["self_check"]["verdict"] == "fail"


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_that_raised_fails_the_check_in_every_mode(
    arm: Arm, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = arm()
    begin(runner, mode, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "forward", lambda n: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.execute(("7-0000000a", 3, 3))
    runner.execute(("8-0000000b", 2, 2))
    status = do(runner, "stop")
    assert status["so_far"]["passes_unfinished"] == 1
    assert status["self_check"]["verdict"] == "fail"


def test_a_pass_that_can_not_be_counted_stops_nothing_and_is_told(arm: Arm, tmp_path: Path) -> None:
    runner = arm()
    begin(runner, "stat", tmp_path)
    recording = runner.moe_routes._recording  # type: ignore[union-attr]
    add = recording._totals.add  # type: ignore[union-attr]

    def exhausted(*_: Any) -> None:
        raise MemoryError("no memory for indices")

    recording._totals.add = exhausted  # type: ignore[union-attr]
    runner.execute(("7-0000000a", 3, 3))
    recording._totals.add = add  # type: ignore[union-attr]
    runner.execute(("8-0000000b", 2, 2))
    status = do(runner, "stop")
    assert "no memory for indices" in status["error"]
    assert status["so_far"]["tokens"]["prefill"] == 2
    assert status["self_check"]["verdict"] == "fail"


def test_a_narrowed_recording_copies_its_own_layers(arm: Arm, tmp_path: Path) -> None:
    runner = arm()
    do(runner, "configure", mode="per_token", layers="4")
    do(runner, "start", path=str(tmp_path / "x.jsonl"))
    runner.execute(("7-0000000a", 3, 3))
    do(runner, "stop")
    meta, *rows, _, end = read_lines(tmp_path / "x.jsonl")
    assert meta["layers_logged"] == [4] and [item["layer"] for item in meta["layers"]] == [4]
    assert {row["layer"] for row in rows} == {4}
    assert end["rows"] == 3


def test_nothing_starts_while_the_recording_before_is_being_written(
    arm: Arm, tmp_path: Path
) -> None:
    runner = arm()
    begin(runner, "per_token", tmp_path)
    runner.execute(("7-0000000a", 3, 3))
    gate = threading.Event()
    sink = runner.moe_routes._recording._sink  # type: ignore[union-attr]
    close = sink.close
    sink.close = lambda reason: (gate.wait(30), close(reason))  # a slow disk
    status = do(runner, "stop", timeout=0)
    assert status["ok"] and status["closing"] and not status["recording"]
    refused = do(runner, "start", path=str(tmp_path / "y.jsonl"))
    assert (refused["ok"], refused["conflict"]) == (False, True)
    assert not (tmp_path / "y.jsonl").exists()
    gate.set()
    while do(runner, "status")["closing"]:
        pass
    assert do(runner, "start", path=str(tmp_path / "y.jsonl"))["ok"]


def test_a_reset_that_can_not_open_its_file_leaves_the_recording_as_it_is(
    arm: Arm, tmp_path: Path
) -> None:
    runner = arm()
    begin(runner, "per_token", tmp_path)
    runner.execute(("7-0000000a", 3, 3))
    assert do(runner, "reset", path=str(tmp_path / "per_token.jsonl"))["conflict"]
    runner.execute(("8-0000000b", 2, 2))
    assert do(runner, "stop")["so_far"]["rows"] == 5 * 3


@pytest.mark.parametrize(
    ("command", "options", "told"),
    [
        ("configure", {"mode": "all"}, "unknown mode 'all'"),
        ("configure", {"mode": "per_pass", "path": "x.parquet"}, "does not end in .jsonl"),
        ("configure", {"layers": "2"}, "layer 2 is no MoE layer"),
        ("start", {}, "writes a file; name it with path="),
        ("dump", {"records": 1}, "unexpected keyword argument"),
    ],
)
def test_a_command_that_can_not_be_done_is_answered(
    arm: Arm, command: str, options: dict[str, Any], told: str
) -> None:
    runner = arm(mode="per_token")
    answer = do(runner, command, **options)
    assert not answer["ok"] and told in answer["error"]
    assert not do(runner, "status")["recording"]


def test_stat_takes_no_file(arm: Arm, tmp_path: Path) -> None:
    answer = do(arm(mode="stat"), "start", path=str(tmp_path / "x.jsonl"))
    assert "writes no file" in answer["error"]
