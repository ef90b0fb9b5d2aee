"""The numbers stay true in every engine mode: each test runs one and checks rows and oracle."""

from __future__ import annotations

import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expert_profiler.run.tiny_model import TinyMoeSpec, build
from tests.support import harness

NUM_LAYERS = 4
PROMPTS = [
    f"Question {i}: a baker fills {i + 2} trays with {3 * i + 4} rolls each. " * (1 + i % 3)
    + "How many rolls are there?"
    for i in range(6)
]
GREEDY = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A shallow checkpoint: the modes don't depend on depth."""
    folder = tmp_path_factory.mktemp("model") / "shallow"
    build(folder, TinyMoeSpec(layers=NUM_LAYERS))
    return {
        "model": str(folder),
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": 1,
    }


class Runs:
    """Runs engines and checks what must hold in every mode."""

    def __init__(self, engines: harness.Engines, settings: dict[str, Any], folder: Path) -> None:
        self._engines = engines
        self.settings = settings
        self.folder = folder
        self.path = folder / "x.jsonl"

    def run(
        self, steps: list[dict[str, Any]], env: dict[str, str] | None = None, **changes: Any
    ) -> list[Any]:
        ahead = changes.pop("async_scheduling", False)
        return self._engines.run(
            self.folder,
            {**self.settings, **changes},
            steps,
            env={"VLLM_LOG_MOE": str(self.path), **(env or {})},
            async_scheduling=ahead,
        )

    def check(self, mode: str, outputs: list[dict[str, Any]], cached: int = 0) -> harness.Log:
        """Row identity, self-check and oracle; returns the log and adds a line to the table."""
        log = harness.read(self.path)
        assert log.end["self_check"]["verdict"] == "pass"
        assert set(log.end["drops"].values()) == {0}
        expected = sum(
            len(output["prompt_token_ids"]) + len(tokens) - 1
            for output in outputs
            for tokens in output["all_token_ids"]
        )
        per_layer = Counter(layer for _, _, layer in log.routes)
        assert per_layer == dict.fromkeys(log.meta["layers_logged"], expected - cached)
        agreement = harness.compare_with_oracle(log, outputs, self.settings["model"])
        expected_rows = (expected - cached) * len(log.meta["layers_logged"])
        harness.TABLE.append((mode, expected_rows, len(log.routes), agreement))
        assert agreement.different == []
        return log


@pytest.fixture
def runs(engines: harness.Engines, settings: dict[str, Any], tmp_path: Path) -> Runs:
    return Runs(engines, settings, tmp_path)


@pytest.fixture(scope="session")
def whole_prompts(
    engines: harness.Engines, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int, int], list[int]]:
    """Ids by (request, position, layer) when every prompt is prefilled in one pass."""
    runs = Runs(engines, settings, tmp_path_factory.mktemp("whole"))
    outputs = runs.run([{"generate": PROMPTS, "sampling": GREEDY}])[0]["outputs"]
    return ids_of(runs.check("unchunked prefill", outputs))


def ids_of(log: harness.Log) -> dict[tuple[str, int, int], list[int]]:
    return {key: sorted(row["topk_ids"]) for key, row in log.routes.items()}


def test_chunked_prefill_equals_unchunked(
    runs: Runs, whole_prompts: dict[tuple[str, int, int], list[int]]
) -> None:
    outputs = runs.run(
        [{"generate": PROMPTS, "sampling": GREEDY}], max_num_batched_tokens=32, max_num_seqs=16
    )[0]["outputs"]
    log = runs.check("chunked prefill", outputs)
    longest = max(len(output["prompt_token_ids"]) for output in outputs)
    assert longest > 4 * 32, "prompts are really cut"
    assert log.end["passes"] > longest // 32
    assert ids_of(log) == whole_prompts


def test_one_request_at_a_time_equals_a_batch(
    runs: Runs, whole_prompts: dict[tuple[str, int, int], list[int]]
) -> None:
    outputs = runs.run([{"generate": PROMPTS, "sampling": GREEDY}], max_num_seqs=1)[0]["outputs"]
    assert ids_of(runs.check("batch of one", outputs)) == whole_prompts


def test_cached_positions_are_reported_and_never_invented(runs: Runs) -> None:
    step = {"generate": PROMPTS, "sampling": GREEDY}
    results = runs.run([step, step], enable_prefix_caching=True)
    outputs = results[0]["outputs"] + results[1]["outputs"]
    said = {output["req_id"]: output["cached_tokens"] for output in outputs}
    assert sum(said.values()) > 0, "vLLM itself saw cache hits"
    log = runs.check("prefix caching", outputs, cached=sum(said.values()))
    assert {req_id: item["cached_tokens"] for req_id, item in log.requests.items()} == said
    assert log.end["cached_tokens"] == sum(said.values())
    for output in outputs:
        req_id, cached = output["req_id"], said[output["req_id"]]
        last = len(output["prompt_token_ids"]) + len(output["token_ids"]) - 1
        positions = {pos for req, pos, layer in log.routes if (req, layer) == (req_id, 0)}
        assert positions == set(range(cached, last))


def test_preempted_requests_are_complete_and_their_replayed_rows_marked(runs: Runs) -> None:
    long = {**GREEDY, "max_tokens": 100}
    outputs = runs.run(
        [{"generate": PROMPTS, "sampling": long}], num_gpu_blocks_override=30, block_size=32
    )[0]["outputs"]
    log = runs.check("preemption", outputs)
    flags = Counter(row["flag"] for row in log.flagged)
    assert set(flags) == {"recomputed"}, "the cache was too small, so something was preempted"
    for row in log.flagged:  # each replays a row that stands unflagged, with the same experts
        first = log.routes[row["req_id"], row["token_idx"], row["layer"]]
        assert sorted(first["topk_ids"]) == sorted(row["topk_ids"])
        assert first["forward_pass_id"] < row["forward_pass_id"]
    rows_a_layer = Counter(row["req_id"] for row in log.flagged if row["layer"] == 0)
    assert {k: v["rows_flagged"] for k, v in log.requests.items() if v["rows_flagged"]} == dict(
        rows_a_layer
    )


def stop_tokens(runs: Runs) -> list[int]:
    """Tokens that end some prompts early: found by generating without them."""
    folder = runs.folder / "probe"
    probe = Runs(runs._engines, runs.settings, folder)
    outputs = probe.run([{"generate": PROMPTS[:3], "sampling": GREEDY}])[0]["outputs"]
    return [output["token_ids"][5 + i] for i, output in enumerate(outputs)]


def test_the_row_that_runs_ahead_of_a_stop_is_marked_overrun(runs: Runs) -> None:
    """Asynchronous scheduling executes one row past a stop token: it is not part of the output."""
    sampling = {**GREEDY, "stop_token_ids": stop_tokens(runs)}
    outputs = runs.run([{"generate": PROMPTS, "sampling": sampling}], async_scheduling=True)[0][
        "outputs"
    ]
    log = runs.check("async scheduling", outputs)
    assert log.meta["async_scheduling"] is True
    assert log.end["reason"] == "shutdown"  # nobody stopped it: closed when the process ended
    stopped = {
        (output["req_id"], len(output["prompt_token_ids"]) + len(output["token_ids"]) - 1)
        for output in outputs
        if output["finish_reason"] == "stop"
    }
    assert stopped
    assert {row["flag"] for row in log.flagged} == {"overrun"}
    assert {(row["req_id"], row["token_idx"]) for row in log.flagged} == stopped
    assert Counter(row["layer"] for row in log.flagged)[0] == len(stopped)


def test_every_kind_of_request_is_accounted_for(runs: Runs) -> None:
    """Stop tokens, n > 1, one-token outputs, late arrivals and aborts, in one engine."""
    stops = {**GREEDY, "stop_token_ids": stop_tokens(runs)}
    one = {**GREEDY, "max_tokens": 1}
    events = [
        [0, "add", "first", PROMPTS[0], stops],
        [0, "add", "victim", PROMPTS[1], GREEDY],
        [2, "add", "late", PROMPTS[2], GREEDY],
        [3, "add", "short", PROMPTS[3], one],
        [6, "abort", "victim"],
    ]
    results = runs.run(
        [
            {"events": events},
            {"generate": PROMPTS[:1], "sampling": {**GREEDY, "n": 3, "temperature": 1, "seed": 5}},
        ]
    )
    played, several = results[0], results[1]["outputs"][0]
    log = harness.read(runs.path)
    assert log.end["self_check"]["verdict"] == "pass"
    rows = Counter(req_id for req_id, _, layer in log.routes if layer == 0)
    finished = {output["req_id"]: output for output in played["outputs"]}
    assert finished["short"]["finish_reason"] == "length"
    for req_id in ("first", "late", "short"):
        output = finished[req_id]
        assert rows.pop(req_id) == len(output["prompt_token_ids"]) + len(output["token_ids"]) - 1
    (victim,) = played["unfinished"]
    # Aborted between steps: every token it got was the result of one forwarded position.
    assert rows.pop("victim") == len(victim["prompt_token_ids"]) + len(victim["token_ids"]) - 1
    for i, tokens in enumerate(several["all_token_ids"]):
        child = f"{i}_{several['req_id']}"
        assert rows.pop(child) == len(several["prompt_token_ids"]) + len(tokens) - 1
    assert not rows
    assert not log.flagged
    outputs = [*finished.values(), victim]
    agreement = harness.compare_with_oracle(log, outputs, runs.settings["model"])
    assert agreement.different == []


def test_bfloat16_differs_from_the_oracle_only_where_it_is_close(runs: Runs) -> None:
    outputs = runs.run([{"generate": PROMPTS, "sampling": GREEDY}], dtype="bfloat16")[0]["outputs"]
    log = harness.read(runs.path)
    assert log.meta["dtype"] == "bfloat16"
    assert log.end["self_check"]["verdict"] == "pass"
    agreement = harness.compare_with_oracle(log, outputs, runs.settings["model"])
    gaps = [entry[-1] for entry in agreement.different]
    harness.TABLE.append(("bfloat16", log.rows, agreement.compared, agreement))
    print(f"bfloat16: {len(gaps)} of {agreement.compared} rows differ, largest gap {max(gaps)}")
    assert len(gaps) < agreement.compared * 0.10
    assert max(gaps) < 0.05, "probabilities of the experts that swapped places"


def test_embeddings_are_recorded_as_prefill(runs: Runs) -> None:
    results = runs.run([{"embed": PROMPTS}], runner="pooling", convert="embed")
    log = harness.read(runs.path)
    assert log.end["self_check"]["verdict"] == "pass"
    assert {row["phase"] for row in log.routes.values()} == {"prefill"}
    rows = Counter(req_id for req_id, _, layer in log.routes if layer == 0)
    assert rows == {req_id: len(tokens) for req_id, tokens in results[0]}
    outputs = [
        {"req_id": req_id, "prompt_token_ids": tokens, "token_ids": []}
        for req_id, tokens in results[0]
    ]
    agreement = harness.compare_with_oracle(log, outputs, runs.settings["model"])
    assert agreement.different == []
    assert agreement.compared == log.rows


TWO_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def three_modes(folder: Path) -> list[dict[str, Any]]:
    """The same requests in all three modes, one at a time: in other batches near-ties differ."""
    folder.mkdir(parents=True)
    steps: list[dict[str, Any]] = []
    for mode in ("stat", "per_pass", "per_token"):
        path = None if mode == "stat" else str(folder / f"{mode}.jsonl")
        steps.append({"rpc": "configure", "options": {"mode": mode}})
        steps.append({"rpc": "start", "options": {"path": path}})
        steps += [{"generate": [prompt], "sampling": GREEDY} for prompt in PROMPTS[:3]]
        steps += [{"rpc": "stop"}, {"rpc": "dump"}]
    return steps


def check_modes(results: list[Any], folder: Path, writers: list[bool]) -> None:
    """Sum of stat = sum of per_pass = counts of per_token = tokens x top_k, over all ranks."""
    size = len(results) // 3
    totals = []
    for start in range(0, len(results), size):
        outputs = [step["outputs"][0] for step in results[start + 2 : start + 5]]
        tokens = sum(
            len(output["prompt_token_ids"]) + len(output["all_token_ids"][0]) - 1
            for output in outputs
        )
        dump = results[start + size - 1]
        assert ["counts" in reply for reply in dump] == writers
        counted: dict[int, list[int]] = {}
        for reply in dump:
            if "counts" in reply:
                flat = np.frombuffer(bytes.fromhex(reply["counts"]), dtype="<i8")
                by_layer = flat.reshape(reply["shape"]).sum(axis=0)
                assert not set(reply["layers"]) & set(counted), "no layer counts twice"
                counted.update(zip(reply["layers"], by_layer.tolist(), strict=True))
                assert reply["self_check"]["verdict"] == "pass"
        assert sorted(counted) == list(range(NUM_LAYERS))
        assert {sum(own) for own in counted.values()} == {tokens * 4}
        totals.append(counted)
    assert totals[0] == totals[1] == totals[2]
    logged = {layer: [0] * 60 for layer in range(NUM_LAYERS)}
    for path in folder.glob("per_token*.jsonl"):
        for (_, _, layer), row in harness.read(path).routes.items():
            for expert in row["topk_ids"]:
                logged[layer][expert] += 1
    assert logged == totals[2]


def test_tensor_parallel_ranks_count_once(
    runs: Runs, whole_prompts: dict[tuple[str, int, int], list[int]]
) -> None:
    outputs = runs.run(
        [
            {"generate": PROMPTS, "sampling": GREEDY},
            {"rpc": "stop"},
            *three_modes(runs.folder / "modes"),
        ],
        env=TWO_PROCESSES,
        tensor_parallel_size=2,
    )
    check_modes(outputs[2:], runs.folder / "modes", [True, False])
    log = runs.check("tensor parallel 2", outputs[0]["outputs"])
    assert [reply["writes"] for reply in outputs[1]] == [True, False]
    assert log.meta["parallel"]["tp"] == 2
    assert [path.name for path in runs.folder.glob("*.jsonl")] == ["x.jsonl"]
    assert ids_of(log) == whole_prompts


def test_pipeline_stages_write_their_own_layers_and_the_reader_merges_them(
    runs: Runs, whole_prompts: dict[tuple[str, int, int], list[int]]
) -> None:
    from expert_profiler.log.route_log import open_log

    results = runs.run(
        [
            {"generate": PROMPTS, "sampling": GREEDY},
            {"rpc": "stop"},
            *three_modes(runs.folder / "modes"),
        ],
        env=TWO_PROCESSES,
        pipeline_parallel_size=2,
    )
    check_modes(results[2:], runs.folder / "modes", [True, True])
    stages = [harness.read(runs.folder / name) for name in ("x.jsonl", "x.pp1.jsonl")]
    assert [stage.meta["layers_logged"] for stage in stages] == [[0, 1], [2, 3]]
    assert all(stage.meta["files"] == ["x.jsonl", "x.pp1.jsonl"] for stage in stages)
    assert {**ids_of(stages[0]), **ids_of(stages[1])} == whole_prompts
    with open_log(runs.path) as log:
        assert log.layers == (0, 1, 2, 3)
        assert log.num_rows == stages[0].rows + stages[1].rows
        assert log.requests == len(PROMPTS)
        assert not log.lost_rows
    assert len(results[0]["outputs"]) == len(PROMPTS)


def test_data_parallel_ranks_record_their_own_tokens(
    engines: harness.Engines, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Before the experts the tokens of all ranks stand in one batch; each rank logs its own."""
    other_engines = harness.Engines()
    prompts = [PROMPTS[:2], PROMPTS[2:]]  # idle ranks run dummy batches, which must not be logged

    def rank(number: int) -> list[dict[str, Any]]:
        sampling = {**GREEDY, "max_tokens": 6 + 6 * number}
        outputs = [engines, other_engines][number].run(
            tmp_path / f"rank{number}",
            settings,
            [{"generate": prompts[number], "sampling": sampling}, {"rpc": "stop"}],
            env={
                **TWO_PROCESSES,
                "VLLM_LOG_MOE": str(tmp_path / "x.jsonl"),
                "VLLM_DP_RANK": str(number),
                "VLLM_DP_RANK_LOCAL": str(number),
                "VLLM_DP_SIZE": "2",
                "VLLM_DP_MASTER_IP": "127.0.0.1",
                "VLLM_DP_MASTER_PORT": str(port),
            },
        )[0]["outputs"]
        return list(outputs)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(rank, range(2)))
    other_engines.close()
    for number, name in enumerate(("x.jsonl", "x.dp1.jsonl")):
        runs = Runs(engines, settings, tmp_path)
        runs.path = tmp_path / name
        log = runs.check(f"data parallel, rank {number}", outputs[number])
        assert log.meta["rank"]["dp"] == number
        assert log.meta["files"] == ["x.jsonl", "x.dp1.jsonl"]
