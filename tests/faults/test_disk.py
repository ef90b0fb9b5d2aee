# SPDX-License-Identifier: Apache-2.0
"""The disk fails: generation goes on, and the rows still add up."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.recorder import control
from vllm.moe_routes.writing.formats.linefile import LineFile

from tests.faults.load import Load, arm
from tests.faults.table import FULL, Row, end_of, left_out, lost, note, routes_in
from tests.support.build import QUICK

pytestmark = pytest.mark.timeout(240)

MANY = settings(QUICK, max_examples=400 if FULL else 40)
PASSES = 400 if FULL else 60


def _do(runner: Any, command: str, **options: Any) -> dict[str, Any]:
    return control(SimpleNamespace(model_runner=runner), command, **options)


class FailingDisk:
    """Takes the place of ``LineFile._write``: short writes, and an error between two offsets.

    Args:
        write: the real one.
        first, last: bytes of the file that can't be written.
        code: the error.
        piece: most bytes that one call writes.
    """

    def __init__(
        self, write: Callable[[bytes, int], int], first: int, last: float, code: int, piece: int
    ) -> None:
        self._write = write
        self._first, self._last, self._code, self._piece = first, last, code, piece
        self.failed = 0

    def __call__(self, data: bytes, offset: int) -> int:
        room = self._first - offset if offset < self._last else self._piece
        if room <= 0:
            self.failed += 1
            raise OSError(self._code, os.strerror(self._code))
        return self._write(data[: min(room, self._piece)], offset)


def _file_of(runner: Any) -> LineFile:
    file: LineFile = runner.moe_routes._recording._log.current._file._file
    return file


def _account(fault: str, runner: Any, load: Load, path: Path, times: int = 1) -> dict[str, Any]:
    """Stop, hold file and status against what was executed, and note it."""
    answer = _do(runner, "stop")
    status = _do(runner, "status")
    totals = status["so_far"]
    held = routes_in(path) if path.exists() else 0
    note(Row(fault, times, load.rows, totals["rows"], held, lost(totals), left_out(totals)))
    end = end_of(path) if path.exists() else None
    if end is not None:
        assert (end["rows"], lost(end)) == (held, lost(totals)), "file and status say the same"
        assert (end["reason"] == "error") == (answer["ok"] is False)
    return {**answer, "end_record": end, "status": status}


@MANY
@given(
    first=st.integers(600, 40_000),
    length=st.one_of(st.integers(1, 5_000), st.just(1e18)),
    code=st.sampled_from([errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG]),
    piece=st.integers(1, 8_192),
    flush_seconds=st.sampled_from([0.01, 3600.0]),
)
def test_a_write_that_fails_anywhere_loses_no_row_unreported(
    tmp_path_factory: pytest.TempPathFactory,
    first: int,
    length: float,
    code: int,
    piece: int,
    flush_seconds: float,
) -> None:
    path = tmp_path_factory.mktemp("disk") / "x.jsonl"
    runner = arm(path, flush_seconds=flush_seconds)
    file = _file_of(runner)
    disk = FailingDisk(file._write, first, first + length, code, piece)
    file._write = disk  # type: ignore[method-assign]
    load = Load(runner)
    for _ in range(12):
        load.step()
    answer = _account("write fails at a random byte", runner, load, path)
    if disk.failed and answer["ok"] is False:
        assert os.strerror(code) in answer["error"]
        assert answer["status"]["self_check"]["verdict"] == "fail"
    else:
        assert answer["end_record"]["reason"] == "stop"


def test_every_row_of_every_request_is_still_told_apart_after_a_cut(tmp_path: Path) -> None:
    """What is kept is whole lines, in order, from the first one on."""
    path = tmp_path / "x.jsonl"
    runner = arm(path, flush_seconds=3600)
    file = _file_of(runner)
    file._write = FailingDisk(file._write, 20_000, 1e18, errno.EIO, 777)  # type: ignore[method-assign]
    whole = tmp_path / "whole.jsonl"
    other = arm(whole)
    loads = [Load(runner), Load(other)]
    for _ in range(40):
        for load in loads:
            load.step()
    _do(runner, "stop")
    _do(other, "stop")
    cut = [line for line in path.read_bytes().splitlines() if b'"type":"route"' in line]
    full = [line for line in whole.read_bytes().splitlines() if b'"type":"route"' in line]
    assert 0 < len(cut) < len(full)
    assert cut == full[: len(cut)]


def test_per_pass_logs_add_up_too(tmp_path: Path) -> None:
    path = tmp_path / "passes.jsonl"
    runner = arm(path, mode="per_pass", flush_seconds=3600)
    file = _file_of(runner)
    disk = FailingDisk(file._write, 6_000, 1e18, errno.ENOSPC, 500)
    file._write = disk  # type: ignore[method-assign]
    load = Load(runner)
    for _ in range(40):
        load.step()
    assert _do(runner, "stop")["ok"] is False
    totals = _do(runner, "status")["so_far"]
    end = end_of(path)
    assert disk.failed and end is not None, "the last lines made room for the end record"
    assert (end["rows"], lost(end)) == (totals["rows"], lost(totals))
    passes = [line for line in path.read_bytes().splitlines() if b'"type":"pass"' in line]
    assert 0 < len(passes) < 40
    assert totals["rows"] + lost(totals) == load.rows


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if (
        not mounted
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=64", "tmpfs", str(folder)],
            capture_output=True,
        ).returncode
    ):
        pytest.skip("a small file system can't be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_in_the_file_itself(small_disk: Path) -> None:
    path = small_disk / "x.jsonl"
    runner = arm(path, flush_seconds=0.01)
    load = Load(runner)
    while _do(runner, "status")["error"] is None:
        load.step()
    for _ in range(20):
        load.step()
    answer = _account("disk full (tmpfs of 1 MiB)", runner, load, path)
    assert "No space left on device" in answer["error"]
    end = answer["end_record"]
    assert end is not None and end["reason"] == "error", "the last rows made room for it"
    assert "No space left on device" in end["error"]


def test_a_full_disk_that_is_freed_gets_its_end_record(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(700_000))
    path = small_disk / "x.jsonl"
    runner = arm(path, flush_seconds=0.01)
    load = Load(runner)
    while _do(runner, "status")["error"] is None:
        load.step()
    before = _do(runner, "status")["so_far"]["rows"]
    ballast.unlink()
    answer = _account("disk full, then freed", runner, load, path)
    assert answer["end_record"]["rows"] == before, "no row had to go for it"


def test_a_full_disk_under_parquet(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    from vllm.moe_routes.writing.formats import parquet

    monkeypatch.setattr(parquet, "PART_ROWS", 500)
    (small_disk / "ballast").write_bytes(bytes(800_000))
    path = small_disk / "x.parquet"
    runner = arm(path)
    load = Load(runner)
    for _ in range(2000):
        load.step()
        if _do(runner, "status")["error"]:
            break
    answer = _do(runner, "stop")
    assert "No space left" in answer["error"]
    totals = _do(runner, "status")["so_far"]
    held = sum(pq.read_metadata(part).num_rows for part in path.glob("*.parquet"))
    note(Row("disk full, Parquet", 1, load.rows, totals["rows"], held, lost(totals)))
    assert not [item for item in small_disk.iterdir() if item.name.startswith(".")], "no scratch"


def test_a_disk_that_turns_read_only(small_disk: Path) -> None:
    path = small_disk / "x.jsonl"
    runner = arm(path, flush_seconds=0.01)
    load = Load(runner)
    for _ in range(20):
        load.step()
    # An open file keeps a remount away, so the file is asked for its error where it is written.
    file = _file_of(runner)
    disk = FailingDisk(file._write, 0, 1e18, errno.EROFS, 1)
    file._write = disk  # type: ignore[method-assign]
    for _ in range(20):
        load.step()
    answer = _account("disk turns read-only", runner, load, path)
    assert "Read-only file system" in answer["error"]
    assert answer["end_record"] is None


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_log_that_is_removed_is_noticed_and_all_its_rows_are_lost(
    tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    path = folder / "x.jsonl"
    runner = arm(path, flush_seconds=0.01)
    load = Load(runner)
    for _ in range(10):
        load.step()
    path.unlink() if what == "file" else shutil.rmtree(folder)
    for _ in range(10):
        load.step()
    answer = _account("file or folder removed", runner, load, path)
    assert "was removed" in answer["error"]
    assert answer["status"]["so_far"]["rows"] == 0


def test_a_log_that_somebody_else_cuts_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    runner = arm(path, flush_seconds=0.01)
    load = Load(runner)
    header = path.stat().st_size
    load.step()
    while path.stat().st_size == header:
        time.sleep(0.001)
    os.truncate(path, 0)
    load.step()
    answer = _do(runner, "stop")
    assert "was changed by somebody else" in answer["error"]
    totals = _do(runner, "status")["so_far"]
    assert (totals["rows"], lost(totals)) == (0, load.rows)


def test_a_parquet_part_that_is_removed_is_noticed(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    runner = arm(path)
    load = Load(runner)
    sink = runner.moe_routes._recording._log  # type: ignore[union-attr]
    for i in range(40):
        load.step()
        if i % 10 == 9:
            while _do(runner, "status")["waiting_passes"]:
                time.sleep(0.001)
            sink.flush()
    (path / "part-000002.parquet").unlink()
    answer = _do(runner, "stop")
    assert "part 2 was removed" in answer["error"]
    totals = _do(runner, "status")["so_far"]
    held = sum(pq.read_metadata(part).num_rows for part in path.glob("*.parquet"))
    note(Row("Parquet part removed", 1, load.rows, totals["rows"], held, lost(totals)))
    assert 0 < held < load.rows


def test_a_slow_disk_keeps_the_queue_in_its_bound_and_drops_are_exact(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    runner = arm(path, on_full="drop", queue_bytes=20_000, flush_seconds=0.01)
    file = _file_of(runner)
    write = file._write

    def slow(data: bytes, offset: int) -> int:
        time.sleep(0.02)
        return write(data, offset)

    file._write = slow  # type: ignore[method-assign]
    load = Load(runner)
    most = 0
    for _ in range(PASSES):
        load.step()
        most = max(most, _do(runner, "status")["waiting_bytes"])
    answer = _account("slow disk, on_full=drop", runner, load, path)
    assert most <= 20_000
    assert answer["status"]["so_far"]["drops"]["queue_full"] > 0


def test_a_slow_disk_holds_the_engine_up_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    runner = arm(path, on_full="block", queue_bytes=20_000, flush_seconds=0.01)
    file = _file_of(runner)
    write = file._write

    def slow(data: bytes, offset: int) -> int:
        time.sleep(0.005)
        return write(data, offset)

    file._write = slow  # type: ignore[method-assign]
    load = Load(runner)
    for _ in range(PASSES):
        load.step()
        assert _do(runner, "status")["waiting_bytes"] <= 20_000
    answer = _account("slow disk, on_full=block", runner, load, path)
    assert lost(answer["status"]["so_far"]) == 0


def test_a_disk_without_room_for_the_header_refuses_the_start_and_leaves_nothing(
    small_disk: Path,
) -> None:
    with pytest.raises(OSError, match="space"):
        (small_disk / "ballast").write_bytes(bytes(2 << 20))
    with pytest.raises(RouteLogError, match=r"can't be created \(No space left on device\)"):
        arm(small_disk / "x.jsonl")
    assert not (small_disk / "x.jsonl").exists()


def test_a_quota_on_the_file_size_stops_the_recording_and_not_the_process(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, which sends a signal too."""
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "x.jsonl"
    runner = arm(path, flush_seconds=0.01)
    load = Load(runner)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, old[1]))
    try:
        while _do(runner, "status")["error"] is None:
            load.step()
        for _ in range(10):
            load.step()
        answer = _account("quota (RLIMIT_FSIZE)", runner, load, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "File too large" in answer["error"]
    assert answer["end_record"]["reason"] == "error"
