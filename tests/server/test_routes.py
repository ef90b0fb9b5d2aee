# SPDX-License-Identifier: Apache-2.0
"""Every route, over real recorders: what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from prometheus_client import make_asgi_app
from vllm.entrypoints.serve.expert_distribution import engines as engines_module
from vllm.moe_routes import config
from vllm.moe_routes.config import MODES
from vllm.v1.engine.exceptions import EngineDeadError

from tests.support.build import read_lines
from tests.support.fakes import Engines, an_app, isolate

pytestmark = pytest.mark.timeout(60)

CONTROL = (
    "/configure_expert_distribution",
    "/start_expert_distribution",
    "/stop_expert_distribution",
    "/reset_expert_distribution",
    "/dump_expert_distribution",
)
STATUS = "/expert_distribution_status"
PASSES = [
    (("a-0000000a", 5, 5), ("b-0000000b", 3, 3)),
    (("a-0000000a", 1, 5), ("b-0000000b", 1, 3)),
    (("c-0000000c", 4, 4), ("a-0000000a", 1, 5)),
    (("c-0000000c", 1, 4),),
]
TOKENS = 16
PREFILL = 12


class Server:
    """The routes of a set of engines, and the folder that they write to."""

    def __init__(self, engines: Engines, folder: Path, keys: tuple[str, ...] = ()) -> None:
        self.engines = engines
        self.folder = folder
        self.client = TestClient(an_app(engines, keys), raise_server_exceptions=False)

    def post(self, route: str, code: int = 200, **params: Any) -> dict[str, Any]:
        answer = self.client.post(f"/{route}_expert_distribution", params=params)
        assert answer.status_code == code, answer.text
        content: dict[str, Any] = answer.json()
        assert content["status"] == ("success" if code == 200 else "error")
        return content

    def status(self) -> dict[str, Any]:
        content: dict[str, Any] = self.client.get(STATUS).json()
        return content

    def run(self, *passes: tuple[tuple[str, int, int], ...]) -> None:
        for rows in passes or PASSES:
            for engine in range(len(self.engines.core_engines)):
                self.engines.execute(*rows, engine=engine)


Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    isolate(monkeypatch)
    monkeypatch.setenv("VLLM_LOG_MOE_API", "1")
    folder = tmp_path / "recordings"
    monkeypatch.setenv("VLLM_LOG_MOE_DIR", str(folder))
    running: list[Engines] = []

    def serve(keys: tuple[str, ...] = (), **parallel: Any) -> Server:
        running.append(Engines(**parallel))
        return Server(running[-1], folder, keys)

    yield serve
    for engines in running:
        engines.shutdown()


def counts_of(dump: dict[str, Any]) -> dict[int, np.ndarray]:
    """[E] choices by layer, over all kinds of passes and all workers that have the layer."""
    total: dict[int, np.ndarray] = {}
    for worker in dump["workers"]:
        summed = np.sum([np.array(worker["counts"][kind]) for kind in worker["counts"]], axis=0)
        for layer, own in zip(worker["layers"], summed, strict=True):
            total[layer] = total.get(layer, 0) + own
    return total


# ---- the guide -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_recording_answers_in_the_shape_of_the_guide(serve: Serve, mode: str) -> None:
    server = serve()
    assert server.post("configure", mode=mode)["mode"] == mode
    started = server.post("start")
    assert started["recording"] is True
    server.run()
    dump = server.post("dump", summary_only=True)
    assert server.post("stop")["closing"] is False
    assert list(dump)[:3] == ["status", "num_workers", "summary"]
    assert "workers" not in dump
    (worker,) = dump["summary"]["workers"]
    assert list(worker)[:6] == [
        "rank",
        "recording_mode",
        "num_layers",
        "num_experts",
        "num_records",
        "sample_record",
    ]
    assert worker["recording_mode"] == mode
    assert (worker["num_layers"], worker["num_experts"], worker["num_records"]) == (3, 8, 4)
    record = worker["sample_record"]
    assert list(record)[:5] == [
        "forward_pass_id",
        "rank",
        "total_activated_experts",
        "avg_activated_per_layer",
        "expert_utilization",
    ]
    total = record["total_activated_experts"]
    assert isinstance(total, float)
    assert record["avg_activated_per_layer"] == round(total / 3, 3)
    assert record["expert_utilization"] == round(total / 24, 4)
    assert worker["tokens"] == {"prefill": PREFILL, "decode": TOKENS - PREFILL}
    assert worker["passes"] == {"prefill": 1, "decode": 2, "mixed": 1}
    assert worker["expert_choices"] == TOKENS * 2 * 3
    assert worker["self_check"]["verdict"] == "pass"


PARALLEL: list[dict[str, Any]] = [
    {},
    {"tp": 2},
    {"stages": ((1, 3), (4,))},
    {"dp": 2},
    {"stages": ((1,), (3, 4)), "tp": 2, "dp": 2},
]


@pytest.mark.parametrize("parallel", PARALLEL)
def test_all_modes_count_the_same_and_every_choice_once(
    serve: Serve, parallel: dict[str, Any]
) -> None:
    totals = []
    dp = parallel.get("dp", 1)
    for mode in MODES:
        server = serve(**parallel)
        server.post("configure", mode=mode)
        server.post("start")
        server.run()
        dump = server.post("dump", summary_only=False)
        totals.append({layer: own.tolist() for layer, own in counts_of(dump).items()})
        assert dump["num_workers"] == sum(map(len, server.engines.workers.values()))
        assert sorted(totals[-1]) == [1, 3, 4]
        for own in totals[-1].values():
            assert sum(own) == TOKENS * 2 * dp
        server.post("stop")
        status = server.status()
        assert status["agreement"]["ok"], status["agreement"]
        files = [name for worker in status["workers"] for name in worker["files"]]
        if mode == "per_token":
            logged: dict[int, list[int]] = {layer: [0] * 8 for layer in (1, 3, 4)}
            for name in files:
                for line in read_lines(server.folder / name):
                    for expert in line.get("topk_ids", ()):
                        logged[line["layer"]][expert] += 1
            assert logged == totals[-1]
        if mode == "per_pass":
            summed = {layer: np.zeros(8, dtype=int) for layer in (1, 3, 4)}
            for worker in dump["workers"]:
                for record in worker["records"]:
                    for layer, own in zip(worker["layers"], record["expert_counts"], strict=True):
                        summed[layer] += own
            assert {layer: own.tolist() for layer, own in summed.items()} == totals[-1]
            ends = [read_lines(server.folder / name)[-1] for name in files]
            assert sum(np.sum(end["expert_counts"]) for end in ends) == TOKENS * 2 * 3 * dp
    assert totals[0] == totals[1] == totals[2]


def test_a_line_a_pass_follows_the_guide(serve: Serve) -> None:
    server = serve()
    server.post("configure", mode="per_pass", path="run1/passes.jsonl")
    assert server.post("start")["files"] == ["run1/passes.jsonl"]
    server.run()
    server.post("stop")
    meta, *lines, end = read_lines(server.folder / "run1" / "passes.jsonl")
    assert (meta["type"], meta["mode"], end["type"]) == ("meta", "per_pass", "end")
    assert [list(line)[:6] for line in lines] == [
        [
            "forward_pass_id",
            "batch_size",
            "latency",
            "seq_lens_sum",
            "forward_mode",
            "expert_activation",
        ]
    ] * 4
    assert [line["forward_pass_id"] for line in lines] == [0, 1, 2, 3]
    assert [line["batch_size"] for line in lines] == [2, 2, 2, 1]
    # After each pass: 5+3, 6+4, 4+7 and 5 tokens in the sequences of the batch.
    assert [line["seq_lens_sum"] for line in lines] == [8, 10, 11, 5]
    assert [line["forward_mode"] for line in lines] == ["prefill", "decode", "mixed", "decode"]
    assert [(line["prefill_tokens"], line["decode_tokens"]) for line in lines] == [
        (8, 0),
        (0, 2),
        (4, 1),
        (0, 1),
    ]
    assert all(0 < line["latency"] < 60 for line in lines)
    assert [line["expert_activation"] for line in lines][3] == 2.0, "one token, top-2, every layer"


def test_dumping_changes_nothing_and_shows_the_latest_passes_only(serve: Serve) -> None:
    server = serve()
    server.post("configure", mode="per_pass")
    server.post("start")
    server.run()
    first = server.post("dump", summary_only=False, max_records=3)
    assert first == server.post("dump", summary_only=False, max_records=3)
    (worker,) = first["workers"]
    assert [record["forward_pass_id"] for record in worker["records"]] == [1, 2, 3]
    assert worker["records_omitted"] == 1
    for record in worker["records"]:
        touched = sum(count > 0 for own in record["expert_counts"] for count in own)
        assert record["total_activated_experts"] == touched
    server.post("stop")
    after = server.post("dump", summary_only=False, max_records=3)
    assert after["workers"][0]["counts"] == worker["counts"]


def test_a_dump_before_anything_was_recorded_is_empty(serve: Serve) -> None:
    assert serve().post("dump")["summary"]["workers"] == []


@pytest.mark.parametrize("mode", MODES)
def test_only_the_chosen_layers_are_recorded(serve: Serve, mode: str) -> None:
    server = serve()
    server.post("configure", mode=mode, layers="3-4")
    server.post("start")
    server.run()
    server.post("stop")
    (worker,) = server.post("dump", summary_only=False)["workers"]
    assert worker["layers"] == [3, 4]
    assert [np.sum(worker["counts"][kind]) for kind in worker["counts"]] == [8 * 4, 3 * 4, 5 * 4]


# ---- control -------------------------------------------------------------------------------


def test_misuse_is_a_conflict_with_the_reason(serve: Serve) -> None:
    server = serve()
    assert "start one first" in server.post("stop", 409)["message"]
    assert "nothing was recorded" in server.post("reset", 409)["message"]
    server.post("start")
    assert "already runs" in server.post("start", 409)["message"]
    assert "stop it before" in server.post("configure", 409, mode="per_pass")["message"]
    server.post("stop")
    assert server.status()["recording"] is False
    assert "start one first" in server.post("stop", 409)["message"]


def test_an_unknown_mode_is_answered_with_the_valid_ones(serve: Serve) -> None:
    answer = serve().post("configure", 400, mode="all")
    assert answer["valid_modes"] == ["stat", "per_pass", "per_token"]


@pytest.mark.parametrize(
    ("route", "params"),
    [
        ("configure", {"mode": "stat", "path": "x.jsonl"}),
        ("configure", {"mode": "per_pass", "path": "x.parquet"}),
        ("configure", {"mode": "per_token", "path": "x.csv"}),
        ("configure", {"mode": "stat", "layers": "2"}),
        ("configure", {"mode": "stat", "layers": "rubbish"}),
        ("configure", {"mode": "stat", "layers": "9" * 300}),
        ("configure", {"mode": ["stat", "stat"]}),
        ("configure", {"modes": "stat"}),
        ("start", {"mode": "stat"}),
        ("dump", {"summary_only": "perhaps"}),
        ("dump", {"max_records": -1}),
        ("dump", {"max_records": 10**30}),
    ],
)
def test_a_parameter_that_means_nothing_is_answered(
    serve: Serve, route: str, params: dict[str, Any]
) -> None:
    server = serve()
    assert server.post(route, 400, **params)["message"]
    assert server.status()["recording"] is False


@pytest.mark.parametrize("mode", MODES)
def test_a_reset_goes_on_from_zero_and_loses_no_row(serve: Serve, mode: str) -> None:
    server = serve()
    server.post("configure", mode=mode, **({} if mode == "stat" else {"path": "x.jsonl"}))
    server.post("start")
    server.run(*PASSES[:2])
    server.post("reset")
    assert server.status()["recording"] is True
    server.run(*PASSES[2:])
    (worker,) = server.post("dump")["summary"]["workers"]
    assert worker["num_records"] == 2
    assert worker["tokens"] == {"prefill": 4, "decode": 2}
    server.post("stop")
    if mode != "stat":
        parts = [read_lines(server.folder / name) for name in ("x.jsonl", "x.2.jsonl")]
        assert [part[-1]["reason"] for part in parts] == ["reset", "stop"]
        assert [part[-1]["passes"] for part in parts] == [2, 2]
        assert sum(part[-1]["rows"] for part in parts) == TOKENS * 3


def test_after_a_stop_a_reset_forgets(serve: Serve) -> None:
    server = serve()
    server.post("start")
    server.run()
    server.post("stop")
    server.post("reset")
    assert server.post("dump")["summary"]["workers"] == []


def test_a_start_counts_from_zero(serve: Serve) -> None:
    server = serve()
    for _ in range(3):
        server.post("start")
        server.run(PASSES[0])
        server.post("stop")
        (worker,) = server.post("dump")["summary"]["workers"]
        assert worker["tokens"] == {"prefill": 8, "decode": 0}
        server.engines.workers["engine0"][0].model_runner.computed.clear()


def test_a_start_that_fails_on_one_worker_leaves_none_recording(serve: Serve) -> None:
    server = serve(stages=((1, 3), (4,)))
    server.post("configure", mode="per_token", path="x.jsonl")
    server.folder.mkdir()
    (server.folder / "x.pp1.jsonl").write_text("mine")
    message = server.post("start", 409)["message"]
    assert "exists" in message
    assert "1 of 2 workers" in message
    assert server.status()["recording"] is False
    assert (server.folder / "x.pp1.jsonl").read_text() == "mine"
    end = read_lines(server.folder / "x.jsonl")[-1]
    assert end["reason"] == "another worker could not start"


def test_a_recording_that_starts_with_the_engine_is_known_to_every_rank(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "passes.jsonl"
    monkeypatch.setenv("VLLM_LOG_MOE", str(log))
    monkeypatch.setenv("VLLM_LOG_MOE_MODE", "per_pass")
    server = serve(tp=2)
    status = server.status()
    assert (status["recording"], status["mode"]) == (True, "per_pass")
    assert status["agreement"]["ok"]
    server.run()
    assert server.post("stop")["files"] == [str(log)]
    assert [line.get("type") for line in read_lines(log)] == ["meta", *["pass"] * 4, "end"]


def test_status_tells_what_every_worker_does(serve: Serve) -> None:
    server = serve(tp=2)
    server.post("configure", mode="per_token")
    server.post("start")
    server.run()
    server.post("dump")  # waits until all is written
    first, second = server.status()["workers"]
    assert (first["rank"], first["records"], second["rank"], second["records"]) == (
        0,
        True,
        1,
        False,
    )
    assert first["tokens"] == {"prefill": PREFILL, "decode": 4}
    assert server.status()["model"] == "tiny", "not its path"
    assert second["rows"] == 0
    assert first["files"][0].startswith("per_token-")


@pytest.mark.parametrize("mode", ["per_token", "per_pass"])
def test_every_file_of_a_rotated_recording_is_named(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(config, "LEAST_BYTES", 1)  # bounds of bytes, not of files' worth of them
    monkeypatch.setenv("VLLM_LOG_MOE_MAX_BYTES", "70000")
    monkeypatch.setenv("VLLM_LOG_MOE_ON_MAX", "rotate")
    server = serve()
    server.post("configure", mode=mode, path="run1/x.jsonl")
    assert server.post("start")["files"] == ["run1/x.jsonl"]
    for i in range(240):
        server.engines.execute((f"{i}-{i:08x}", 8, 8))
    dump = server.post("dump", summary_only=False)  # waits until all is written
    there = sorted(path.name for path in (server.folder / "run1").iterdir())
    names = ["run1/x.jsonl"] + [f"run1/x.{n}.jsonl" for n in range(2, len(there) + 1)]
    assert len(there) >= 3
    assert server.status()["workers"][0]["files"] == names
    assert dump["workers"][0]["files"] == names
    assert dump["summary"]["workers"][0]["files"] == names
    assert server.post("stop")["files"] == names
    ends = [read_lines(server.folder / name)[-1] for name in names]
    assert [end.get("next") for end in ends] == [Path(name).name for name in names[1:]] + [None]


# ---- who may ask, and for what -------------------------------------------------------------


@pytest.mark.parametrize("path", [*CONTROL, STATUS])
@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer", "Basic a2V5", "key", "Bearer key "]
)
def test_with_keys_every_route_asks_for_one(serve: Serve, path: str, header: str | None) -> None:
    server = serve(keys=("key", "other"))
    headers = {"Authorization": header} if header else {}
    for method in ("GET", "POST", "PUT", "DELETE"):
        answer = server.client.request(method, path, headers=headers)
        assert answer.status_code == 401, (method, header)
        assert answer.json()["status"] == "error"
    assert server.engines.calls == []


@pytest.mark.parametrize("key", ["key", "other"])
def test_any_of_the_keys_opens_the_routes(serve: Serve, key: str) -> None:
    server = serve(keys=("key", "other"))
    server.client.headers["Authorization"] = f"Bearer {key}"
    server.post("start")
    assert server.status()["recording"] is True


def test_the_key_may_come_from_the_environment(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server = serve()
    assert server.client.get(STATUS).status_code == 401
    server.client.headers["Authorization"] = "Bearer secret"
    assert server.client.get(STATUS).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "../x.jsonl",
        "a/../../x.jsonl",
        "/tmp/x.jsonl",  # noqa: S108
        "//x.jsonl",
        "a//x.jsonl",
        "./x.jsonl",
        ".x.jsonl",
        "a/.b/x.jsonl",
        "..\\x.jsonl",
        "~/x.jsonl",
        "x\0.jsonl",
        "x\n.jsonl",
        "%2e%2e%2fx.jsonl",
        "a" * 300 + ".jsonl",
        "ä.jsonl",
        "",
        "-x.jsonl",
        "$(id).jsonl",
    ],
)
def test_no_name_leads_out_of_the_recording_directory(serve: Serve, name: str) -> None:
    server = serve()
    server.post("configure", 400, mode="per_token", path=name)
    assert "configure" not in server.engines.calls


def test_no_link_leads_out_of_the_recording_directory(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    outside = tmp_path / "outside"
    outside.mkdir()
    server.folder.mkdir()
    (server.folder / "link").symlink_to(outside)
    server.post("configure", mode="per_token", path="link/x.jsonl")
    assert "leads out of" in server.post("start", 400)["message"]
    # A link in the file's own place is not followed either.
    (server.folder / "y.jsonl").symlink_to(outside / "y.jsonl")
    server.post("configure", mode="per_token", path="y.jsonl")
    server.post("start", 409)
    assert list(outside.iterdir()) == []


def test_a_file_that_is_there_is_never_written_to(serve: Serve) -> None:
    server = serve()
    server.folder.mkdir()
    (server.folder / "x.jsonl").write_text("mine")
    server.post("configure", mode="per_token", path="x.jsonl")
    assert "exists" in server.post("start", 409)["message"]
    assert (server.folder / "x.jsonl").read_text() == "mine"
    assert server.status()["recording"] is False


@pytest.mark.parametrize("path", [*CONTROL, STATUS])
def test_a_wrong_method_is_answered_with_the_right_one(serve: Serve, path: str) -> None:
    server = serve()
    right = "GET" if path == STATUS else "POST"
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - {right}:
        answer = server.client.request(method, path)
        assert answer.status_code == 405
        assert answer.headers["allow"] == right
        assert right in answer.json()["message"]


# ---- engines that fail ---------------------------------------------------------------------


def test_a_dead_engine_is_told(serve: Serve) -> None:
    server = serve()
    server.engines.error = EngineDeadError()
    answer = server.client.get(STATUS)
    assert answer.status_code == 503
    assert "dead" in answer.json()["message"]


def test_an_engine_that_does_not_answer_keeps_nobody_waiting(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines_module, "COMMAND_SECONDS", 0.05)
    server = serve()
    server.engines.delay = 0.5
    answer = server.client.get(STATUS)
    assert answer.status_code == 504
    assert "expert_distribution_status" in answer.json()["message"]


def test_an_error_inside_is_one_line_without_a_traceback(serve: Serve) -> None:
    server = serve()
    server.engines.error = ValueError("secret detail")
    answer = server.client.get(STATUS)
    assert answer.status_code == 500
    assert answer.json()["status"] == "error"
    assert "secret detail" not in answer.text
    assert "Traceback" not in answer.text


def test_a_crowd_is_sent_away_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is bounded, and waits for its turn."""

    async def crowd() -> int:
        engines = engines_module.Engines(None)
        refused = 0

        async def ask() -> None:
            nonlocal refused
            try:
                async with engines:
                    await asyncio.sleep(0.01)
            except engines_module.ApiError as error:
                refused += error.code == 503

        await asyncio.gather(*(ask() for _ in range(40)))
        return refused

    # One has its turn while the others wait.
    assert asyncio.run(crowd()) == 40 - 1 - engines_module.MOST_WAITING


# ---- metrics and the page ------------------------------------------------------------------


def test_without_the_variable_there_are_no_routes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOG_MOE", str(tmp_path / "x.jsonl"))
    client = TestClient(an_app(None))
    for path in (*CONTROL, STATUS, "/expert_distribution"):
        assert client.get(path).status_code == client.post(path).status_code == 404


@pytest.mark.parametrize("per_layer", ["0", "1"])
def test_a_scrape_shows_the_figures_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_layer: str
) -> None:
    registries = isolate(monkeypatch)
    monkeypatch.setenv("VLLM_LOG_MOE_API", "1")
    monkeypatch.setenv("VLLM_LOG_MOE_LAYER_METRICS", per_layer)
    engines = Engines(stages=((1, 3), (4,)), tp=2)
    app = an_app(engines, keys=["key"])
    app.mount("/metrics", make_asgi_app(registry=registries[-1]))
    server = Server(engines, tmp_path)
    server.client = TestClient(app, headers={"Authorization": "Bearer key"})
    server.post("start")
    server.run()
    text = TestClient(app).get("/metrics").text
    shown = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(shown["vllm:moe_routes_recording"]) == 1
    assert float(shown["vllm:moe_routes_passes"]) == 4, "of one engine, not of every stage"
    assert float(shown["vllm:moe_routes_rows"]) == TOKENS * 3
    assert float(shown["vllm:moe_routes_dropped_rows"]) == 0
    assert 1 <= float(shown["vllm:moe_routes_max_over_mean"]) <= 8
    assert len(shown) == (5 if per_layer == "0" else 8)
    server.post("stop")
    assert "vllm:moe_routes_recording 0.0" in TestClient(app).get("/metrics").text


def test_a_scrape_of_a_dead_engine_still_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registries = isolate(monkeypatch)
    monkeypatch.setenv("VLLM_LOG_MOE_API", "1")
    engines = Engines()
    engines.error = EngineDeadError()
    app = an_app(engines)
    app.mount("/metrics", make_asgi_app(registry=registries[-1]))
    assert TestClient(app).get("/metrics").status_code == 200


def test_the_page_holds_no_figures_and_loads_nothing(serve: Serve) -> None:
    server = serve(keys=("key",))
    answer = server.client.get("/expert_distribution")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert server.engines.calls == []


def test_the_routes_are_documented(serve: Serve) -> None:
    document = serve().client.get("/openapi.json").json()
    assert sorted(document["paths"]) == sorted([*CONTROL, STATUS])
    configure = document["paths"]["/configure_expert_distribution"]["post"]
    assert {item["name"] for item in configure["parameters"]} == {"mode", "layers", "path"}
    assert {"200", "400", "401", "409", "503"} <= set(configure["responses"])
    assert json.dumps(document).count("HTTPBearer") > 0
