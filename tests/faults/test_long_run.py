# SPDX-License-Identifier: Apache-2.0
"""A day at a server, compressed: memory, files and threads stay flat."""

from __future__ import annotations

import os
import resource
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.moe_routes.recorder import control

from tests.faults.load import Load, arm
from tests.faults.table import FULL, Row, left_out, lost, note

pytestmark = pytest.mark.timeout(3000)

#: Passes of the run, and recordings it is divided into.
PASSES = 60_000 if FULL else 1_200
RECORDINGS = 24 if FULL else 6


def _do(runner: Any, command: str, **options: Any) -> dict[str, Any]:
    return control(SimpleNamespace(model_runner=runner), command, **options)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _handles() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_day_of_recordings_leaves_memory_files_and_threads_flat(tmp_path: Path) -> None:
    runner = arm(
        tmp_path / "unused.jsonl", autostart=False, max_bytes=8 << 20, on_max="rotate", api=True
    )
    load = Load(runner)
    seen: list[tuple[int, int, int]] = []
    started = time.monotonic()
    for turn in range(RECORDINGS):
        path = tmp_path / f"{turn}.jsonl"
        assert _do(runner, "start", path=str(path))["ok"]
        before = load.rows
        for _ in range(PASSES // RECORDINGS):
            load.step(new=8)
        assert _do(runner, "stop")["ok"]
        totals = _do(runner, "status")["so_far"]
        held = 0
        for name in _do(runner, "status")["files"]:
            held += Path(name).read_bytes().count(b'{"type":"route"')
            Path(name).unlink()
        rows = load.rows - before
        note(Row("long run", 1, rows, totals["rows"], held, lost(totals), left_out(totals)))
        seen.append((_resident_bytes(), _handles(), threading.active_count()))
    seconds = time.monotonic() - started
    print(f"{load.rows:,} rows in {seconds:.1f} s, {load.rows / seconds:,.0f} rows/s")
    print("resident MiB:", [f"{memory / 2**20:.1f}" for memory, _, _ in seen])
    first = seen[1]  # the first recording loads what is loaded once
    assert {handles for _, handles, _ in seen[1:]} == {first[1]}
    assert {threads for *_, threads in seen[1:]} == {first[2]}
    assert seen[-1][0] - first[0] < 48 << 20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_recording_of_many_requests_keeps_what_it_says_it_keeps(tmp_path: Path) -> None:
    """Ids already given, some 100 bytes a request: the README says so."""
    runner = arm(tmp_path / "x.jsonl")
    load = Load(runner, tokens=2)
    sink: Any = runner.moe_routes._recording._log  # type: ignore[union-attr]
    for _ in range(200):
        load.step(new=8)
    while _do(runner, "status")["waiting_passes"]:
        time.sleep(0.001)
    book = sink.current._book
    assert len(book._live) <= 16
    assert len(book._taken) == load._next
    recording: Any = runner.moe_routes._recording  # type: ignore[union-attr]
    assert len(recording._known) <= 16
    assert _do(runner, "stop")["ok"]
