# SPDX-License-Identifier: Apache-2.0
"""The queue and the thread behind it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.writing.rows import Step
from vllm.moe_routes.writing.writer import Writer

from tests.support.build import QUICK, Ready, a_layer, a_step, clean_routes

pytestmark = pytest.mark.timeout(30)

SOON = 10.0  # seconds that something may take on a busy machine before a test gives up on it
NEVER = 3600.0
ROUTES = clean_routes([a_layer(0)], 1)


class FakeSink:
    """Notes what it is told to do, on which thread, and waits at ``gate`` before every step."""

    path = Path("/logs/x.jsonl")

    def __init__(self, open_gate: bool = True) -> None:
        self.calls: list[str] = []
        self.consumed: list[int] = []
        self.dropped: list[int] = []
        self.lost: list[int] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.at_gate = threading.Event()
        self.flushed = threading.Event()
        self.fail: dict[str, Exception] = {}
        self.fail_at: int | None = None
        self.before: Callable[[], None] = lambda: None
        if open_gate:
            self.gate.set()

    def _note(self, what: str) -> None:
        self.threads.add(threading.current_thread().name)
        self.calls.append(what)
        if what in self.fail and self.fail_at is None:
            raise self.fail[what]

    def consume(self, step: Step) -> None:
        self.before()
        self.at_gate.set()
        assert self.gate.wait(SOON)
        if self.fail_at == step.forward_pass_id:
            raise self.fail["consume"]
        self._note("consume")
        (self.consumed if step.pending else self.dropped).append(step.forward_pass_id)

    def lose(self, step: Step) -> None:
        self.lost.append(step.forward_pass_id)

    def flush(self) -> None:
        self._note("flush")
        self.flushed.set()

    def close(self, reason: str) -> None:
        self._note(f"close {reason}")

    def abandon(self) -> None:
        self.calls.append("abandon")


def _step(i: int, nbytes: int = 10) -> Step:
    return a_step([("a", i, 1, 1)], forward_pass_id=i, pending=Ready(ROUTES, nbytes))


def _writers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "moe-routes-writer"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Of this test's own: one that another test left behind is not waited for again."""
    before = set(_writers())
    yield
    left = [thread for thread in _writers() if thread not in before]
    for thread in left:
        thread.join(SOON)
    assert not any(thread.is_alive() for thread in left)


@contextmanager
def _putting(writer: Writer, *steps: Step) -> Iterator[threading.Thread]:
    """Put on another thread, so that a put that waits doesn't hold the test up."""
    thread = threading.Thread(target=lambda: [writer.put(step) for step in steps], daemon=True)
    thread.start()
    yield thread
    thread.join(SOON)
    assert not thread.is_alive(), "put never came back"


def _held_up(thread: threading.Thread) -> bool:
    thread.join(0.1)
    return thread.is_alive()


# ---- order and flushing --------------------------------------------------------------------


def test_steps_are_written_in_order_on_the_writers_own_thread_and_then_the_end() -> None:
    sink = FakeSink()
    writer = Writer(sink, 1000, "block", NEVER)
    for i in range(100):
        writer.put(_step(i))
    writer.close("stop", SOON)
    assert sink.consumed == list(range(100))
    assert sink.calls == ["consume"] * 100 + ["close stop"]
    assert sink.threads == {"moe-routes-writer"}
    assert writer.waiting_bytes == 0
    assert writer.error is None


def test_the_thread_is_a_daemon_and_ends_with_the_recording() -> None:
    writer = Writer(FakeSink(), 1000, "block", NEVER)
    thread = writer._thread
    assert thread in _writers()
    assert thread.daemon
    writer.close("stop", SOON)
    thread.join(SOON)
    assert not thread.is_alive()


def test_a_row_reaches_the_file_soon_though_no_other_step_comes() -> None:
    sink = FakeSink()
    writer = Writer(sink, 1000, "block", 0.05)
    writer.put(_step(0))
    assert sink.flushed.wait(SOON)
    writer.close("stop", SOON)
    assert sink.calls == ["consume", "flush", "close stop"]


def test_rows_reach_the_file_while_steps_keep_coming() -> None:
    sink = FakeSink()
    writer = Writer(sink, 1 << 20, "block", 0.05)
    give_up = time.monotonic() + SOON
    i = 0
    while not sink.flushed.is_set() and time.monotonic() < give_up:
        writer.put(_step(i))
        time.sleep(0.01)
        i += 1
    assert sink.flushed.is_set()
    writer.close("stop", SOON)


def test_not_every_step_is_flushed() -> None:
    sink = FakeSink()
    writer = Writer(sink, 1000, "block", NEVER)
    for i in range(20):
        writer.put(_step(i))
    writer.close("stop", SOON)
    assert "flush" not in sink.calls


def test_an_idle_writer_does_nothing() -> None:
    sink = FakeSink()
    writer = Writer(sink, 1000, "block", 0.01)
    writer.put(_step(0))
    assert sink.flushed.wait(SOON)
    time.sleep(0.1)
    assert sink.calls == ["consume", "flush"]
    writer.close("stop", SOON)


def test_passes_gather_before_they_are_written() -> None:
    sink = FakeSink()
    writer = Writer(sink, 1 << 20, "block", NEVER)
    seen: list[int] = []
    sink.before = lambda: seen.append(writer.waiting_steps)
    for i in range(5):
        writer.put(_step(i))
    writer.drain(SOON)
    assert sink.consumed == list(range(5))
    assert seen == [5, 4, 3, 2, 1], "none was written before the last was put"
    writer.close("stop", SOON)


def test_draining_leaves_nothing_waiting_and_gives_up_in_time() -> None:
    sink = FakeSink(open_gate=False)
    writer = Writer(sink, 1 << 20, "block", NEVER)
    writer.put(_step(0))
    writer.drain(0.05)
    assert writer.waiting_steps == 1
    sink.gate.set()
    writer.drain(SOON)
    assert writer.waiting_steps == 0 and sink.consumed == [0]
    writer.close("stop", SOON)
    writer.drain(SOON)  # nothing is left to wait for


def test_a_queue_that_fills_is_taken_before_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.moe_routes.writing.writer.GATHER_SECONDS", NEVER)
    sink = FakeSink()
    writer = Writer(sink, 800, "block", NEVER)
    writer.put(_step(0, 99))
    assert not sink.at_gate.wait(0.1)
    writer.put(_step(1, 1))
    assert sink.at_gate.wait(SOON)
    writer.close("stop", SOON)


# ---- a full queue --------------------------------------------------------------------------


def test_block_waits_for_room_and_loses_nothing() -> None:
    sink = FakeSink(open_gate=False)
    writer = Writer(sink, 100, "block", NEVER)
    writer.put(_step(0, 60))
    writer.put(_step(1, 40))
    with _putting(writer, _step(2, 40)) as thread:
        assert _held_up(thread)
        assert writer.waiting_bytes == 100
        sink.gate.set()
    writer.close("stop", SOON)
    assert sink.consumed == [0, 1, 2]
    assert sink.dropped == []


def test_a_step_counts_as_waiting_until_it_is_written() -> None:
    sink = FakeSink(open_gate=False)
    writer = Writer(sink, 100, "block", NEVER)
    writer.put(_step(0, 60))
    assert sink.at_gate.wait(SOON)  # the thread has it, but has not written it
    with _putting(writer, _step(1, 60)) as thread:
        assert _held_up(thread)
        assert writer.waiting_bytes == 60
        sink.gate.set()
    writer.close("stop", SOON)


def test_drop_never_waits_and_drops_exactly_what_finds_no_room() -> None:
    sink = FakeSink(open_gate=False)
    writer = Writer(sink, 100, "drop", NEVER)
    for i, nbytes in enumerate([60, 60, 40, 1, 0]):
        writer.put(_step(i, nbytes))
    assert writer.waiting_bytes == 100
    sink.gate.set()
    writer.close("stop", SOON)
    assert sink.consumed == [0, 2, 4]
    assert sink.dropped == [1, 3]


def test_a_dropped_pass_keeps_its_place_and_what_it_says_of_requests() -> None:
    """Its requests moved on, or ended: only the routes are gone."""
    seen: list[Step] = []

    class Keeping(FakeSink):
        def consume(self, step: Step) -> None:
            super().consume(step)
            seen.append(step)

    sink = Keeping(open_gate=False)
    writer = Writer(sink, 100, "drop", NEVER)
    steps = [_step(i, 100)._replace(finished=[f"{i}"]) for i in range(3)]
    for step in steps:
        writer.put(step)
    sink.gate.set()
    writer.close("stop", SOON)
    assert seen == [steps[0], *(step._replace(pending=None) for step in steps[1:])]


@pytest.mark.parametrize("on_full", ["block", "drop"])
def test_a_step_larger_than_the_queue_is_let_in_when_the_queue_is_empty(on_full: str) -> None:
    sink = FakeSink()
    writer = Writer(sink, 100, on_full, NEVER)
    with _putting(writer, _step(0, 1000)):
        pass
    writer.close("stop", SOON)
    assert sink.consumed == [0]


def test_a_step_without_routes_never_waits_for_room() -> None:
    """A request's end is one; a shutdown that waited for it could run out of time."""
    sink = FakeSink(open_gate=False)
    writer = Writer(sink, 100, "block", NEVER)
    writer.put(_step(0, 1000))
    with _putting(writer, _step(1, 0)):
        pass
    sink.gate.set()
    writer.close("stop", SOON)
    assert sink.consumed == [0, 1]


def test_a_step_larger_than_the_queue_waits_for_the_others_first() -> None:
    sink = FakeSink(open_gate=False)
    writer = Writer(sink, 100, "block", NEVER)
    writer.put(_step(0, 10))
    with _putting(writer, _step(1, 1000)) as thread:
        assert _held_up(thread)
        sink.gate.set()
    writer.close("stop", SOON)
    assert sink.consumed == [0, 1]


@QUICK
@given(
    sizes=st.lists(st.integers(0, 150), max_size=30),
    on_full=st.sampled_from(["block", "drop"]),
    flush_seconds=st.sampled_from([0.0001, NEVER]),
)
def test_the_queue_never_holds_more_than_its_bound_and_every_step_is_accounted_for(
    sizes: list[int], on_full: str, flush_seconds: float
) -> None:
    sink = FakeSink()
    writer = Writer(sink, 100, on_full, flush_seconds)
    waiting: list[int] = []
    sink.before = lambda: waiting.append(writer.waiting_bytes)
    for i, nbytes in enumerate(sizes):
        writer.put(_step(i, nbytes))
        waiting.append(writer.waiting_bytes)
    writer.close("stop", SOON)
    assert all(held <= 100 or held in sizes for held in waiting)
    assert sorted(sink.consumed + sink.dropped) == list(range(len(sizes)))
    assert sink.consumed == sorted(sink.consumed)
    if on_full == "block":
        assert sink.dropped == []
    assert writer.waiting_bytes == 0


# ---- errors --------------------------------------------------------------------------------


def _failing_at(i: int, open_gate: bool = True) -> FakeSink:
    sink = FakeSink(open_gate)
    sink.fail["consume"], sink.fail_at = OSError(28, "No space left on device"), i
    return sink


def test_an_error_stops_recording_is_kept_and_told_at_the_end() -> None:
    sink = _failing_at(2)
    writer = Writer(sink, 1000, "block", NEVER)
    for i in range(5):
        writer.put(_step(i))
    with pytest.raises(RouteLogError, match="No space left on device") as caught:
        writer.close("stop", SOON)
    assert str(caught.value) == writer.error
    assert "/logs/x.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sink.consumed == [0, 1]
    assert sink.lost == [2, 3, 4]
    assert sink.calls == ["consume", "consume", "abandon"]  # no end record: it would look complete


@pytest.mark.parametrize("on_full", ["block", "drop"])
def test_after_an_error_no_put_waits_and_every_step_is_counted(on_full: str) -> None:
    sink = _failing_at(0)
    writer = Writer(sink, 100, on_full, NEVER)
    writer.put(_step(0))
    with _putting(writer, *[_step(i, 100) for i in range(1, 50)]):
        pass
    with pytest.raises(RouteLogError):
        writer.close("stop", SOON)
    assert sink.lost == list(range(50))


def test_an_error_frees_a_put_that_waits_for_room() -> None:
    sink = _failing_at(0, open_gate=False)
    writer = Writer(sink, 100, "block", NEVER)
    writer.put(_step(0, 100))
    with _putting(writer, _step(1, 100), _step(2, 100)) as thread:
        assert _held_up(thread)
        sink.gate.set()
    with pytest.raises(RouteLogError):
        writer.close("stop", SOON)
    assert sink.lost == [0, 1, 2]


def test_an_error_while_flushing_stops_recording_too() -> None:
    sink = FakeSink()
    sink.fail["flush"] = OSError(5, "Input/output error")
    writer = Writer(sink, 1000, "block", 0.01)
    writer.put(_step(0))
    give_up = time.monotonic() + SOON
    while writer.error is None and time.monotonic() < give_up:
        time.sleep(0.005)
    writer.put(_step(1))
    with pytest.raises(RouteLogError, match="Input/output error"):
        writer.close("stop", SOON)
    assert sink.lost == [1]
    assert sink.calls == ["consume", "flush", "abandon"]


def test_an_error_while_closing_is_told() -> None:
    sink = FakeSink()
    sink.fail["close stop"] = OSError(28, "No space left on device")
    writer = Writer(sink, 1000, "block", NEVER)
    with pytest.raises(RouteLogError, match="No space left"):
        writer.close("stop", SOON)
    assert sink.calls == ["close stop", "abandon"]


def test_any_kind_of_error_is_held_back_from_the_engine() -> None:
    sink = _failing_at(0)
    sink.fail["consume"] = IndexError("anything")
    writer = Writer(sink, 1000, "block", NEVER)
    writer.put(_step(0))
    with pytest.raises(RouteLogError, match="IndexError: anything"):
        writer.close("stop", SOON)


# ---- closing -------------------------------------------------------------------------------


def test_closing_writes_what_waits_first() -> None:
    sink = FakeSink(open_gate=False)
    writer = Writer(sink, 1000, "block", NEVER)
    for i in range(10):
        writer.put(_step(i))
    threading.Timer(0.05, sink.gate.set).start()
    writer.close("shutdown", SOON)
    assert sink.consumed == list(range(10))
    assert sink.calls[-1] == "close shutdown"


def test_closing_that_takes_too_long_says_what_still_waits_and_goes_on() -> None:
    sink = FakeSink(open_gate=False)
    writer = Writer(sink, 1000, "block", NEVER)
    for i in range(3):
        writer.put(_step(i))
    with pytest.raises(RouteLogError, match=r"not closed within 0.05 s: 3 passes still wait"):
        writer.close("stop", 0.05)
    sink.gate.set()
    writer._thread.join(SOON)
    assert sink.consumed == [0, 1, 2]
    assert sink.calls[-1] == "close stop"


def test_many_recordings_leave_no_thread() -> None:
    before = _writers()
    for _ in range(20):
        writer = Writer(FakeSink(), 1000, "block", NEVER)
        writer.put(_step(0))
        writer.close("stop", SOON)
    assert _writers() == before


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_the_writer_runs_on_every_core_of_the_process_not_on_the_engines_alone() -> None:
    """vLLM binds the engine thread to one core, and a thread inherits its starter's cores."""
    every = os.sched_getaffinity(0)
    found: list[set[int]] = []
    sink = FakeSink()
    sink.before = lambda: found.append(os.sched_getaffinity(0))

    def engine() -> None:
        os.sched_setaffinity(0, {min(every)})
        writer = Writer(sink, 1 << 20, "block", 1.0)
        writer.put(a_step())
        writer.close("stop", SOON)

    thread = threading.Thread(target=engine)
    thread.start()
    thread.join()
    assert found == [every]
