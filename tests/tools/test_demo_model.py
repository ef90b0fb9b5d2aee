"""The committed demo model: small, complete, and as good as its card says."""

from __future__ import annotations

import json
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_profiler.resources import DEMO_MODEL
from expert_profiler.run import models, prompts
from tools import demo_evidence
from tools import train_demo_moe as training
from tools.demo import card, corpus, problems, specialists, tokens

FOLDER = DEMO_MODEL
load = cache(tokens.load)
FILES = {
    "README.md", "config.json", "evidence.json", "generation_config.json", "loss_curve.png",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json",
}  # fmt: skip


def facts_of(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def test_it_is_small_and_nothing_else_lies_beside_it() -> None:
    assert {file.name for file in FOLDER.iterdir()} == FILES
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 8_500_000


def test_its_card_says_what_was_measured() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert text == card.text(facts_of("training.json"), facts_of("evidence.json"))


def test_the_word_problems_of_its_training_are_made_again() -> None:
    made = islice(problems.problems(corpus.TRAINING_SEED), corpus.TRAINING_PROBLEMS)
    size = sum(len(text.encode()) for text in made)
    assert size == facts_of("training.json")["text"]["training_bytes"]["problems"]


def test_it_beats_the_baselines_on_held_out_text() -> None:
    for kind, found in facts_of("training.json")["held_out"].items():
        model, trigram, unigram = (
            found[name]["bits_per_token"] for name in ("model", "trigram", "unigram")
        )
        assert model < 0.95 * trigram < trigram < unigram, kind


def test_its_evidence_shows_something() -> None:
    found = facts_of("evidence.json")
    assert found["same_text_as_in_training"]
    trained, untrained = (found["information"][name] for name in ("trained", "untrained"))
    for after, before in zip(trained, untrained, strict=True):
        assert after["p_value"] < 0.01
        assert after["observed"] > 2 * before["observed"]
    assert len(found["specialists"]) >= 5
    workloads, *halves = found["differences"]
    assert workloads["p_value"] < 0.01
    assert all(half["p_value"] > 0.05 for half in halves)


@given(st.text(max_size=60))
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    tokenizer = load(FOLDER)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_its_tokens_keep_the_classes_apart() -> None:
    tokenizer = load(FOLDER)
    encoded = tokenizer.encode("def f(x):\n        return x + 1024\n").ids
    texts = [tokenizer.decode([token]) for token in encoded]
    label = specialists.labels(texts, np.arange(len(texts)) == 0)
    names = [specialists.CLASSES[i] for i in label]
    assert texts[names.index("indentation")] == "        "
    assert [t for t, name in zip(texts, names, strict=True) if name == "digits"] == [
        " 1", "0", "2", "4",
    ]  # fmt: skip
    assert "other" not in names


def test_the_prompts_of_a_run_fit() -> None:
    tokenizer = load(FOLDER)
    longest = max(len(tokenizer.encode(p).ids) for p in prompts.read_prompts(prompts.SHIPPED))
    assert longest + 128 <= (models.PRESETS["demo"].max_model_len or 0) == 1024


def test_the_weights_are_those_that_were_judged() -> None:
    """Some held-out text of this Python's library costs about as many bits as the card says."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = load(FOLDER)
    pieces = demo_evidence.workloads(corpus.corpus())["code-a"]
    nats = training.nats_of(model, training.stream(tokenizer, pieces)[: 8 * training.BLOCK + 1])
    judged = facts_of("training.json")["held_out"]["library"]
    assert nats.mean() / np.log(2) < judged["trigram"]["bits_per_token"]
    assert abs(nats.mean() / np.log(2) - judged["model"]["bits_per_token"]) < 1
