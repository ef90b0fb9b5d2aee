# SPDX-License-Identifier: Apache-2.0
"""A bound on a file's size, rotation, and sampling: what is left out is left out on purpose."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.moe_routes.config import RouteLogConfig
from vllm.moe_routes.counts import Shape, count_choices
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.recorder import Recorder
from vllm.moe_routes.recording.request_sample import RequestSample, chosen
from vllm.moe_routes.writing.pass_log import PassLog
from vllm.moe_routes.writing.rotation import RotatingLog
from vllm.moe_routes.writing.rows import Step
from vllm.moe_routes.writing.token_log import TokenLog

from tests.support.build import QUICK, Ready, a_layer, a_pending, a_step, clean_routes, read_lines
from tests.support.commands import do
from tests.support.fake_runner import INDICES, FakeRunner

LAYERS = [a_layer(1), a_layer(3)]
HEADER = {"type": "meta", "model_id": "m", "top_k": 2, "files": ["x.jsonl"]}
SHAPE = Shape.of(LAYERS)


def _token_logs(path: Path, facts: dict[str, Any]) -> TokenLog:
    return TokenLog(path, {**HEADER, **facts}, LAYERS, 255)


def _pass_logs(path: Path, facts: dict[str, Any]) -> PassLog:
    return PassLog(path, {**HEADER, **facts}, SHAPE, 0)


def _steps(sizes: list[int], id_length: int = 1) -> list[Step]:
    """Two requests at a time: one that goes on through all passes, one that lasts a pass."""
    steps = []
    for i, n in enumerate(sizes):
        long, short = f"{'é' * id_length}-ffffffff", f"{i}-{i:08x}"
        rows = [(long, i, 1, 2), (short, 0, n, n)]
        done = [f"{i - 1}-{i - 1:08x}"] if i else []
        routes = clean_routes(LAYERS, n + 1, seed=i)
        steps.append(a_step(rows, forward_pass_id=i, finished=done, pending=a_pending(routes)))
    return steps


def _counted(step: Step) -> Step:
    """The step as mode per_pass takes it."""
    assert isinstance(step.pending, Ready)
    counts = count_choices(step.pending.routes.topk_ids, SHAPE)
    pending: Any = SimpleNamespace(nbytes=counts.nbytes, resolve=lambda: counts)
    return step._replace(pending=pending, elapsed=lambda: 0.001)


def _of_type(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["type"] == kind]


def _rows(steps: list[Step]) -> int:
    return sum(int(step.num_scheduled_tokens.sum()) for step in steps) * len(LAYERS)


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=25)
# Far below what the switch takes: bounds of bytes, not of files' worth of them.
limits = st.integers(70_000, 110_000)


# ---- the bound -----------------------------------------------------------------------------


@QUICK
@given(sizes=sizes, limit=limits, id_length=st.integers(1, 300))
def test_a_recording_ends_before_its_bound_and_says_why(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int, id_length: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "x.jsonl"
    log = RotatingLog(_token_logs, path, limit, False)
    steps = _steps(sizes, id_length)
    for step in steps:
        log.consume(step)
    log.close("stop")
    lines, totals = read_lines(path), log.counters()
    end = lines[-1]
    assert path.stat().st_size <= limit
    assert end["type"] == "end"
    assert end["reason"] == ("max_bytes" if log.over else "stop")
    assert end["rows"] == len(_of_type(lines, "route")) == totals["rows"]
    assert totals["rows"] + totals["rows_past_end"] == _rows(steps)
    assert end["self_check"]["verdict"] == "pass", "what was left out on purpose is not lost"
    assert sum(end["drops"].values()) == 0
    kept = sorted({row["forward_pass_id"] for row in _of_type(lines, "route")})
    assert kept == list(range(len(kept))), "whole passes, from the first one on"


@QUICK
@given(sizes=sizes, limit=limits)
def test_rotated_files_are_complete_logs_that_add_up(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = RotatingLog(_token_logs, folder / "x.jsonl", limit, True)
    steps = _steps(sizes)
    for step in steps:
        log.consume(step)
    log.close("stop")
    names = ["x.jsonl"] + [f"x.{n}.jsonl" for n in range(2, len(log.files) + 1)]
    assert [path.name for path in log.files] == names
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    logs = [read_lines(folder / name) for name in names]
    for i, lines in enumerate(logs):
        header, end = lines[0], lines[-1]
        assert (folder / names[i]).stat().st_size <= limit
        assert header["type"] == "meta"
        assert (header.get("part"), header["files"]) == ((i + 1) if i else None, [names[i]])
        last = i == len(logs) - 1
        assert end["reason"] == ("stop" if last else "rotate")
        assert end.get("next") == (None if last else names[i + 1])
        assert end["rows"] == len(_of_type(lines, "route"))
        assert end["requests"] == len(_of_type(lines, "request"))
        assert end["self_check"]["verdict"] == "pass"
    assert log.end is not None
    assert log.end["rows"] == _rows(steps) == sum(lines[-1]["rows"] for lines in logs)
    requests = [line["raw_id"] for lines in logs for line in _of_type(lines, "request")]
    assert len(requests) == len(set(requests)) == len(sizes) + 1, "each request is told once"
    positions = [
        row["token_idx"]
        for lines in logs
        for row in _of_type(lines, "route")
        if row["req_id"] == "é" and row["layer"] == 1
    ]
    assert positions == list(range(len(sizes))), "a request goes on in the next file"
    counts = sum(count_choices(s.pending.routes.topk_ids, SHAPE) for s in steps)  # type: ignore[union-attr]
    assert np.array_equal(log.counts().sum(axis=0), counts)


@QUICK
@given(sizes=st.lists(st.integers(1, 9), min_size=20, max_size=60), rotate=st.booleans())
def test_per_pass_logs_keep_to_the_bound(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], rotate: bool
) -> None:
    folder = tmp_path_factory.mktemp("log")
    limit = 72_000
    log = RotatingLog(_pass_logs, folder / "x.jsonl", limit, rotate)
    steps = _steps(sizes)
    for step in steps:
        log.consume(_counted(step))
    log.close("stop")
    lines = [line for path in log.files for line in read_lines(path)]
    assert all(path.stat().st_size <= limit for path in folder.iterdir())
    totals = log.counters()
    assert totals["rows"] + totals["rows_past_end"] == _rows(steps)
    assert (totals["rows_past_end"] > 0) == log.over
    assert len(_of_type(lines, "pass")) == totals["passes"]
    if rotate:
        assert totals["passes"] == len(sizes)
        recent: Any = log.current.recent
        assert [item.record["forward_pass_id"] for item in recent] == list(range(len(sizes)))


def test_a_single_pass_past_the_bound_has_a_file_to_itself(tmp_path: Path) -> None:
    log = RotatingLog(_token_logs, tmp_path / "x.jsonl", 70_000, True)
    steps = _steps([2, 400, 2])
    for step in steps:
        log.consume(step)
    log.close("stop")
    assert [len(_of_type(read_lines(p), "route")) for p in log.files] == [6, 802, 6]


def test_rotation_never_writes_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.2.jsonl").write_text("precious")
    log = RotatingLog(_token_logs, tmp_path / "x.jsonl", 70_000, True)
    for step in _steps([2, 400]):
        log.consume(step)
    log.close("stop")
    assert (tmp_path / "x.2.jsonl").read_text() == "precious"
    assert [path.name for path in log.files] == ["x.jsonl", "x.3.jsonl"]
    assert read_lines(tmp_path / "x.jsonl")[-1]["next"] == "x.3.jsonl"


# ---- the recorder --------------------------------------------------------------------------


@pytest.fixture
def arm(
    tmp_path: Path, give_recorder: Callable[..., FakeRunner]
) -> Callable[..., tuple[FakeRunner, Path]]:
    path = tmp_path / "x.jsonl"
    return lambda **switches: (give_recorder(FakeRunner(), RouteLogConfig(path, **switches)), path)


Arm = Callable[..., tuple[FakeRunner, Path]]


def _run_until_over(runner: FakeRunner) -> int:
    """Rows executed until the recorder has noticed that its recording is over."""
    rows = 0
    for i in itertools.count():
        runner.execute((f"{i}-{i:08x}", 30, 30))
        rows += 30 * len(INDICES)
        assert runner.moe_routes is not None
        if not runner.moe_routes._active:
            return rows - 30 * len(INDICES)  # the last pass found it over
    raise AssertionError


def test_the_recorder_notices_the_end_and_the_engine_goes_on(arm: Arm) -> None:
    runner, path = arm(max_bytes=200_000)
    rows = _run_until_over(runner)
    while (status := do(runner, "status"))["closing"]:
        pass
    assert (status["recording"], status["error"]) == (False, None)
    so_far = status["so_far"]
    assert so_far["rows"] + so_far["rows_past_end"] == rows
    assert so_far["rows"] > 0
    runner.execute(("z-0000000a", 5, 5))
    assert do(runner, "status")["so_far"] == so_far
    assert do(runner, "stop")["ok"], "who stops it need not know that it has ended"
    assert do(runner, "stop")["ok"] is False
    assert read_lines(path)[-1]["reason"] == "max_bytes"
    assert do(runner, "start", path=str(path.with_name("y.jsonl")))["ok"]
    assert do(runner, "stop")["ok"]


def test_the_header_tells_the_bound_and_the_status_the_files(arm: Arm) -> None:
    runner, path = arm(max_bytes=90_000, on_max="rotate")
    for i in range(60):
        runner.execute((f"{i}-{i:08x}", 30, 30))
    answer = do(runner, "stop")
    assert [Path(name).name for name in answer["files"]] == sorted(
        (item.name for item in path.parent.glob("x*.jsonl")),
        key=lambda name: (len(name), name),
    )
    assert len(answer["files"]) > 3
    header = read_lines(path)[0]
    assert (header["max_bytes"], header["on_max"], header["sample"]) == (90_000, "rotate", None)
    assert answer["so_far"]["rows"] == 60 * 30 * len(INDICES)
    assert answer["end"]["rows"] == 60 * 30 * len(INDICES)
    assert answer["end"]["self_check"]["verdict"] == "pass"


# ---- sampling ------------------------------------------------------------------------------


def test_every_request_is_chosen_by_its_id_alone() -> None:
    picked = [i for i in range(8000) if chosen(str(i), 8)]
    assert 850 < len(picked) < 1150
    assert picked == [i for i in range(8000) if chosen(str(i), 8)]
    assert all(chosen(str(i), 1) for i in range(100))
    assert [i for i in range(8000) if chosen(str(i), 16)] == [
        i for i in picked if chosen(str(i), 16)
    ], "of a sample of 1/16, all are in that of 1/8"


@QUICK
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=12), n=st.integers(1, 4))
def test_the_rows_of_a_sample_are_those_of_its_requests(counts: list[int], n: int) -> None:
    ids = [f"{i}-{i:08x}" for i in range(len(counts))]
    kept = RequestSample(n).rows(ids, np.array(counts, dtype=np.int32))
    owner = [i for i, count in enumerate(counts) for _ in range(count)]
    wanted = [i for i in range(len(counts)) if chosen(str(i), n)]
    assert kept.requests == wanted
    assert kept.rows.tolist() == [row for row, i in enumerate(owner) if i in wanted]


def test_a_sample_forgets_requests_that_are_over() -> None:
    sample = RequestSample(2)
    sample.rows(["a-00000000", "b-00000000"], np.array([1, 1]))
    sample.forget(["a-00000000", "stranger"])
    assert list(sample._chosen) == ["b-00000000"]


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_sampled_log_is_the_full_log_without_the_other_requests(
    arm: Arm, tmp_path: Path, runs_ahead: bool
) -> None:
    def run(runner: FakeRunner) -> None:
        for i in range(30):
            done = (f"{i - 2}-{i - 2:08x}",) if i > 1 else ()
            rows = [(f"{j}-{j:08x}", 3 if j == i else 1, 3) for j in (i, i - 1) if j >= 0]
            tokens = tuple(range(sum(n for _, n, _ in rows)))
            runner.execute(*rows, finished=done, tokens=tokens)

    logs = {}
    for n in (1, 3):
        runner = FakeRunner(runs_ahead=runs_ahead)
        path = tmp_path / f"{n}.jsonl"
        runner.moe_routes = Recorder(RouteLogConfig(path, sample=n), runner)
        run(runner)
        assert do(runner, "stop")["ok"]
        logs[n] = read_lines(path)
    wanted = {str(i) for i in range(30) if chosen(str(i), 3)}
    assert 4 < len(wanted) < 20
    sampled, full = logs[3], logs[1]
    for kind in ("route", "request"):
        assert _of_type(sampled, kind) == [
            line for line in _of_type(full, kind) if line["req_id"] in wanted
        ]
    end, all_rows = sampled[-1], full[-1]["rows"]
    assert end["rows"] == len(_of_type(sampled, "route"))
    assert end["rows"] + end["rows_skipped"] == all_rows
    assert sum(end["drops"].values()) == 0
    assert end["self_check"]["verdict"] == "pass"
    assert sampled[0]["sample"]["one_in"] == 3
    assert full[0]["sample"] is None


@pytest.mark.parametrize("mode", ["stat", "per_pass"])
def test_modes_that_count_passes_refuse_a_sample(arm: Arm, mode: str) -> None:
    runner, _ = arm(sample=4, autostart=False)
    assert do(runner, "configure", mode=mode)["ok"]
    answer = do(runner, "start")
    assert answer["ok"] is False
    assert "VLLM_LOG_MOE_SAMPLE=1/4" in answer["error"]
    with pytest.raises(RouteLogError, match="VLLM_LOG_MOE_SAMPLE=1/4 chooses requests"):
        RouteLogConfig.from_env(
            {
                "VLLM_LOG_MOE_API": "1",
                "VLLM_LOG_MOE_MODE": mode,
                "VLLM_LOG_MOE_SAMPLE": "1/4",
            }
        )


# ---- who may read --------------------------------------------------------------------------


@pytest.mark.parametrize(("api", "mode"), [(True, 0o600), (False, 0o644)])
def test_a_servers_files_are_its_owners_only_and_a_jobs_follow_the_umask(
    arm: Arm, api: bool, mode: int
) -> None:
    import os

    old = os.umask(0o022)
    try:
        runner, path = arm(api=api, max_bytes=90_000, on_max="rotate")
        for i in range(30):
            runner.execute((f"{i}-{i:08x}", 30, 30))
        assert do(runner, "stop")["ok"]
        names = list(path.parent.glob("x*.jsonl"))
        assert len(names) > 1
        assert {item.stat().st_mode & 0o777 for item in names} == {mode}
    finally:
        os.umask(old)


@pytest.mark.parametrize(
    ("private", "folder", "file"), [(True, 0o700, 0o600), (False, 0o755, 0o644)]
)
def test_a_parquet_log_is_as_private(tmp_path: Path, private: bool, folder: int, file: int) -> None:
    pytest.importorskip("pyarrow")
    import os

    old = os.umask(0o022)
    try:
        path = tmp_path / "x.parquet"
        log = TokenLog(path, HEADER, LAYERS, 255, "float32", private)
        for step in _steps([3]):
            log.consume(step)
        log.close("stop")
        assert path.stat().st_mode & 0o777 == folder
        assert {part.stat().st_mode & 0o777 for part in path.iterdir()} == {file}
    finally:
        os.umask(old)
