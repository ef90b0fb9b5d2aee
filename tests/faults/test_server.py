"""A real ``vllm serve`` that is killed or interrupted under load."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from expert_profiler.run.tiny_model import TinyMoeSpec, build
from tests.faults.served_load import Clients
from tests.faults.table import FULL, Row, check_cut, end_of, lost, note, routes_in
from tests.support.served import VllmServer

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not FULL, reason="starts servers; python -m tests.faults.full runs it"),
]

LAYERS = 4
#: Rows are in the file this long after their pass (VLLM_LOG_MOE_FLUSH_SECONDS), and what a busy
#: machine takes on top.
FLUSH_SECONDS, SLACK = 1.0, 2.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "shallow"
    build(folder, TinyMoeSpec(layers=LAYERS))
    return folder


def start(model: Path, folder: Path, log: Path) -> VllmServer:
    env = {
        "VLLM_LOG_MOE": str(log),
        "VLLM_LOG_MOE_API": "1",
        "VLLM_LOG_MOE_DIR": str(folder / "recordings"),
    }
    return VllmServer(model, folder, env)


@contextmanager
def serving(model: Path, folder: Path, log: Path) -> Iterator[tuple[VllmServer, list[int]]]:
    """A server that records, and the ids of its process and of its engine's."""
    server = start(model, folder, log)
    everyone: list[psutil.Process] = []
    try:
        server.wait()
        api = psutil.Process(server.pid)
        everyone = [api, *api.children(recursive=True)]
        engines = [p.pid for p in everyone if "EngineCore" in " ".join(p.cmdline())]
        assert len(engines) == 1, [p.cmdline() for p in everyone]
        yield server, engines
    finally:
        server.stop()
        for process in everyone:
            if process.is_running():
                process.kill()


def under_load(server: VllmServer) -> int:
    """Wait for some thousand rows; rows that must be in the file when this returns."""
    deadline = time.monotonic() + 120
    while (rows := server.status()["workers"][0]["rows"]) < 4_000:
        assert time.monotonic() < deadline, f"only {rows} rows under load"
        time.sleep(0.1)
    time.sleep(FLUSH_SECONDS + SLACK)
    return int(rows)


def check_refused(model: Path, folder: Path, log: Path) -> None:
    """A server that is to write to that name again does not start, and says why."""
    before = log.read_bytes()
    server = start(model, folder, log)
    try:
        with pytest.raises(AssertionError, match="did not come up"):
            server.wait()
        assert f"{log} exists" in server.log.read_text(errors="replace")
    finally:
        server.stop()
    assert log.read_bytes() == before, "never appended to"


def test_a_killed_engine_core_leaves_what_was_flushed_and_no_process(
    model: Path, tmp_path: Path
) -> None:
    log = tmp_path / "x.jsonl"
    with serving(model, tmp_path / "one", log) as (server, [engine]):
        everyone = [psutil.Process(server.pid), psutil.Process(engine)]
        with Clients(server.url) as clients:
            flushed = under_load(server)
            os.kill(engine, signal.SIGKILL)
        server.reap(60)
        _, alive = psutil.wait_procs(everyone, 60)
        assert not alive, "vLLM's server notices and goes, and takes the recorder with it"
    held = check_cut(log, flushed, LAYERS)
    print(
        f"engine core killed: {flushed:,} rows told as written {FLUSH_SECONDS + SLACK} s before, "
        f"{held:,} readable; clients saw {clients.executed * LAYERS:,}, {clients.cut} answers cut"
    )
    check_refused(model, tmp_path / "two", log)


def test_a_killed_api_server_leaves_an_engine_that_ends_its_log_when_told(
    model: Path, tmp_path: Path
) -> None:
    """vLLM 0.15.1's engine process does not notice that its server is gone, and works on."""
    log = tmp_path / "x.jsonl"
    with serving(model, tmp_path / "one", log) as (server, [engine]):
        with Clients(server.url) as clients:
            flushed = under_load(server)
            os.kill(server.pid, signal.SIGKILL)
        server.reap(60)
        at_once = routes_in(log)
        assert at_once >= flushed
        orphan = psutil.Process(engine)
        held, deadline = -1, time.monotonic() + 240
        while (now := routes_in(log)) != held:
            assert time.monotonic() < deadline, "it works on forever"
            held = now
            time.sleep(8)
        assert orphan.is_running(), "with vLLM as it is; if it ends by itself, all the better"
        orphan.terminate()
        _, alive = psutil.wait_procs([orphan], 60)
        assert not alive
    end = end_of(log)
    assert end is not None and end["reason"] == "shutdown"
    print(
        f"API server killed: {flushed:,} rows told as written before, {at_once:,} readable at once,"
        f" {held:,} when the engine had nothing left; clients saw {clients.executed * LAYERS:,}"
    )
    # Every request that it had was run to its end: nobody was there to abort one.
    note(
        Row(
            "vllm serve, kill -9 of the API server",
            1, clients.owed * LAYERS, end["rows"], routes_in(log), lost(end),
        )
    )  # fmt: skip
    assert end["self_check"]["verdict"] == "pass"


def test_ctrl_c_under_load_ends_the_log(model: Path, tmp_path: Path) -> None:
    """As a terminal sends it: to the server and to every process that it started."""
    log = tmp_path / "x.jsonl"
    with serving(model, tmp_path / "one", log) as (server, [engine]):
        api, core = psutil.Process(server.pid), psutil.Process(engine)
        with Clients(server.url) as clients:
            under_load(server)
            started = time.monotonic()
            for process in (api, core):
                process.send_signal(signal.SIGINT)
            _, alive = psutil.wait_procs([core], 60)
            assert not alive
            seconds = time.monotonic() - started
            # The server waits for its connections, whose answers can't come any more. It does so
            # without a recorder, too.
            _, alive = psutil.wait_procs([api], 10)
            for process in alive:
                process.kill()
        server.reap(60)
    end = end_of(log)
    assert end is not None and end["reason"] == "shutdown"
    held = routes_in(log)
    print(
        f"engine ended {seconds:.1f} s after Ctrl-C, server {'not ' if alive else ''}within 10 s "
        f"more; clients saw {clients.executed * LAYERS:,} rows of {held:,}"
    )
    assert held >= clients.executed * LAYERS, "every token that a client got is in the file"
    assert lost(end) == 0
    assert end["passes_unfinished"] <= 1
    note(Row("vllm serve, Ctrl-C under load", 1, held + lost(end), end["rows"], held, lost(end)))
