# SPDX-License-Identifier: Apache-2.0
"""The recorder on a stand-in for the model runner: real passes, and what it is told to do."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from vllm.config import CompilationMode
from vllm.forward_context import DPMetadata, ForwardContext, override_forward_context
from vllm.moe_routes import recorder as module
from vllm.moe_routes.config import RouteLogConfig
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.recorder import attach, shutdown
from vllm.moe_routes.writing.token_log import TokenLog
from vllm.sampling_params import SamplingParams

from tests.support.build import read_lines
from tests.support.commands import do
from tests.support.fake_runner import INDICES, FakeRunner, group

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("_one_rank")]

EOS = 9


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "x.jsonl"


@pytest.fixture
def arm(log: Path, give_recorder: Callable[..., FakeRunner]) -> Callable[..., FakeRunner]:
    """Make a runner with a recorder that waits for ``start``."""

    def arm(runner: FakeRunner | None = None, **switches: Any) -> FakeRunner:
        config = dataclasses.replace(RouteLogConfig(log, autostart=False), **switches)
        return give_recorder(runner or FakeRunner(), config)

    return arm


def _all_routes(log: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(log) if line["type"] == "route"]


def _routes(log: Path, layer: int = INDICES[0]) -> list[dict[str, Any]]:
    return [line for line in read_lines(log) if line["type"] == "route" and line["layer"] == layer]


Arm = Callable[..., FakeRunner]

# ---- off -----------------------------------------------------------------------------------


def test_without_the_switch_there_is_no_recorder_and_no_tap() -> None:
    runner = FakeRunner()
    assert attach(runner) is None
    assert all(layer.moe_route_tap is None for layer in runner.layers.values())


def test_the_switch_arms_and_starts(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOG_MOE", str(log))
    runner = FakeRunner()
    runner.moe_routes = attach(runner)
    assert runner.moe_routes is not None
    assert do(runner, "status")["recording"] is True
    runner.execute(("7-0000000a", 3, 3))
    shutdown(SimpleNamespace(model_runner=runner))
    assert len(_routes(log)) == 3
    assert read_lines(log)[-1]["reason"] == "shutdown"


def test_without_autostart_there_is_no_file_and_no_row_until_start(arm: Arm, log: Path) -> None:
    runner = arm()
    runner.execute(("7-0000000a", 3, 3))
    assert not log.exists()
    assert do(runner, "start")["ok"]
    runner.execute(("7-0000000a", 1, 3))
    assert do(runner, "stop")["ok"]
    assert [row["token_idx"] for row in _routes(log)] == [3]


@pytest.mark.parametrize("command", ["start", "stop", "status", "rubbish"])
def test_a_command_to_an_engine_without_a_recorder_is_answered_with_the_remedy(
    command: str,
) -> None:
    answer = do(FakeRunner(), command)
    assert answer["ok"] is False
    assert "VLLM_LOG_MOE" in answer["error"]


def test_shutting_down_a_worker_that_never_came_up_is_no_error() -> None:
    shutdown(SimpleNamespace())
    shutdown(SimpleNamespace(model_runner=None))
    shutdown(SimpleNamespace(model_runner=FakeRunner()))


# ---- what is recorded ----------------------------------------------------------------------


def test_the_rows_of_a_pass_are_the_ids_that_its_layers_chose(arm: Arm, log: Path) -> None:
    runner = arm()
    do(runner, "start")
    first = runner.execute(("7-0000000a", 3, 3), ("8-0000000b", 2, 4))
    second = runner.execute(("8-0000000b", 2, 4), ("7-0000000a", 1, 3))
    do(runner, "stop")
    rows = _routes(log)
    assert [row["topk_ids"] for row in rows] == first + second
    assert [(row["req_id"], row["token_idx"]) for row in rows] == [
        *[("7", 0), ("7", 1), ("7", 2), ("8", 0), ("8", 1)],
        *[("8", 2), ("8", 3), ("7", 3)],
    ]
    assert [row["forward_pass_id"] for row in rows] == [0] * 5 + [1] * 3
    assert [row["phase"] for row in rows] == ["prefill"] * 7 + ["decode"]


def test_warm_up_passes_never_reach_the_file(arm: Arm, log: Path) -> None:
    runner = arm(autostart=True)
    runner.dummy_run()
    chosen = runner.execute(("7-0000000a", 3, 3))
    runner.dummy_run()
    chosen += runner.execute(("7-0000000a", 1, 3))
    do(runner, "stop")
    assert [row["topk_ids"] for row in _routes(log)] == chosen
    assert read_lines(log)[-1]["self_check"]["verdict"] == "pass"


def test_a_layer_that_did_not_fire_is_not_filled_from_warm_up(arm: Arm, log: Path) -> None:
    runner = arm()
    runner.dummy_run()
    do(runner, "start")
    silent = runner.layers["model.layers.3.mlp.experts"]
    silent.moe_route_tap = None
    runner.execute(("7-0000000a", 3, 3))
    do(runner, "stop")
    assert _routes(log, 3) == []
    assert read_lines(log)[-1]["self_check"]["verdict"] == "fail"


@pytest.mark.parametrize("passes_before", ["warm-up", "padded", "idle"])
def test_a_layer_that_falls_silent_repeats_no_older_row(
    arm: Arm, log: Path, passes_before: str
) -> None:
    """The buffer holds rows of warm-up after an autostart, of padding and of idle dummy passes."""
    runner = arm(autostart=True)
    if passes_before == "warm-up":
        runner.dummy_run()
    else:
        runner.execute(("7-0000000a", 1, 9))
        runner.dummy_run()  # writes far more rows than the pass before had
    runner.layers["model.layers.3.mlp.experts"].moe_route_tap = None
    runner.execute(("8-0000000b", 5, 5))
    do(runner, "stop")
    assert [row for row in _routes(log, 3) if row["req_id"] == "8"] == []
    end = read_lines(log)[-1]
    assert end["drops"]["not_captured"] == 5
    assert end["self_check"]["verdict"] == "fail"


def test_an_error_while_a_step_is_taken_stops_the_recording_and_not_the_engine(
    arm: Arm, log: Path
) -> None:
    runner = arm(autostart=True)
    runner.execute(("7-0000000a", 2, 2))
    assert runner.moe_routes is not None
    while do(runner, "status")["so_far"]["passes"] == 0:
        time.sleep(0.01)  # what waits when the error comes is lost too, and counted

    def exhausted(*_: Any) -> None:
        raise MemoryError("no pinned memory left")

    runner.moe_routes._recording._choices.routes = exhausted  # type: ignore[method-assign]
    for _ in range(3):
        runner.execute(("7-0000000a", 1, 2))
    assert "no pinned memory left" in do(runner, "status")["error"]
    answer = do(runner, "stop")
    assert answer["ok"] is False
    assert "no pinned memory left" in answer["error"]
    end = read_lines(log)[-1]
    assert (end["type"], end["reason"]) == ("end", "error"), "the file says so too"
    assert "no pinned memory left" in end["error"]
    assert end["rows"] == len(_all_routes(log)) == 2 * len(INDICES)
    assert end["drops"]["write_error"] == 3 * len(INDICES)
    assert end["self_check"]["verdict"] == "fail"


@pytest.mark.parametrize("call", [(), ("status", "more"), (None,), ([],)])
def test_whatever_is_called_is_answered(arm: Arm, call: tuple[Any, ...]) -> None:
    runner = arm()
    answer = module.control(SimpleNamespace(model_runner=runner), *call)
    assert answer["ok"] is (call == ())


def test_a_recording_is_not_started_into_a_file_of_another_kind(arm: Arm, tmp_path: Path) -> None:
    runner = arm()
    answer = do(runner, "start", path=str(tmp_path / "x.csv"))
    assert answer["ok"] is False
    assert "does not end in .jsonl" in answer["error"]
    assert list(tmp_path.glob("*.csv")) == []


def _compiled() -> FakeRunner:
    """A runner whose forward pass is compiled, so that the hook in it is what it was at first."""
    runner = FakeRunner()
    runner.vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    return runner


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_only_the_chosen_layers_are_tapped_and_written(arm: Arm, log: Path, mode: str) -> None:
    runner = arm(_compiled() if mode == "compiled" else FakeRunner(), layers="3-4")
    do(runner, "start")
    runner.execute(("7-0000000a", 2, 2))
    taps = [layer.moe_route_tap for layer in runner.layers.values()]
    do(runner, "stop")
    header = read_lines(log)[0]
    assert header["layers_logged"] == [3, 4]
    assert header["num_moe_layers"] == 3
    assert {row["layer"] for row in read_lines(log) if row["type"] == "route"} == {3, 4}
    assert [tap and tap.slot for tap in taps] == [None, 0, 1]


def test_an_eager_pass_runs_no_hook_while_nothing_records(arm: Arm, log: Path) -> None:
    runner = arm()
    do(runner, "configure", layers="4")
    for path in (log, log.with_name("again.jsonl")):
        assert [layer.moe_route_tap for layer in runner.layers.values()] == [None] * 3
        do(runner, "start", path=str(path))
        tapped = [layer.moe_route_tap is not None for layer in runner.layers.values()]
        assert tapped == [False, False, True]
        runner.execute(("7-0000000a", 2, 2))
        assert do(runner, "stop")["end"]["rows"] == 2


def test_a_compiled_pass_keeps_its_hook_and_no_list(arm: Arm) -> None:
    """Whether a recording runs must not change what was compiled."""
    runner = arm(_compiled())
    before = [layer.moe_route_tap for layer in runner.layers.values()]
    assert [tap.references for tap in before] == [None] * 3
    do(runner, "start")
    do(runner, "stop")
    after = [layer.moe_route_tap for layer in runner.layers.values()]
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("chosen", ["all", "1", "1,4"])
def test_eager_and_compiled_passes_leave_the_same_rows(
    arm: Arm, tmp_path: Path, chosen: str
) -> None:
    files = []
    for runner in (FakeRunner(), _compiled()):
        arm(runner)
        do(runner, "configure", layers=chosen)
        path = tmp_path / f"{len(files)}.jsonl"
        assert do(runner, "start", path=str(path))["ok"]
        runner.dummy_run()
        runner.execute(("7-0000000a", 2, 2), ("8-0000000b", 1, 1))
        runner.execute(("7-0000000a", 1, 2))
        do(runner, "stop")
        files.append([line for line in read_lines(path) if line["type"] == "route"])
    assert files[0] == files[1]
    assert len(files[0]) == 4 * {"all": 3, "1": 1, "1,4": 2}[chosen]


def test_the_header_starts_with_the_documented_keys(arm: Arm, log: Path) -> None:
    do(arm(), "start")
    header = read_lines(log)[0]
    assert list(header)[:8] == [
        "type",
        "model_id",
        "vllm_version",
        "torch_version",
        "device",
        "seed",
        "layers_logged",
        "top_k",
    ]
    assert header["schema_version"] == 1
    assert header["files"] == ["x.jsonl"]
    assert header["execution"] == "eager"
    assert header["rank"] == {"dp": 0, "pp": 0, "tp": 0}
    assert header["patch_id"] == "0123abcd"
    assert [item["layer"] for item in header["layers"]] == list(INDICES)


def test_the_row_that_runs_ahead_of_a_stop_is_marked(arm: Arm, log: Path) -> None:
    runner = arm(FakeRunner(runs_ahead=True))
    do(runner, "start")
    params = SamplingParams(stop_token_ids=[EOS])
    runner.execute(("7-0000000a", 2, 2), tokens=(1, EOS), params=params)
    runner.execute(("7-0000000a", 1, 2), tokens=(4,))
    runner.execute(("7-0000000a", 1, 2), tokens=(EOS,))
    do(runner, "stop")
    assert [row.get("flag") for row in _routes(log)] == [None, None, None, "overrun"]


def test_the_row_that_runs_ahead_is_marked_in_a_recording_that_joined_later(
    arm: Arm, log: Path
) -> None:
    runner = arm(FakeRunner(runs_ahead=True))
    params = SamplingParams(stop_token_ids=[EOS])
    runner.execute(("7-0000000a", 2, 2), tokens=(1, 2), params=params)
    do(runner, "start")
    runner.execute(("7-0000000a", 1, 2), tokens=(4,))
    runner.execute(("7-0000000a", 1, 2), tokens=(EOS,))
    do(runner, "stop")
    assert [row.get("flag") for row in _routes(log)] == [None, "overrun"]


def test_requests_that_end_without_another_pass_are_ended_at_stop(arm: Arm, log: Path) -> None:
    runner = arm()
    do(runner, "start")
    runner.execute(("7-0000000a", 2, 2), ("8-0000000b", 1, 1))
    runner.execute(finished=("7-0000000a",))
    do(runner, "stop")
    ended = {r["req_id"]: r["finished"] for r in read_lines(log) if r["type"] == "request"}
    assert ended == {"7": True, "8": False}


# ---- control -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["rubbish", "", None, 5, ["start"], "__init__", "shutdown"])
def test_an_unknown_command_is_answered_not_raised(arm: Arm, command: Any) -> None:
    answer = do(arm(), command)
    assert answer["ok"] is False
    assert answer["error"]


@pytest.mark.parametrize("command", ["start", "stop", "status"])
def test_an_unknown_option_is_answered_not_raised(arm: Arm, command: str) -> None:
    assert do(arm(), command, colour="red")["ok"] is False


def test_start_while_recording_is_refused_and_the_recording_goes_on(arm: Arm, log: Path) -> None:
    runner = arm(autostart=True)
    answer = do(runner, "start")
    assert answer["ok"] is False
    assert "stop it first" in answer["error"]
    runner.execute(("7-0000000a", 2, 2))
    assert do(runner, "stop")["ok"]
    assert len(_routes(log)) == 2


def test_stop_while_stopped_is_refused(arm: Arm) -> None:
    runner = arm(autostart=True)
    assert do(runner, "stop")["ok"]
    answer = do(runner, "stop")
    assert answer["ok"] is False
    assert "start one first" in answer["error"]


def test_start_onto_an_existing_file_is_answered_and_leaves_recording_off(
    arm: Arm, log: Path
) -> None:
    runner = arm(autostart=True)
    do(runner, "stop")
    before = log.read_bytes()
    answer = do(runner, "start")
    assert answer["ok"] is False
    assert "exists" in answer["error"]
    assert do(runner, "status")["recording"] is False
    assert log.read_bytes() == before


def test_a_second_recording_starts_over_in_its_own_file(
    arm: Arm, log: Path, tmp_path: Path
) -> None:
    runner = arm(autostart=True)
    runner.execute(("7-0000000a", 2, 2))
    do(runner, "stop")
    runner.execute(("7-0000000a", 1, 2))
    other = tmp_path / "other.jsonl"
    assert do(runner, "start", path=str(other))["path"] == str(other)
    runner.execute(("7-0000000a", 1, 2))
    do(runner, "stop")
    assert [row["token_idx"] for row in _routes(log)] == [0, 1]
    (row,) = _routes(other)
    assert (row["token_idx"], row["forward_pass_id"]) == (3, 0)
    (request,) = [line for line in read_lines(other) if line["type"] == "request"]
    assert request["missed_tokens"] == 3


def test_status_tells_what_is_going_on(arm: Arm, log: Path) -> None:
    runner = arm()
    off = do(runner, "status")
    assert (off["ok"], off["recording"], off["writes"]) == (True, False, True)
    do(runner, "start")
    on = do(runner, "status")
    assert (on["recording"], on["path"], on["end"]) == (True, str(log), None)
    assert on["since"] > 0


def test_stop_answers_with_the_end_record_of_the_file(arm: Arm, log: Path) -> None:
    runner = arm(autostart=True)
    runner.execute(("7-0000000a", 2, 2))
    answer = do(runner, "stop")
    end = read_lines(log)[-1]
    assert answer["end"]["bytes"] == end["bytes"]
    assert answer["end"] == end


def test_a_running_recording_has_no_end_record(arm: Arm, tmp_path: Path) -> None:
    runner = arm(autostart=True)
    do(runner, "stop")
    assert do(runner, "start", path=str(tmp_path / "other.jsonl"))["end"] is None


def _break_file(runner: FakeRunner) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    assert runner.moe_routes is not None
    log: Any = runner.moe_routes._recording._log.current  # type: ignore[union-attr]
    log._file._file._write = full


def test_a_full_disk_stops_the_recording_and_not_the_engine(arm: Arm) -> None:
    runner = arm(autostart=True, queue_bytes=100)
    _break_file(runner)
    for i in range(50):
        runner.execute((f"{i}-{i:08x}", 5, 5))
    answer = do(runner, "stop")
    assert answer["ok"] is False
    assert "No space left on device" in answer["error"]
    assert do(runner, "status")["recording"] is False


def test_status_tells_that_recording_stopped_on_an_error(arm: Arm) -> None:
    runner = arm(autostart=True)
    _break_file(runner)
    runner.execute(("7-0000000a", 2, 2))
    assert runner.moe_routes is not None
    assert runner.moe_routes._recording._writer is not None
    for _ in range(1000):
        if runner.moe_routes._recording._writer.error is not None:
            break
        time.sleep(0.005)
    assert "No space left on device" in str(do(runner, "status"))


def test_shutdown_never_raises(arm: Arm) -> None:
    runner = arm(autostart=True)
    _break_file(runner)
    runner.execute(("7-0000000a", 2, 2))
    shutdown(SimpleNamespace(model_runner=runner))
    shutdown(SimpleNamespace(model_runner=runner))


@pytest.fixture
def slow_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending a file takes a while."""
    close = TokenLog.close

    def slow(self: TokenLog, *args: Any, **facts: Any) -> None:
        time.sleep(0.3)
        close(self, *args, **facts)

    monkeypatch.setattr(TokenLog, "close", slow)


def test_a_process_that_just_ends_closes_its_recording(
    arm: Arm, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine in the user's own process is never told to shut its worker down."""
    at_exit: list[Callable[[], None]] = []
    exits = SimpleNamespace(register=at_exit.append, unregister=at_exit.remove)
    monkeypatch.setattr(module.process_exit, "atexit", exits)
    runner = arm(autostart=True)
    runner.execute(("7-0000000a", 2, 2))
    (at_end,) = at_exit
    at_end()
    assert read_lines(log)[-1]["reason"] == "shutdown"
    assert at_exit == []


@pytest.mark.usefixtures("slow_close")
def test_a_worker_that_goes_down_waits_for_what_is_still_being_written(arm: Arm, log: Path) -> None:
    """A recording that was stopped without waiting for it, and one that was reset away."""
    runner = arm(autostart=True)
    runner.execute(("7-0000000a", 2, 2))
    assert do(runner, "reset", path=str(log.with_name("y.jsonl")))["ok"]
    assert do(runner, "stop", timeout=0)["ok"]
    shutdown(SimpleNamespace(model_runner=runner))
    reasons = [read_lines(log.with_name(name))[-1]["reason"] for name in (log.name, "y.jsonl")]
    assert reasons == ["reset", "stop"]


@pytest.mark.usefixtures("slow_close")
def test_a_recording_that_fails_at_the_end_does_not_keep_the_one_before_from_its_end(
    arm: Arm, log: Path
) -> None:
    runner = arm(autostart=True)
    runner.execute(("7-0000000a", 2, 2))
    assert do(runner, "reset", path=str(log.with_name("y.jsonl")))["ok"]
    _break_file(runner)
    runner.execute(("8-0000000a", 2, 2))
    shutdown(SimpleNamespace(model_runner=runner))
    assert read_lines(log)[-1]["reason"] == "reset"


def test_a_recording_that_ended_without_anybody_waiting_holds_no_model(
    arm: Arm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is called at the end of a process holds the recorder, and that the model."""
    at_exit: list[Callable[[], None]] = []
    exits = SimpleNamespace(register=at_exit.append, unregister=at_exit.remove)
    monkeypatch.setattr(module.process_exit, "atexit", exits)
    runner = arm(autostart=True)
    runner.execute(("7-0000000a", 2, 2))
    assert do(runner, "stop", timeout=0)["ok"]
    deadline = time.monotonic() + 5
    while do(runner, "status")["closing"] and time.monotonic() < deadline:
        time.sleep(0.01)
    runner.execute(("7-0000000a", 1, 2))
    assert at_exit == []


# ---- ranks ---------------------------------------------------------------------------------


def test_other_tensor_parallel_ranks_tap_and_write_nothing(
    arm: Arm, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "get_tp_group", group(rank=1, size=2))
    runner = arm()
    assert do(runner, "start")["ok"]
    runner.execute(("7-0000000a", 2, 2))
    assert do(runner, "status")["writes"] is False
    assert do(runner, "stop")["ok"]
    assert not log.exists()
    assert all(layer.moe_route_tap is None for layer in runner.layers.values())


@pytest.mark.parametrize(
    ("selection", "stage", "file", "names", "logged"),
    [
        ("all", 0, "x.jsonl", ["x.jsonl", "x.pp1.jsonl"], [0, 1]),
        ("all", 1, "x.pp1.jsonl", ["x.jsonl", "x.pp1.jsonl"], [2, 3]),
        ("3", 1, "x.jsonl", ["x.jsonl"], [3]),
    ],
)
def test_every_pipeline_stage_writes_its_own_layers_to_its_own_file(
    arm: Arm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    selection: str,
    stage: int,
    file: str,
    names: list[str],
    logged: list[int],
) -> None:
    parts = [(0, 1), (2, 3)]

    def gather(stages: list[Any], own: Any, group: Any) -> None:
        for i, part in enumerate(parts):
            others = FakeRunner(part).layers.items()
            stages[i] = own if i == stage else module.layers.describe(others)

    monkeypatch.setattr(module, "get_pp_group", group(rank=stage, size=2))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    runner = arm(FakeRunner(parts[stage]), layers=selection)
    do(runner, "start")
    assert os.listdir(tmp_path) == [file]  # noqa: PTH208
    header = read_lines(tmp_path / file)[0]
    assert header["files"] == names
    assert header["layers_logged"] == logged
    assert header["num_moe_layers"] == 4


def test_a_stage_without_a_chosen_layer_writes_nothing(
    arm: Arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(stages: list[Any], own: Any, group: Any) -> None:
        stages[:] = [own, module.layers.describe(FakeRunner((2, 3)).layers.items())]

    monkeypatch.setattr(module, "get_pp_group", group(rank=0, size=2))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    runner = arm(FakeRunner((0, 1)), layers="3")
    assert do(runner, "start")["ok"]
    runner.execute(("7-0000000a", 2, 2))
    assert do(runner, "stop")["ok"]
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def _dp_runner(rank: int, size: int = 2, parts: tuple[int, ...] = INDICES) -> FakeRunner:
    runner = FakeRunner(parts)
    vars(runner.vllm_config.parallel_config).update(
        data_parallel_rank=rank, data_parallel_size=size
    )
    return runner


@contextmanager
def _ranks_have(*tokens: int) -> Iterator[None]:
    """The forward context of a pass in which every data-parallel rank has so many tokens."""
    across = torch.tensor(tokens)
    context = ForwardContext({}, {}, {}, 0, DPMetadata(across.max(), across))
    with override_forward_context(context):
        yield


def _execute_among(runner: FakeRunner, before: int, own: int, after: int) -> list[list[int]]:
    """A pass whose experts are given the rows of all ranks; return those of this one."""
    alone, chosen = runner.forward, []

    def forward(n: int) -> list[list[int]]:
        chosen.extend(alone(before + n + after)[before : before + n])
        return chosen

    with _ranks_have(before, own, after), mock.patch.object(runner, "forward", forward):
        runner.execute(("7-0000000a", own, own))
    return chosen


def test_a_data_parallel_rank_records_its_own_rows_out_of_all_ranks(
    arm: Arm, tmp_path: Path
) -> None:
    runner = arm(_dp_runner(rank=1, size=3), autostart=True)
    chosen = _execute_among(runner, 4, 3, 5)
    do(runner, "stop")
    lines = read_lines(tmp_path / "x.dp1.jsonl")
    assert [row["topk_ids"] for row in _routes(tmp_path / "x.dp1.jsonl")] == chosen
    assert lines[-1]["self_check"]["verdict"] == "pass"


def test_an_idle_data_parallel_rank_leaves_a_header_and_an_end(arm: Arm, tmp_path: Path) -> None:
    runner = arm(_dp_runner(rank=1), autostart=True)
    with _ranks_have(5, 1):
        runner.forward(6)  # its dummy batch, so that the other rank's experts are served
    do(runner, "stop")
    header, end = read_lines(tmp_path / "x.dp1.jsonl")
    assert (header["type"], header["rank"]["dp"]) == ("meta", 1)
    assert (end["type"], end["rows"], end["self_check"]["verdict"]) == ("end", 0, "pass")


@pytest.mark.parametrize(
    ("dp", "stage", "file"),
    [(0, 0, "x.jsonl"), (0, 1, "x.pp1.jsonl"), (1, 0, "x.dp1.jsonl"), (1, 1, "x.dp1.pp1.jsonl")],
)
def test_every_data_parallel_rank_and_stage_has_its_own_file_and_names_all_of_them(
    arm: Arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dp: int, stage: int, file: str
) -> None:
    parts = [(0, 1), (2, 3)]

    def gather(stages: list[Any], own: Any, group: Any) -> None:
        for i, part in enumerate(parts):
            others = FakeRunner(part).layers.items()
            stages[i] = own if i == stage else module.layers.describe(others)

    monkeypatch.setattr(module, "get_pp_group", group(rank=stage, size=2))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    runner = arm(_dp_runner(dp, parts=parts[stage]))
    do(runner, "start")
    assert os.listdir(tmp_path) == [file]  # noqa: PTH208
    header = read_lines(tmp_path / file)[0]
    assert header["files"] == ["x.jsonl", "x.pp1.jsonl", "x.dp1.jsonl", "x.dp1.pp1.jsonl"]
    assert header["rank"] == {"dp": dp, "pp": stage, "tp": 0}


def test_alone_a_layer_maps_no_rows_and_asks_for_no_context(arm: Arm) -> None:
    """Its forward pass is traced on CPU: what the hook reads there would be baked in."""
    runner = arm(_compiled())
    taps = [layer.moe_route_tap for layer in runner.layers.values()]
    assert [(tap.dp_rank, tap.logical_ids) for tap in taps] == [(None, None)] * 3


def test_the_buffer_holds_a_pass_padded_to_the_tensor_parallel_size(arm: Arm) -> None:
    runner = _compiled()
    runner.vllm_config.scheduler_config.max_num_batched_tokens = 30
    runner.vllm_config.parallel_config.tensor_parallel_size = 4
    arm(runner)
    tap = runner.layers["model.layers.1.mlp.experts"].moe_route_tap
    assert tap.ids.shape[0] == tap.weights.shape[0] == 32


def test_under_eplb_the_log_holds_logical_ids_and_their_number(arm: Arm, log: Path) -> None:
    runner = FakeRunner()
    runner.vllm_config.parallel_config.enable_eplb = True
    for layer in runner.layers.values():
        layer.router.enable_eplb = True
        layer.global_num_experts = 16  # with the redundant ones
    arm(runner)
    do(runner, "start")
    chosen = runner.execute(("7-0000000a", 5, 5))
    do(runner, "stop")
    assert [row["topk_ids"] for row in _routes(log)] == chosen
    header, *_, end = read_lines(log)
    assert (header["num_experts"], header["expert_ids"]) == (8, "logical")
    assert end["self_check"]["verdict"] == "pass"


# ---- refusals ------------------------------------------------------------------------------


def test_a_dense_model_is_refused(arm: Arm) -> None:
    with pytest.raises(RouteLogError, match="tiny has no MoE layer; unset VLLM_LOG_MOE"):
        arm(FakeRunner(()))


def test_an_unknown_layer_is_refused_when_the_engine_starts(arm: Arm, log: Path) -> None:
    with pytest.raises(RouteLogError, match="its MoE layers are 1,3,4"):
        arm(layers="0", autostart=True)
    assert not log.exists()


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("parallel_config", {"prefill_context_parallel_size": 2}),
        ("parallel_config", {"enable_dbo": True}),
        ("parallel_config", {"use_ubatching": True}),
        ("", {"speculative_config": object()}),
        ("", {"lora_config": object()}),
    ],
)
def test_what_would_be_recorded_wrongly_is_refused_with_the_remedy(
    arm: Arm, log: Path, part: str, changes: dict[str, Any]
) -> None:
    runner = FakeRunner()
    vars(getattr(runner.vllm_config, part) if part else runner.vllm_config).update(changes)
    with pytest.raises(RouteLogError, match=r"not supported with .*; .* or unset VLLM_LOG_MOE"):
        arm(runner, autostart=True)
    assert not log.exists()
    assert all(layer.moe_route_tap is None for layer in runner.layers.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": SimpleNamespace(is_monolithic=True)},
        {"is_sequence_parallel": True},
    ],
)
def test_one_layer_that_hides_its_routing_is_enough_to_refuse(
    arm: Arm, changes: dict[str, Any]
) -> None:
    runner = FakeRunner()
    vars(list(runner.layers.values())[-1]).update(changes)
    with pytest.raises(RouteLogError, match="not supported with"):
        arm(runner)


def test_the_other_model_runner_is_refused(arm: Arm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(RouteLogError, match="VLLM_USE_V2_MODEL_RUNNER=1"):
        arm()


def test_an_unknown_device_is_refused(arm: Arm) -> None:
    runner = FakeRunner()
    runner.device = torch.device("meta")
    with pytest.raises(RouteLogError, match="device 'meta'; use one of cpu, cuda"):
        arm(runner)


def test_a_pass_that_raised_an_error_fails_the_recording(arm: Arm, log: Path) -> None:
    """Its rows are nowhere, so a file without them must not look complete."""
    runner = arm(autostart=True)
    runner.execute(("7-0000000a", 2, 2))

    def broken(_: int) -> list[list[int]]:
        raise ValueError("in the model")

    runner.forward = broken  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="in the model"):
        runner.execute(("7-0000000a", 1, 2))
    do(runner, "stop")
    end = read_lines(log)[-1]
    assert (end["passes"], end["passes_unfinished"]) == (1, 1)
    assert end["self_check"]["verdict"] == "fail"
    failed = [check for check in end["self_check"]["checks"] if check["verdict"] == "fail"]
    assert [check["name"] for check in failed] == ["every pass that began ended"]


def test_a_step_that_only_ends_requests_is_no_pass(arm: Arm, log: Path) -> None:
    runner = arm(autostart=True)
    runner.execute(("7-0000000a", 2, 2))
    runner.execute(finished=("7-0000000a",))
    do(runner, "stop")
    end = read_lines(log)[-1]
    assert (end["passes"], end["passes_unfinished"]) == (1, 0)
    assert end["self_check"]["verdict"] == "pass"
