"""The main job on a real engine: what is logged is what happened, and logging changes nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from expert_profiler import convert
from expert_profiler.bench.engine_process import pristine_vllm
from expert_profiler.log import log_file, records
from tests.support import harness

PROMPTS = [
    f"Question {i}: a baker fills {i + 2} trays with {3 * i + 4} rolls each. " * (1 + i % 3)
    + "How many rolls are there?"
    for i in range(8)
]
SAMPLING = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
GENERATE: dict[str, Any] = {"generate": PROMPTS, "sampling": SAMPLING}
NUM_LAYERS = 24


@pytest.fixture(scope="session")
def settings(tiny_checkpoint: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_checkpoint),
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": 1,
    }


@pytest.fixture(scope="session")
def recorded(
    engines: harness.Engines, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """One engine, recording from its start: three runs of the same prompts into three logs."""
    folder = tmp_path_factory.mktemp("recorded")
    first, second = folder / "first.jsonl", folder / "second.jsonl"
    third = folder / "third.parquet"
    results = engines.run(
        folder,
        settings,
        [
            {**GENERATE, "watch": str(first)},
            {"rpc": "stop"},
            GENERATE,  # between recordings: must leave no trace
            {"rpc": "start", "options": {"path": str(first)}},  # exists: refused
            {"rpc": "start", "options": {"path": str(second)}},
            {"rpc": "start"},  # runs already: refused
            GENERATE,
            {"rpc": "status"},
            {"rpc": "nonsense"},
            {"rpc": "stop"},
            {"rpc": "start", "options": {"path": str(third)}},
            GENERATE,
            {"rpc": "stop"},
        ],
        env={
            "VLLM_LOG_MOE": str(first),
            "VLLM_LOG_MOE_FLUSH_SECONDS": "0.1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # as users run it
        },
    )
    return {
        "first": harness.read(first),
        "second": harness.read(second),
        "third": third,
        "results": results,
    }


def outputs_of(results: list[Any], step: int) -> list[dict[str, Any]]:
    return list(results[step]["outputs"])


def tokens_of(results: list[Any], step: int) -> list[list[int]]:
    return [output["token_ids"] for output in outputs_of(results, step)]


def by_prompt(log: harness.Log, outputs: list[dict[str, Any]]) -> dict[tuple[int, int, int], Any]:
    """Routes keyed by prompt number, so that runs with other request ids compare."""
    number = {output["req_id"]: i for i, output in enumerate(outputs)}
    return {
        (number[req_id], position, layer): row
        for (req_id, position, layer), row in log.routes.items()
    }


def assert_same_routes(ours: dict[Any, Any], theirs: dict[Any, Any]) -> None:
    """Equal but for rounding: requests may meet in other batches, which other kernels compute.

    So a near-tie may fall either way, and a weight may differ in its last digits.
    """
    assert ours.keys() == theirs.keys()
    swapped = []
    for key, row in ours.items():
        other = theirs[key]
        assert row["phase"] == other["phase"]
        mine = dict(zip(row["topk_ids"], row["topk_weights"], strict=True))
        its = dict(zip(other["topk_ids"], other["topk_weights"], strict=True))
        if mine.keys() != its.keys():
            swapped.append(key)
            continue
        assert all(abs(mine[expert] - its[expert]) < harness.WEIGHT_TOLERANCE for expert in mine)
    print(f"{len(swapped)} of {len(ours)} rows chose other experts: {swapped[:10]}")
    assert len(swapped) <= len(ours) // 1000


@pytest.mark.parametrize(("name", "step"), [("first", 0), ("second", 6)])
def test_every_layer_has_one_row_for_every_forwarded_token(
    recorded: dict[str, Any], name: str, step: int
) -> None:
    log, outputs = recorded[name], outputs_of(recorded["results"], step)
    expected = {
        (output["req_id"], position)
        for output in outputs
        for position in range(len(output["prompt_token_ids"]) + len(output["token_ids"]) - 1)
    }
    for layer in range(NUM_LAYERS):
        assert {(req, pos) for req, pos, at in log.routes if at == layer} == expected
    assert not log.flagged
    assert log.rows == NUM_LAYERS * len(expected) == log.end["rows"]


def test_the_phase_says_whether_a_token_was_prompt_or_generated(recorded: dict[str, Any]) -> None:
    prompt = {o["req_id"]: len(o["prompt_token_ids"]) for o in outputs_of(recorded["results"], 0)}
    for (req_id, position, _), row in recorded["first"].routes.items():
        assert row["phase"] == ("prefill" if position < prompt[req_id] else "decode")


def test_forward_passes_are_numbered_from_zero_without_gaps(recorded: dict[str, Any]) -> None:
    for name in ("first", "second"):
        log = recorded[name]
        passes = {row["forward_pass_id"] for row in log.routes.values()}
        assert passes == set(range(log.end["passes"]))


def test_routes_equal_a_hugging_face_forward_pass(
    recorded: dict[str, Any], settings: dict[str, Any]
) -> None:
    log = recorded["first"]
    outputs = outputs_of(recorded["results"], 0)
    agreement = harness.compare_with_oracle(log, outputs, settings["model"])
    harness.TABLE.append(("main job", log.rows, agreement.compared, agreement))
    print(
        f"oracle: {agreement.compared} rows, {len(agreement.different)} differ, near-ties "
        f"{agreement.near_ties}, worst weight difference {agreement.worst_weight:.2e}"
    )
    assert agreement.compared == log.rows
    assert agreement.different == []
    assert len(agreement.near_ties) <= agreement.compared // 1000
    assert agreement.worst_weight < harness.WEIGHT_TOLERANCE


def test_two_recordings_of_the_same_prompts_are_equal(recorded: dict[str, Any]) -> None:
    results = recorded["results"]
    first = by_prompt(recorded["first"], outputs_of(results, 0))
    second = by_prompt(recorded["second"], outputs_of(results, 6))
    assert_same_routes(first, second)


def test_a_parquet_log_holds_the_same_routes(recorded: dict[str, Any], tmp_path: Path) -> None:
    results, path = recorded["results"], recorded["third"]
    convert.convert(path, tmp_path / "third.jsonl")
    log = harness.read(tmp_path / "third.jsonl")
    first = by_prompt(recorded["first"], outputs_of(results, 0))
    assert_same_routes(by_prompt(log, outputs_of(results, 11)), first)
    assert log.end["self_check"]["verdict"] == "pass"
    assert log.end["rows"] == log.rows == results[12][0]["end"]["rows"]
    assert len(log.requests) == len(PROMPTS)
    assert log.meta["weights_dtype"] == "float32"


def test_a_row_takes_at_most_18_bytes_in_parquet_and_11_with_float16_weights(
    recorded: dict[str, Any], tmp_path: Path
) -> None:
    rows, sizes = recorded["third"], {}
    half = tmp_path / "half.parquet"
    chunks = [
        chunk._replace(rows=rounded(chunk.rows))
        for chunk in records.read_parquet(log_file.open_file(rows))
    ]
    plan = records.Plan(60, 4, "float16")
    records.write_parquet(half, recorded["first"].meta, chunks, None, plan)
    for path in (rows, half):
        sizes[path] = sum(part.stat().st_size for part in path.iterdir()) / recorded["first"].rows
    print(f"{sizes[rows]:.2f} bytes a row, {sizes[half]:.2f} with float16 weights")
    assert sizes[rows] <= 18
    assert sizes[half] <= 11


def rounded(rows: pa.Table) -> pa.Table:
    """The rows as ``VLLM_LOG_MOE_WEIGHTS=float16`` keeps them."""
    at = rows.schema.get_field_index("topk_weights")
    kind = pa.list_(pa.field("element", pa.float16()), 4)
    return rows.set_column(at, "topk_weights", rows["topk_weights"].cast(kind))


def test_the_request_records_account_for_the_rows(recorded: dict[str, Any]) -> None:
    log = recorded["first"]
    rows = Counter(req_id for req_id, _, layer in log.routes if layer == 0)
    assert {req_id: item["positions"] for req_id, item in log.requests.items()} == dict(rows)
    assert all(item["cached_tokens"] == 0 and item["finished"] for item in log.requests.values())
    assert log.end["requests"] == len(PROMPTS)


def test_the_run_checks_itself_and_says_so(recorded: dict[str, Any]) -> None:
    for name in ("first", "second"):
        end = recorded[name].end
        assert end["self_check"]["verdict"] == "pass"
        assert set(end["drops"].values()) == {0}
        assert end["reason"] == "stop"


def test_the_header_says_what_was_run(recorded: dict[str, Any], settings: dict[str, Any]) -> None:
    meta = recorded["first"].meta
    assert list(meta)[:8] == [
        "type", "model_id", "vllm_version", "torch_version", "device", "seed", "layers_logged",
        "top_k",
    ]  # fmt: skip
    assert meta["model_id"] == settings["model"]
    assert meta["vllm_version"].startswith("0.15.1")
    assert meta["seed"] == 1
    assert meta["layers_logged"] == list(range(NUM_LAYERS))
    assert (meta["top_k"], meta["num_experts"]) == (4, 60)
    assert meta["execution"] == "eager"
    assert meta["files"] == ["first.jsonl"]


def test_the_header_names_the_installed_patch(recorded: dict[str, Any]) -> None:
    from expert_profiler.patch import patch_file

    expected = patch_file.load_patch().patch_id
    assert recorded["first"].meta["patch_id"] == expected


def test_the_file_can_be_read_while_it_is_written(recorded: dict[str, Any]) -> None:
    watched = recorded["results"][0]["watched"]
    assert watched["bad_lines"] == []
    counts = watched["line_counts"]
    assert counts == sorted(counts)
    assert any(0 < count < counts[-1] for count in counts), "it grew under the reader's eyes"


def test_misuse_is_answered_and_changes_nothing(recorded: dict[str, Any]) -> None:
    exists, started, twice, nonsense = (recorded["results"][i][0] for i in (3, 4, 5, 8))
    assert not exists["ok"]
    assert "first.jsonl exists" in exists["error"]
    assert started["ok"]
    assert started["recording"]
    assert not twice["ok"]
    assert "already runs" in twice["error"]
    assert not nonsense["ok"]
    assert "unknown command" in nonsense["error"]


def test_compiled_and_eager_choose_the_same_experts(
    engines: harness.Engines, recorded: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "compiled.jsonl"
    compiled = {**settings, "enforce_eager": False}
    results = engines.run(tmp_path, compiled, [GENERATE], env={"VLLM_LOG_MOE": str(path)})
    log = harness.read(path)
    assert log.meta["execution"] == "compiled"
    assert log.end["self_check"]["verdict"] == "pass"
    eager = by_prompt(recorded["first"], outputs_of(recorded["results"], 0))
    assert_same_routes(by_prompt(log, outputs_of(results, 0)), eager)
    assert tokens_of(results, 0) == tokens_of(recorded["results"], 0)


def test_recording_does_not_change_the_output(
    engines: harness.Engines, recorded: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    """Unpatched, patched but off, armed but stopped, and recording generate the same tokens.

    The first two also run exactly the same ops in exactly the same order.
    """
    probe = [GENERATE, {"probe": "ops"}, {"probe": "threads"}, {"probe": "where"}]
    pristine = pristine_vllm(tmp_path / "pristine")
    unpatched_engines = harness.Engines(pristine)
    unpatched = unpatched_engines.run(tmp_path / "unpatched", settings, probe)
    unpatched_engines.close()
    off = engines.run(tmp_path / "off", settings, probe)
    recording = tokens_of(recorded["results"], 0)
    stopped = tokens_of(recorded["results"], 2)
    assert tokens_of(unpatched, 0) == tokens_of(off, 0) == recording == stopped
    assert Path(unpatched[3]).is_relative_to(pristine)
    assert not (pristine / "vllm" / "moe_routes").exists()
    assert unpatched[1] == off[1], "the switched-off recorder runs no op"
    assert not any("moe_routes" in op for op in off[1])
    assert unpatched[2] == off[2], "the switched-off recorder has no thread"
    assert not list((tmp_path / "off").glob("*.jsonl"))


def test_chosen_layers_alone_are_recorded_and_armed_can_wait(
    engines: harness.Engines, settings: dict[str, Any], recorded: dict[str, Any], tmp_path: Path
) -> None:
    path, parquet = tmp_path / "some.jsonl", tmp_path / "some.parquet"
    results = engines.run(
        tmp_path,
        settings,
        [
            GENERATE,
            {"rpc": "start"},
            GENERATE,
            {"rpc": "stop"},
            {"rpc": "start", "options": {"path": str(parquet)}},
            GENERATE,
            {"rpc": "stop"},
        ],
        env={
            "VLLM_LOG_MOE": str(path),
            "VLLM_LOG_MOE_LAYERS": "0,3-5",
            "VLLM_LOG_MOE_AUTOSTART": "0",
        },
    )
    log = harness.read(path)
    assert log.meta["layers_logged"] == [0, 3, 4, 5]
    assert {layer for _, _, layer in log.routes} == {0, 3, 4, 5}
    whole = by_prompt(recorded["first"], outputs_of(recorded["results"], 0))
    some = by_prompt(log, outputs_of(results, 2))
    chosen = {key: row for key, row in whole.items() if key[2] in (0, 3, 4, 5)}
    assert_same_routes(some, chosen)
    # In one process the same prompts meet in the same batches, so nothing may differ.
    convert.convert(parquet, tmp_path / "converted.jsonl")
    same = harness.read(tmp_path / "converted.jsonl")
    assert by_prompt(same, outputs_of(results, 5)).keys() == some.keys()
    for key, row in by_prompt(same, outputs_of(results, 5)).items():
        assert {**row, "req_id": ""} == {**some[key], "req_id": ""}


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"VLLM_LOG_MOE_LAYERS": "24"}, "layer 24 is no MoE layer of this model"),
        ({"VLLM_LOG_MOE": "/nonexistent/folder/x.jsonl"}, "can't be created"),
    ],
)
def test_a_bad_switch_stops_the_engine_with_the_reason(
    engines: harness.Engines,
    settings: dict[str, Any],
    tmp_path: Path,
    env: dict[str, str],
    message: str,
) -> None:
    path = tmp_path / "x.jsonl"
    full = {"VLLM_LOG_MOE": str(path), **env}
    assert engines.run(tmp_path, settings, [], env=full, check=False) == []
    assert "RouteLogError: " in (text := (tmp_path / "engine.log").read_text())
    assert message in text
    assert not path.exists()
