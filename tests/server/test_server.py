# SPDX-License-Identifier: Apache-2.0
"""The routes and the page on a real ``vllm serve``, with completions of the official client."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from expert_profiler.run.tiny_model import TinyMoeSpec, build
from tests.support import browser
from tests.support.paths import REPO
from tests.support.served import VllmServer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(420)]

LAYERS = 4
TOP_K = 4
PROMPTS = [f"{i} bakers fill {i + 3} trays with rolls. " * (1 + i % 3) for i in range(6)]
MANUAL = REPO / "docs" / "server.md"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmServer, VllmServer]]:
    """One with the routes and one without the variable, on the same checkpoint."""
    folder = tmp_path_factory.mktemp("serve")
    build(folder / "model", TinyMoeSpec(layers=LAYERS))
    # A folder of its own, as serve.sh gives it one.
    env = {"VLLM_LOG_MOE_API": "1", "VLLM_LOG_MOE_DIR": str(folder / "with" / "recordings")}
    both = (
        VllmServer(folder / "model", folder / "with", env),
        VllmServer(folder / "model", folder / "without", {}),
    )
    try:
        for item in both:
            item.wait()
        yield both
    finally:
        for item in both:
            item.stop()


@pytest.fixture
def server(servers: tuple[VllmServer, VllmServer]) -> Iterator[VllmServer]:
    """The one with the routes; not recording, before and after."""
    yield servers[0]
    if servers[0].status()["recording"]:
        servers[0].post("stop")


def complete(server: VllmServer, prompts: list[str], max_tokens: int = 12) -> list[Any]:
    """One request after the other, greedily."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    return [
        client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        for prompt in prompts
    ]


def at_once(server: VllmServer, prompts: list[str], max_tokens: int = 12) -> list[Any]:
    """All requests at the same time."""

    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            calls = [
                client.completions.create(
                    model="tiny",
                    prompt=prompt,
                    max_tokens=max_tokens,
                    temperature=0,
                    extra_body={"ignore_eos": True},
                )
                for prompt in prompts
            ]
            return list(await asyncio.gather(*calls))

    return asyncio.run(run())


def executed(completions: list[Any]) -> int:
    """Tokens that the model saw: the last generated one of a request is never forwarded."""
    return sum(c.usage.prompt_tokens + c.usage.completion_tokens - 1 for c in completions)


def total_of(dump: dict[str, Any]) -> np.ndarray:
    """[L, E] choices."""
    (worker,) = dump["workers"]
    return np.sum([worker["counts"][kind] for kind in worker["counts"]], axis=0)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curls() -> list[str]:
    """The commands of the manual on the server, in order."""
    text = MANUAL.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    commands = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in commands.splitlines() if line.startswith("curl")]


def test_every_curl_of_the_manual_runs_as_written(server: VllmServer) -> None:
    commands = curls()
    routes = ("configure", "start", "stop", "reset", "dump", "status", "/v1/completions")
    assert all(any(route in command for command in commands) for route in routes)
    answers = []
    for command in commands:
        command = command.replace("http://localhost:8000", server.url).partition(" | ")[0]
        command = re.sub(r'"model": "[^"]*"', '"model": "tiny"', command)
        done = subprocess.run(
            [*shlex.split(command), "--silent", "--show-error"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        answers.append(json.loads(done.stdout))
        assert answers[-1].get("status", "success") == "success", (command, answers[-1])
    summary = next(answer["summary"] for answer in answers if "summary" in answer)
    assert summary["workers"][0]["num_layers"] == LAYERS


def test_all_modes_count_the_same_requests_alike(server: VllmServer) -> None:
    """One request at a time: in other batches, near-ties may go to another expert."""
    totals = {}
    for mode in ("stat", "per_pass", "per_token"):
        server.post("configure", mode=mode)
        server.post("start")
        tokens = executed(complete(server, PROMPTS))
        dump = server.post("dump", summary_only=False, max_records=1000)
        assert dump == server.post("dump", summary_only=False, max_records=1000)
        files = server.post("stop")["files"]
        totals[mode] = total_of(dump)
        assert totals[mode].sum(axis=1).tolist() == [tokens * TOP_K] * LAYERS
        if mode == "per_pass":
            records = dump["workers"][0]["records"]
            by_pass = np.sum([record["expert_counts"] for record in records], axis=0)
            assert np.array_equal(by_pass, totals[mode])
            (end,) = (
                line for line in lines_of(server.recordings / files[0]) if line["type"] == "end"
            )
            assert np.array_equal(end["expert_counts"], totals[mode])
        if mode == "per_token":
            logged = np.zeros_like(totals[mode])
            for line in lines_of(server.recordings / files[0]):
                if line["type"] == "route":
                    logged[line["layer"], line["topk_ids"]] += 1
            assert np.array_equal(logged, totals[mode])
    assert np.array_equal(totals["stat"], totals["per_pass"])
    assert np.array_equal(totals["stat"], totals["per_token"])


@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token"])
def test_concurrent_completions_are_counted_to_the_token(server: VllmServer, mode: str) -> None:
    server.post("configure", mode=mode)
    server.post("start")
    tokens = executed(at_once(server, PROMPTS * 2))
    dump = server.post("dump", summary_only=False)
    server.post("stop")
    assert total_of(dump).sum(axis=1).tolist() == [tokens * TOP_K] * LAYERS
    (worker,) = dump["summary"]["workers"]
    assert sum(worker["tokens"].values()) == tokens
    assert worker["self_check"]["verdict"] == "pass"
    assert set(worker["drops"].values()) == {0}


def test_the_file_of_a_recording_can_be_followed(server: VllmServer) -> None:
    server.post("configure", mode="per_pass")
    (name,) = server.post("start")["files"]
    complete(server, PROMPTS[:1])
    deadline = threading.Event()
    for _ in range(100):
        lines = (server.recordings / name).read_bytes().splitlines()
        if len(lines) >= 13:
            break
        deadline.wait(0.1)
    assert [json.loads(line)["type"] for line in lines] == ["meta"] + ["pass"] * 12
    modes = [json.loads(line)["forward_mode"] for line in lines[1:]]
    assert modes == ["prefill"] + ["decode"] * 11


class Load(threading.Thread):
    """Completions, one set after the other, until told to stop."""

    def __init__(self, server: VllmServer) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._done = threading.Event()
        self.completions: list[Any] = []
        self.failures: list[BaseException] = []

    def run(self) -> None:
        while not self._done.is_set():
            try:
                self.completions += at_once(self._server, PROMPTS[:4])
            except BaseException as error:
                self.failures.append(error)

    def __enter__(self) -> Load:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


def test_cycles_under_load_lose_no_row_and_change_no_output(
    servers: tuple[VllmServer, VllmServer],
) -> None:
    """30 cycles: start, dump, reset, dump, stop, in all modes in turn, while requests run."""
    server, without = servers
    before = [c.choices[0].token_ids for c in complete(server, PROMPTS)]
    chains: list[list[str]] = []
    with Load(server) as load:
        for cycle in range(30):
            mode = ("per_token", "per_pass", "stat")[cycle % 3]
            server.post("configure", mode=mode)
            started = server.post("start")["files"]
            server.post("dump", summary_only=bool(cycle % 2))
            again = server.post("reset")["files"]
            server.post("dump")
            server.post("stop")
            (worker,) = server.post("dump", summary_only=False)["workers"]
            counted = sum(np.sum(worker["counts"][kind], axis=1) for kind in worker["counts"])
            assert counted.tolist() == [worker["rows"] // LAYERS * TOP_K] * LAYERS
            if mode == "per_token":
                chains.append(started + again)
    assert load.failures == []
    assert len(load.completions) > 20
    assert all(c.usage.completion_tokens == 12 for c in load.completions)
    rows = 0
    for chain in chains:
        rows += _check_chain([lines_of(server.recordings / name) for name in chain])
    assert rows > 0, "some cycles saw a pass"
    server.post("configure", mode="per_token")
    server.post("start")
    while_recording = [c.choices[0].token_ids for c in complete(server, PROMPTS)]
    server.post("stop")
    plain = [c.choices[0].token_ids for c in complete(without, PROMPTS)]
    assert before == while_recording == plain


def _check_chain(parts: list[list[dict[str, Any]]]) -> int:
    """Rows of a recording and of what it went on in after a reset: none twice, no gap."""
    positions: dict[tuple[str, int], list[int]] = defaultdict(list)
    for part in parts:
        end = part[-1]
        assert end["type"] == "end" and end["self_check"]["verdict"] == "pass"
        routes = [line for line in part if line["type"] == "route"]
        assert len(routes) == end["rows"]
        raw = {line["req_id"]: line["raw_id"] for line in part if line["type"] == "request"}
        for line in routes:
            positions[raw[line["req_id"]], line["layer"]].append(line["token_idx"])
    for found in positions.values():
        assert found == list(range(found[0], found[0] + len(found)))
    return len(positions)


def test_without_the_variable_there_is_no_route(servers: tuple[VllmServer, VllmServer]) -> None:
    _, without = servers
    assert without.http.get("/expert_distribution_status").status_code == 404
    assert without.http.get("/expert_distribution").status_code == 404
    assert "moe_routes" not in without.http.get("/metrics").text
    assert "expert_distribution" not in without.http.get("/openapi.json").text


def test_metrics_follow_the_recording(server: VllmServer) -> None:
    server.post("configure", mode="stat")
    server.post("start")
    tokens = executed(complete(server, PROMPTS[:2]))
    shown = dict(
        line.rsplit(" ", 1)
        for line in server.http.get("/metrics").text.splitlines()
        if line.startswith("vllm:moe_routes")
    )
    assert float(shown["vllm:moe_routes_recording"]) == 1
    assert float(shown["vllm:moe_routes_rows"]) == tokens * LAYERS
    assert len(shown) == 5


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "-")
def test_the_page_starts_a_recording_shows_its_counts_and_stops_it(server: VllmServer) -> None:
    with browser.chromium() as page:
        page.open(f"{server.url}/expert_distribution")
        page.start("per_pass")
        tokens = executed(at_once(server, PROMPTS))
        page.wait("the tokens of all requests", lambda: page.number("tokens") == tokens)
        page.stop()
        assert page.complaints() == []
    assert server.status()["recording"] is False
    (worker,) = server.post("dump")["summary"]["workers"]
    assert sum(worker["tokens"].values()) == tokens
