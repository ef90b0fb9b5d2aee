# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment: what was flushed is readable, the cut is named, no name is used twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vllm.moe_routes.errors import RouteLogError

from expert_profiler.log import open_log
from tests.faults.load import arm
from tests.faults.table import FULL, Row, end_of, lost, note, routes_in
from tests.support.paths import REPO

pytestmark = pytest.mark.timeout(600)

KILLS = 40 if FULL else 4
FLUSH_SECONDS = 0.05


class RecorderProcesses:
    """Recorders in processes of their own, forked from one that has imported everything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forked_recorders"],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, log: Path, seconds: float, how: int, **switches: str) -> list[tuple[float, int]]:
        """Let one record, end it with signal ``how``; (time, rows executed) after every pass."""
        told = log.with_name(log.name + ".told")
        words = [str(log), str(told), str(seconds), str(int(how))]
        words += [f"{name}={value}" for name, value in switches.items()]
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\t".join(words) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ended "):
                break
        whole = told.read_bytes().rpartition(b"\n")[0].decode()
        told.unlink()
        return [(float(t), int(n)) for t, n in (line.split() for line in whole.splitlines())]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture(scope="module")
def recorders():  # type: ignore[no-untyped-def]
    running = RecorderProcesses()
    yield running
    running.close()


def _moments(n: int) -> list[float]:
    rng = random.Random(7)
    return [rng.uniform(0.0, 1.0) for _ in range(n)]


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_what_was_not_flushed_and_nothing_else(
    recorders: RecorderProcesses, tmp_path: Path
) -> None:
    for i, seconds in enumerate(_moments(KILLS)):
        log = tmp_path / f"{i}.jsonl"
        told = recorders.run(
            log, seconds, signal.SIGKILL, VLLM_LOG_MOE_FLUSH_SECONDS=str(FLUSH_SECONDS)
        )
        executed = told[-1][1] if told else 0
        held = routes_in(log)
        # The last pass may have ended after the process was last heard of.
        executed = max(executed, held)
        note(Row("kill -9 of the recorder", 1, executed, held, held, executed - held))
        assert end_of(log) is None
        if held:
            with open_log(log) as found:
                assert any("cut short" in text for text in found.lost_rows), "the cut is named"
                assert found.num_rows + found.rows_flagged == held
        before = log.read_bytes()
        with pytest.raises(RouteLogError, match="exists"):
            arm(log)
        assert log.read_bytes() == before, "never appended to"


def test_what_a_flush_handed_over_survives_the_kill(
    recorders: RecorderProcesses, tmp_path: Path
) -> None:
    """Rows older than the flush interval, and the time a busy machine takes, are in the file."""
    slack = 1.0
    for i in range(KILLS):
        log = tmp_path / f"{i}.jsonl"
        told = recorders.run(log, slack + 0.8, signal.SIGKILL, VLLM_LOG_MOE_FLUSH_SECONDS="0.05")
        killed = told[-1][0]
        old = [n for t, n in told if t < killed - FLUSH_SECONDS - slack]
        assert old, "the run was long enough to tell"
        assert routes_in(log) >= old[-1]


def test_a_killed_parquet_log_holds_whole_parts_only(
    recorders: RecorderProcesses, tmp_path: Path
) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    for i, seconds in enumerate(_moments(max(2, KILLS // 4))):
        log = tmp_path / f"{i}.parquet"
        told = recorders.run(log, seconds + 0.3, signal.SIGKILL, PART_ROWS="3000")
        held = sum(pq.read_table(part).num_rows for part in log.glob("*.parquet"))
        executed = max(told[-1][1], held)
        note(Row("kill -9, Parquet", 1, executed, held, held, executed - held))
        assert all(
            b"moe_routes.end" not in (pq.read_metadata(part).metadata or {})
            for part in log.glob("*.parquet")
        )
        with pytest.raises(RouteLogError, match="exists"):
            arm(log)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_ends_the_process_ends_the_log(
    recorders: RecorderProcesses, tmp_path: Path, how: signal.Signals
) -> None:
    """In a process that turns it into an exit, as vLLM's workers do; in the middle of a pass."""
    for i, seconds in enumerate(_moments(KILLS)):
        log = tmp_path / f"{i}.jsonl"
        told = recorders.run(log, 0.05 + seconds / 2, how)
        end = end_of(log)
        assert end is not None and end["reason"] == "shutdown"
        held = routes_in(log)
        assert end["rows"] == held
        executed = max(told[-1][1], held)
        note(Row(f"{how.name} of the recorder", 1, executed, held, held, lost(end)))
        assert end["self_check"]["checks"][0]["verdict"] == "pass"


@pytest.mark.slow
def test_a_worker_stuck_in_a_collective_still_ends_its_log(tmp_path: Path) -> None:
    """vLLM's SIGTERM never reaches its main thread, and SIGKILL comes a second later."""
    log = tmp_path / "x.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.stuck", str(log), str(tmp_path / "store")],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    line = next(line for line in process.stdout if line.split()[0].isdigit())
    worker, executed = map(int, line.split())
    time.sleep(2)  # until it waits
    os.kill(worker, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while end_of(log) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    end = end_of(log)
    handled = log.with_name("x.jsonl.handled").exists()
    process.stdin.close()
    process.wait(60)
    assert not handled, "the handler ran: this test shows nothing"
    assert end is not None and end["reason"] == "shutdown"
    held = routes_in(log)
    note(Row("SIGTERM of a worker stuck in a collective", 1, executed, held, held, lost(end)))
    assert end["passes_unfinished"] == 1, "the pass that it was stuck in"


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["fork", pytest.param("spawn", marks=pytest.mark.skipif(not FULL, reason="long form"))],
)
def test_an_exit_in_the_midst_of_closing_still_ends_the_log(tmp_path: Path, method: str) -> None:
    """vLLM's SIGTERM comes any time, and its handler raises where the thread happens to be."""
    log = tmp_path / "x.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.interrupted", str(log), method],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
    )
    executed, met = done.stdout.splitlines()[-1].split()
    assert met == "shutdown", "the exception came elsewhere: this test shows nothing"
    end = end_of(log)
    assert end is not None and end["reason"] == "shutdown"
    held = routes_in(log)
    note(Row("SIGTERM while the log is closed", 1, int(executed), held, held, lost(end)))
    assert held == end["rows"] == int(executed)
