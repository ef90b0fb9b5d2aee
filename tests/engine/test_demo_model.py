"""The demo model on a real engine: it loads as it is, and its recorded routes are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expert_profiler.metrics import token_types
from expert_profiler.resources import DEMO_MODEL
from expert_profiler.run import models, prompts
from tests.support import harness
from tools.demo import specialists, tokens

pytestmark = pytest.mark.engine

CODE = [
    "class Counter:\n    def __init__(self, name, values=None):\n        self.name = name\n",
    "def read_lines(path, encoding=None):\n    with open(path, encoding=encoding) as file:\n",
    "import os\nimport sys\n\ndef main():\n    if len(sys.argv) > 1:\n",
]
PROBLEMS = prompts.read_prompts(prompts.SHIPPED)[:3]
LAYERS, EXPERTS = 6, 16


@pytest.fixture(scope="module")
def recorded(
    engines: harness.Engines, tmp_path_factory: pytest.TempPathFactory
) -> tuple[harness.Log, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("demo")
    path = folder / "routes.jsonl"
    settings = {
        "model": str(DEMO_MODEL),
        "dtype": "float32",
        "max_model_len": models.PRESETS["demo"].max_model_len,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": 1,
    }
    step = {"generate": CODE + PROBLEMS, "sampling": {"max_tokens": 48, "temperature": 0}}
    results = engines.run(
        folder, settings, [step, {"rpc": "stop"}], env={"VLLM_LOG_MOE": str(path)}
    )
    return harness.read(path), results[0]["outputs"]


def test_its_routes_equal_a_hugging_face_forward_pass(recorded: Any) -> None:
    log, outputs = recorded
    agreement = harness.compare_with_oracle(log, outputs, str(DEMO_MODEL))
    expected = sum(len(o["prompt_token_ids"]) + len(o["token_ids"]) - 1 for o in outputs) * LAYERS
    harness.TABLE.append(("demo model", expected, log.rows, agreement))
    assert agreement.compared == log.rows == expected
    assert agreement.different == []
    assert len(agreement.near_ties) <= agreement.compared // 1000
    assert agreement.worst_weight < harness.WEIGHT_TOLERANCE
    assert log.end["self_check"]["verdict"] == "pass"


def test_it_goes_on_in_the_style_of_the_prompt(recorded: Any) -> None:
    _, outputs = recorded
    tokenizer = tokens.load(DEMO_MODEL)
    texts = [tokenizer.decode(output["token_ids"]) for output in outputs]
    for text in texts[: len(CODE)]:
        assert sum(line.startswith("    ") for line in text.splitlines()) >= 2, text
        assert any(word in text for word in ("self", "return", "if ", "raise", "for ")), text
    for text in texts[len(CODE) :]:
        assert text.startswith("\n\nAnswer: "), text
        assert " = " in text, text


def test_its_experts_know_what_kind_of_token_they_get(recorded: Any) -> None:
    """By rotating the classes within each request: what is left is what chance gives."""
    log, outputs = recorded
    tokenizer = tokens.load(DEMO_MODEL)
    texts, request, ids = [], [], {layer: [] for layer in range(LAYERS)}
    for number, output in enumerate(outputs):
        for position, token in enumerate(output["prompt_token_ids"]):
            texts.append(tokenizer.decode([token]))
            request.append(number)
            for layer, of_layer in ids.items():
                of_layer.append(log.routes[output["req_id"], position, layer]["topk_ids"])
    label = specialists.labels(texts, np.diff(request, prepend=-1) != 0)
    for of_layer in ids.values():
        test = token_types.permutation_test(
            label,
            np.array(of_layer),
            len(specialists.CLASSES),
            EXPERTS,
            request=np.array(request),
        )
        assert test.p_value < 0.01
        assert test.observed > 1.5 * test.null_mean


def test_it_was_loaded_as_it_lies_in_the_repository(recorded: Any) -> None:
    log, _ = recorded
    assert (log.meta["num_experts"], log.meta["top_k"]) == (EXPERTS, 2)
    assert log.meta["layers_logged"] == list(range(LAYERS))
    assert not list(Path(DEMO_MODEL).glob("*.py"))  # no code of its own
