# SPDX-License-Identifier: Apache-2.0
"""The file of a line a pass, and the clocks that time its passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from vllm.moe_routes.capture import pass_timer
from vllm.moe_routes.counts import Shape, count_choices
from vllm.moe_routes.errors import ConflictError
from vllm.moe_routes.writing import pass_log
from vllm.moe_routes.writing.pass_log import PassLog
from vllm.moe_routes.writing.rows import Step

from tests.support.build import a_layer, a_step, clean_routes, read_lines

LAYERS = [a_layer(2), a_layer(5)]
SHAPE = Shape.of(LAYERS)


class Counted(NamedTuple):
    """Counts that are there already."""

    counts: np.ndarray
    nbytes: int = 0

    def resolve(self) -> np.ndarray:
        return self.counts


def a_pass(number: int, tokens: int, dropped: bool = False, lost: int = 0) -> Step:
    """A prefill pass of one request, ``lost`` choices of whose first layer were not captured."""
    counts = count_choices(clean_routes(LAYERS, tokens, seed=number).topk_ids, SHAPE)
    for expert in np.flatnonzero(counts[0, :-1])[:lost]:
        counts[0, expert] -= 1
        counts[0, -1] += 1
    step = a_step([(f"{number}-0000000a", 0, tokens, tokens)], forward_pass_id=number)
    pending = None if dropped else Counted(counts)
    return step._replace(pending=pending, elapsed=lambda: 0.25)


@pytest.fixture
def log(tmp_path: Path) -> PassLog:
    return PassLog(tmp_path / "x.jsonl", {"type": "meta"}, SHAPE, rank=3)


def test_the_end_record_has_the_sum_of_all_passes(log: PassLog) -> None:
    steps = [a_pass(i, i + 1) for i in range(4)]
    for step in steps:
        log.consume(step)
    log.close("stop")
    meta, *lines, end = read_lines(log.path)
    assert meta["type"] == "meta" and "start_time" in meta
    assert [line["latency"] for line in lines] == [0.25] * 4
    assert {line["rank"] for line in lines} == {3}
    wanted = sum(step.pending.resolve()[:, :-1] for step in steps)  # type: ignore[union-attr]
    assert end["expert_counts"] == wanted.tolist()
    assert (end["rows"], end["passes"], end["tokens"]["prefill"]) == (20, 4, 10)
    assert end["self_check"]["verdict"] == "pass"
    assert log.counters()["bytes"] == log.path.stat().st_size


def test_a_dropped_pass_has_no_line_and_is_counted(log: PassLog) -> None:
    log.consume(a_pass(0, 3))
    log.consume(a_pass(1, 5, dropped=True))
    log.lose(a_pass(2, 7))
    log.close("stop")
    *_, line, end = read_lines(log.path)
    assert line["forward_pass_id"] == 0
    assert end["drops"] == {"queue_full": 10, "not_captured": 0, "write_error": 14}
    assert end["rows"] == 6
    assert end["self_check"]["verdict"] == "fail"


def test_choices_that_were_not_captured_are_lost_rows(log: PassLog) -> None:
    """In whole rows, rounded up: three of top-2 are two rows."""
    log.consume(a_pass(0, 4, lost=3))
    log.close("stop")
    end = read_lines(log.path)[-1]
    assert (end["rows"], end["drops"]["not_captured"]) == (6, 2)
    assert end["self_check"]["verdict"] == "fail"


def test_what_a_dump_can_show_is_bounded_by_number_and_by_size(
    log: PassLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_log, "RECENT_PASSES", 3)
    for i in range(5):
        log.consume(a_pass(i, 1))
    assert [item.record["forward_pass_id"] for item in log.recent] == [2, 3, 4]
    monkeypatch.setattr(pass_log, "RECENT_BYTES", 2 * log.recent[0].counts.nbytes)
    log.consume(a_pass(5, 1))
    assert [item.record["forward_pass_id"] for item in log.recent] == [4, 5]
    assert log.first is not None and log.first["forward_pass_id"] == 0


def test_a_file_that_exists_is_a_conflict(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("mine")
    with pytest.raises(ConflictError, match="exists"):
        PassLog(tmp_path / "x.jsonl", {}, SHAPE, 0)


def test_the_host_clock_measures_the_time_between_its_calls() -> None:
    host = pass_timer.HostClock()
    host.start()
    first = host.stop()
    assert 0 <= first() <= host.stop()() < 60
    assert first() == first(), "a later pass does not change it"


def test_a_step_that_was_not_timed_has_no_time() -> None:
    with pytest.raises(RuntimeError, match="not timed"):
        pass_timer.not_timed()


def test_the_cuda_clock_waits_for_its_own_events_and_only_when_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stands in for a device: events get their time when the device comes by."""
    told: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = -1.0

        def record(self) -> None:
            told.append("record")
            self.at = float(len(told))

        def synchronize(self) -> None:
            told.append("synchronize")

        def elapsed_time(self, other: Any) -> float:
            assert told[-1] == "synchronize"
            return float((other.at - self.at) * 1000)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    cuda = pass_timer.CudaClock()
    cuda.start()
    first = cuda.stop()
    cuda.start()
    second = cuda.stop()
    assert told == ["record"] * 4, "nothing waits while passes are under way"
    assert (first(), second()) == (1.0, 1.0)
