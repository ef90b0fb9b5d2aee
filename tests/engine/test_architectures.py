"""Every router that vLLM's CPU backend runs, in one process: what is logged is what was routed.

Two witnesses stand against each log: a float32 forward pass of Hugging Face's implementation, and
what vLLM's own kernels were given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.support import harness, oracle
from tests.support.checkpoints import ARCHITECTURES, Architecture, build
from tests.support.paths import REPO

pytestmark = pytest.mark.engine

DRIVER = REPO / "tests/support/matrix_driver.py"
PROMPTS = ["Hello, {0}.", "The {0} fox jumps over the lazy dog, again and again. " * 2, "x", "{0}"]
SAMPLING = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
#: bfloat16 keeps 8 bits of every activation, so a close choice may fall otherwise than in float32,
#: and with it the weights of later layers. The kernels' own logits are compared exactly.
BFLOAT16_TIE = 0.05
BFLOAT16_TOLERANCE = 0.15


@dataclass(frozen=True)
class Run:
    """An engine that is expected to run."""

    architecture: str
    dtype: str = "float32"
    near_tie: float = oracle.NEAR_TIE
    tolerance: float = oracle.WEIGHT_TOLERANCE


@dataclass(frozen=True)
class Refusal:
    """An engine that vLLM or the recorder refuses, and why it is said to.

    Attributes:
        error: part of the message.
        at: file that says so, relative to vLLM's package.
    """

    architecture: str
    error: str
    at: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


RUNS = {
    **{name: Run(name) for name in ARCHITECTURES},
    "gpt-oss-bfloat16": Run("gpt-oss", "bfloat16", BFLOAT16_TIE, BFLOAT16_TOLERANCE),
}
#: These two live side by side in one process; the others follow each other.
TOGETHER = ("qwen2-moe", "mixtral")
REFUSALS = {
    "deepseek-v2 with MLA": Refusal(
        "deepseek-v2", "MLA is not supported on CPU", "platforms/cpu.py"
    ),
    "deepseek-v3 with MLA": Refusal(
        "deepseek-v3", "MLA is not supported on CPU", "platforms/cpu.py"
    ),
    # The attention kernel on CPU reads the sinks as bfloat16 whatever the model's dtype.
    "gpt-oss in float32": Refusal(
        "gpt-oss", "expected scalar type BFloat16 but found Float", "_custom_ops.py"
    ),
    # As published. There is no kernel for it on CPU.
    "gpt-oss in mxfp4": Refusal(
        "gpt-oss",
        "no compatible MXFP4 MoE backend",
        "model_executor/layers/quantization/mxfp4.py",
        {
            "dtype": "bfloat16",
            "hf_overrides": {"quantization_config": {"quant_method": "mxfp4"}},
            "load_format": "dummy",
        },
    ),
    "layer 0 of a model whose layer 0 is dense": Refusal(
        "glm4-moe",
        "layer 0 is no MoE layer of this model; its MoE layers are 1,2",
        "moe_routes/layers.py",
        env={"VLLM_LOG_MOE_LAYERS": "0"},
    ),
}

each_run = pytest.mark.parametrize("name", RUNS)


@dataclass
class Recorded:
    """One engine's log and what it is held against."""

    run: Run
    outputs: list[dict[str, Any]]
    log: harness.Log
    kernel: Mapping[str, Any]
    checkpoint: Path

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.run.architecture]

    @cached_property
    def positions(self) -> set[tuple[str, int]]:
        """(req_id, token_idx) of every token that was forwarded."""
        return {
            (output["req_id"], position)
            for output in self.outputs
            for position in range(len(output["prompt_token_ids"]) + len(output["token_ids"]) - 1)
        }

    @cached_property
    def model(self) -> Any:
        """Hugging Face's model, without what vLLM's CPU backend ignores."""
        return oracle.load(str(self.checkpoint), self.architecture.ignored)

    @cached_property
    def agreement(self) -> oracle.Agreement:
        return oracle.compare(self.log, self.outputs, self.model, self.run.near_tie)

    def rows(self, layer: int) -> list[dict[str, Any]]:
        """A layer's rows in the order of the file."""
        return [row for (_, _, at), row in self.log.routes.items() if at == layer]


@dataclass
class Matrix:
    recorded: dict[str, Recorded]
    refused: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """All engines, run one after the other in one process, and their logs."""
    folder = tmp_path_factory.mktemp("architectures")
    checkpoints = {name: folder / name / "model" for name in ARCHITECTURES}
    for name, path in checkpoints.items():
        build(path, ARCHITECTURES[name])

    def spec(name: str, architecture: str, **changes: Any) -> dict[str, Any]:
        place = folder / name.replace(" ", "-")
        place.mkdir(exist_ok=True)
        settings = {
            "model": str(checkpoints[architecture]),
            "dtype": "float32",
            "max_model_len": 512,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "seed": 1,
        }
        return {
            "name": name,
            "engine": {**settings, **changes["engine"]},
            "env": {"VLLM_LOG_MOE": str(place / "routes.jsonl"), **changes["env"]},
            "bfloat16": list(changes.get("bfloat16", ())),
            # Each engine has texts of its own length: rows in the wrong file would be noticed.
            "prompts": [prompt.format(name) for prompt in PROMPTS],
            "sampling": SAMPLING,
            "kernel": str(place / "kernel.npz"),
        }

    def spec_of_run(name: str) -> dict[str, Any]:
        run = RUNS[name]
        known = ARCHITECTURES[run.architecture]
        engine = {**known.engine, "dtype": run.dtype}
        return spec(name, run.architecture, engine=engine, env=known.env, bfloat16=known.bfloat16)

    groups = [
        [spec_of_run(name) for name in TOGETHER],
        *([spec_of_run(name)] for name in RUNS if name not in TOGETHER),
        *(
            [spec(name, refusal.architecture, engine=refusal.engine, env=refusal.env)]
            for name, refusal in REFUSALS.items()
        ),
    ]
    results = run_matrix(folder, groups)
    return Matrix(
        {name: recorded(folder / name, run, results, checkpoints) for name, run in RUNS.items()},
        {name: results[name] for name in REFUSALS},
    )


def run_matrix(folder: Path, groups: list[list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Run the groups of engines; the results by name."""
    result, log = folder / "result.json", folder / "engine.log"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    # Binding threads leaves the second engine of a process one core.
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("wb") as file:
        done = subprocess.run(
            [sys.executable, str(DRIVER), str(result)],
            input=json.dumps(groups).encode(),
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**clean, **settings},
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, f"the end of {log}:\n{log.read_text()[-6000:]}"
    return dict(json.loads(result.read_text(encoding="utf-8")))


def recorded(
    folder: Path, run: Run, results: Mapping[str, Any], checkpoints: Mapping[str, Path]
) -> Recorded:
    import numpy as np

    result = results[folder.name]
    assert "error" not in result, f"{folder.name}: {result['error']} ({result['at']})"
    assert all(reply["ok"] for reply in result["stop"])
    return Recorded(
        run,
        result["outputs"],
        harness.read(folder / "routes.jsonl"),
        dict(np.load(folder / "kernel.npz")),
        checkpoints[run.architecture],
    )


@each_run
def test_the_header_lists_the_layers_with_experts_and_no_others(matrix: Matrix, name: str) -> None:
    made = matrix.recorded[name]
    known, meta = made.architecture, made.log.meta
    assert sorted(oracle.routers(made.model)) == list(known.moe_layers)  # and so says transformers
    assert meta["layers_logged"] == list(known.moe_layers)
    assert [item["layer"] for item in meta["layers"]] == list(known.moe_layers)
    assert [item["name"] for item in meta["layers"]] == [
        known.module.format(layer) for layer in known.moe_layers
    ]
    assert meta["num_moe_layers"] == len(known.moe_layers)


@each_run
def test_the_header_says_how_each_layer_chooses(matrix: Matrix, name: str) -> None:
    made = matrix.recorded[name]
    known, meta = made.architecture, made.log.meta
    assert (meta["top_k"], meta["num_experts"]) == (known.top_k, known.num_experts)
    for item in meta["layers"]:
        assert (item["top_k"], item["num_experts"]) == (known.top_k, known.num_experts)
        assert item["renormalize"] is known.renormalize
        assert item["scoring_func"] == known.scoring_func
        assert item["source"] == "router"
    sums = [sum(row["topk_weights"]) for row in made.log.routes.values()]
    if known.renormalize:
        assert all(abs(total - 1) < 1e-2 for total in sums)
    else:
        assert any(abs(total - 1) > 1e-2 for total in sums)


@each_run
def test_every_layer_with_experts_has_one_row_a_token_and_dense_layers_none(
    matrix: Matrix, name: str
) -> None:
    made = matrix.recorded[name]
    known, log = made.architecture, made.log
    for layer in known.moe_layers:
        assert {(req, pos) for req, pos, at in log.routes if at == layer} == made.positions
    assert {layer for _, _, layer in log.routes} == set(known.moe_layers)
    assert log.rows == len(made.positions) * len(known.moe_layers) == log.end["rows"]
    assert not log.flagged


@each_run
def test_the_self_check_passes(matrix: Matrix, name: str) -> None:
    end = matrix.recorded[name].log.end
    assert end["self_check"]["verdict"] == "pass", end["self_check"]
    assert not any(end["drops"].values())


@each_run
def test_routes_equal_a_hugging_face_forward_pass(matrix: Matrix, name: str) -> None:
    made = matrix.recorded[name]
    agreement = made.agreement
    assert agreement.compared == made.log.rows
    assert agreement.different == []
    assert agreement.worst_weight < made.run.tolerance
    limit = 100 if made.run.dtype == "float32" else 10
    assert len(agreement.near_ties) <= agreement.compared / limit, agreement.near_ties


@each_run
def test_routes_are_what_the_kernels_were_given(matrix: Matrix, name: str) -> None:
    made = matrix.recorded[name]
    for item in made.log.meta["layers"]:
        rows = made.rows(item["layer"])
        assert [row["topk_ids"] for row in rows] == made.kernel[f"{item['name']}/ids"].tolist()
        weights = made.kernel[f"{item['name']}/weights"].tolist()
        assert [row["topk_weights"] for row in rows] == weights


@each_run
def test_routes_follow_from_the_engines_own_logits(matrix: Matrix, name: str) -> None:
    """The router's documented formula, with no other implementation's rounding in between."""
    import torch

    made = matrix.recorded[name]
    for item in made.log.meta["layers"]:
        logits = torch.from_numpy(made.kernel[f"{item['name']}/logits"])
        choice = oracle.choose(made.model, item["layer"], logits)
        agreement = oracle.compare_rows(made.rows(item["layer"]), choice)
        assert agreement.different == []
        bfloat16 = made.run.dtype == "bfloat16"  # vLLM takes the softmax in the model's dtype
        assert agreement.worst_weight < (0.005 if bfloat16 else oracle.WEIGHT_TOLERANCE)


def test_a_bias_that_the_backend_ignores_is_ignored_in_the_log_too(matrix: Matrix) -> None:
    """vLLM's CPU router knows a correction bias with groups only, and Ernie has no groups.

    The log tells what was executed, so it differs from what the model should have done.
    """
    made = matrix.recorded["ernie4.5-moe-biased"]
    full = oracle.compare(made.log, made.outputs, oracle.load(str(made.checkpoint)))
    assert len(full.different) > full.compared / 4


def test_engines_side_by_side_keep_to_their_own_files(matrix: Matrix) -> None:
    logs = [matrix.recorded[name].log for name in TOGETHER]
    assert logs[0].meta["model_id"] != logs[1].meta["model_id"]
    assert logs[0].requests.keys() == logs[1].requests.keys()  # both count from 0
    lengths = [
        {key: request["num_prompt_tokens"] for key, request in log.requests.items()} for log in logs
    ]
    assert lengths[0] != lengths[1]
    for name in TOGETHER:
        made = matrix.recorded[name]
        assert {(req, pos) for req, pos, _ in made.log.routes} == made.positions


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_run_says_why(matrix: Matrix, name: str) -> None:
    result, refusal = matrix.refused[name], REFUSALS[name]
    assert refusal.error in result["error"]
    assert result["at"].startswith(f"{refusal.at}:")


def test_the_matrix(matrix: Matrix, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the table; every figure in it is asserted above."""
    head = "architecture|layers|rows expected|logged|agree|ties|tie is under|weights within"
    lines = [head.split("|")]
    ties: list[tuple[Any, ...]] = []
    for name, made in matrix.recorded.items():
        agreement, layers = made.agreement, made.log.meta["layers_logged"]
        equal = agreement.compared - len(agreement.different) - len(agreement.near_ties)
        cells = (
            name,
            ",".join(map(str, layers)),
            len(made.positions) * len(made.architecture.moe_layers),
            made.log.rows,
            f"{equal}/{agreement.compared}",
            len(agreement.near_ties),
            f"{made.run.near_tie:g}",
            f"{agreement.worst_weight:.1e}",
        )
        lines.append([str(cell) for cell in cells])
        ties += [(name, *tie) for tie in agreement.near_ties if made.run.dtype == "float32"]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    with capsys.disabled():
        print()
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
        for name, result in matrix.refused.items():
            print(f"not run: {name}: {result['error'].splitlines()[0][:160]} ({result['at']})")
        for tie in ties:
            print(f"tie: architecture, request, position, layer, logged, oracle, gap: {tie}")
