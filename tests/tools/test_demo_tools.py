"""How the demo model is made: its text, its baselines, its training and what is said of it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from expert_profiler.errors import UserError
from tools import make_synthetic_log
from tools import train_demo_moe as training
from tools.demo import card, corpus, ngrams, problems, recording, specialists

SMALL = training.Settings(
    layers=2, hidden=32, heads=1, experts=4, top_k=2, moe_intermediate=16, shared_intermediate=16,
    vocabulary=50, steps=4, blocks=1, halves=0.5, warmup=1,
)  # fmt: skip


# ---- the text ------------------------------------------------------------------------------------


def test_the_worked_answers_are_right() -> None:
    checked = 0
    for text in islice(problems.problems(seed=5), 500):
        question, _, answer = text.partition("\n\nAnswer: ")
        assert question.endswith("?")
        for left, right in re.findall(r"((?:\d+ [-+*/] )+\d+) = (\d+)", answer):
            assert math.floor(eval(left)) == int(right), text  # noqa: S307 (digits and operators)
            checked += 1
    assert checked > 1000


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Forty modules, and files that are no reading matter."""
    for i in range(40):
        (tmp_path / f"m{i:02}.py").write_text(f"# module {i}\n" + "x = 1\n" * 50)
    for name in ("test/test_a.py", "encodings/cp1.py", "config-3.11/c.py", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# unread\n" * 50)
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'b': 'two', 'a': 'one'}\n")
    return tmp_path


def test_tests_tables_and_settings_are_not_read(library: Path) -> None:
    documents = list(corpus.library(library))
    assert len(documents) == 42
    assert not any("unread" in text for text in documents)
    assert documents[-2:] == ["one", "two"]


def test_what_is_held_out_is_not_trained_on(library: Path) -> None:
    found = corpus.corpus(library)
    assert len(found.held_out["library"]) == 3
    for kind in ("library", "problems"):
        assert found.training[kind]
        assert not set(found.training[kind]) & set(found.held_out[kind])


def test_equal_text_has_an_equal_hash(library: Path) -> None:
    before = corpus.corpus(library).sha256
    assert corpus.corpus(library).sha256 == before
    (library / "m03.py").write_text("y = 2\n" * 60)
    assert corpus.corpus(library).sha256 != before


# ---- the baselines -------------------------------------------------------------------------------


def witten_bell(training_tokens: list[int], context: tuple[int, ...], token: int, v: int) -> float:
    """The same formula, one probability at a time."""
    n = len(context)
    if n == 0:
        return (training_tokens.count(token) + 1) / (len(training_tokens) + v)
    grams = [tuple(training_tokens[i : i + n + 1]) for i in range(len(training_tokens) - n)]
    after = [gram[-1] for gram in grams if gram[:-1] == context]
    shorter = witten_bell(training_tokens, context[1:], token, v)
    if not after:
        return shorter
    kinds = len(set(after))
    return (after.count(token) + kinds * shorter) / (len(after) + kinds)


def test_the_3_gram_model_is_witten_and_bells() -> None:
    rng = np.random.default_rng(1)
    data, judged = rng.integers(0, 5, 60), rng.integers(0, 6, 40)
    found = ngrams.trigram(data, judged, 6)
    listed = judged.tolist()
    for i in range(2, len(listed)):
        want = witten_bell(data.tolist(), tuple(listed[i - 2 : i]), listed[i], 6)
        assert found[i - 2] == pytest.approx(want)


def test_the_baselines_give_all_tokens_together_probability_1() -> None:
    data = np.random.default_rng(2).integers(0, 4, 50)
    assert ngrams.unigram(data, 5).sum() == pytest.approx(1)
    judged = np.concatenate([[*data[:2], token] for token in range(5)])
    assert ngrams.trigram(data, judged, 5)[::3].sum() == pytest.approx(1)


# ---- training ------------------------------------------------------------------------------------


def test_an_epoch_takes_every_block_once() -> None:
    data = np.arange(20 * training.BLOCK + 7)
    settings = replace(SMALL, blocks=4, steps=8, halves=0.5)
    for epoch in range(2):
        steps = range(epoch * 4, epoch * 4 + 4)
        rows = [row for step in steps for row in training.batch(data, step, settings)]
        assert {len(row) for row in rows} == {(257, 513)[epoch]}
        first = np.sort(np.concatenate([row[:-1] for row in rows]))
        assert len(first) == len(set(first.tolist())) == 16 * training.BLOCK
        assert all((np.diff(row) == 1).all() for row in rows)


def test_a_training_that_was_cut_short_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    data = np.random.default_rng(3).integers(0, 50, 5 * training.BLOCK)
    held = data[: training.BLOCK + 1]
    whole, curve = training.train(SMALL, data, held, tmp_path / "whole")

    real, calls = training.batch, []

    def dies(*args: Any) -> Any:
        calls.append(args[1])
        if args[1] == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "batch", dies)
    with pytest.raises(KeyboardInterrupt):
        training.train(SMALL, data, held, tmp_path / "cut")
    monkeypatch.setattr(training, "batch", real)
    resumed, other = training.train(SMALL, data, held, tmp_path / "cut")
    assert calls == [0, 1, 2, 3]
    for name, tensor in whole.state_dict().items():
        assert (tensor == resumed.state_dict()[name]).all(), name
    assert [row[0] for row in other["rows"]] == [row[0] for row in curve["rows"]] == [4]


def test_a_save_of_another_training_is_not_gone_on_with(tmp_path: Path) -> None:
    data = np.random.default_rng(3).integers(0, 50, 3 * training.BLOCK)
    held = data[: training.BLOCK + 1]
    training.train(replace(SMALL, steps=1), data, held, tmp_path)
    with pytest.raises(UserError, match="other settings or other text"):
        training.train(replace(SMALL, steps=1, seed=9), data, held, tmp_path)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    data = np.tile(np.arange(40), 60)
    settings = replace(SMALL, steps=40, halves=1.0, learning_rate=1e-2)
    _, curve = training.train(settings, data, data[: training.BLOCK + 1], tmp_path)
    assert curve["rows"][-1][2] < math.log(50) - 1


def test_a_checkpoint_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--force"):
        training.main([str(tmp_path)])


# ---- its recordings -----------------------------------------------------------------------------


@pytest.fixture
def logs(tmp_path: Path) -> tuple[list[Path], list[Any]]:
    """Two logs of made-up passes, the second's requests named on, and what the engine gave back."""
    paths = [tmp_path / f"{name}.jsonl" for name in ("a", "b")]
    spec = make_synthetic_log.Spec(rows=15_000, layers=3, experts=8, top_k=2)
    for path, seed in zip(paths, (1, 2), strict=True):
        make_synthetic_log.make(path, replace(spec, seed=seed), lambda _: None)
    renamed = re.sub(r'"req_id":\s*"', r"\g<0>b", paths[1].read_text())
    paths[1].write_text(renamed)
    outputs = [
        SimpleNamespace(
            request_id=name,
            prompt_token_ids=[number] * 20,
            outputs=[SimpleNamespace(token_ids=range(500), text=f"text of {name}")],
        )
        # Not in the order of the log.
        for number, name in enumerate(
            [*map(str, reversed(range(25))), *(f"b{i}" for i in range(25))]
        )
    ]
    return paths, outputs


def test_a_recording_is_what_stands_in_the_logs(logs: tuple[list[Path], list[Any]]) -> None:
    paths, outputs = logs
    found = recording.read(paths, outputs)
    number = {output.request_id: i for i, output in enumerate(outputs)}
    want: dict[tuple[int, int], dict[int, list[int]]] = {}
    prefill = 0
    counts = np.zeros((50, 3, 8), int)
    for line in (line for path in paths for line in path.read_text().splitlines()):
        row = json.loads(line)
        if row["type"] == "route":
            request = number[row["req_id"]]
            want.setdefault((request, row["token_idx"]), {})[row["layer"]] = row["topk_ids"]
            prefill += row["phase"] == "prefill" and row["layer"] == 0
            counts[request, row["layer"], row["topk_ids"]] += 1
    assert found.request.tolist() == [request for request, _ in sorted(want)]
    assert found.topk_ids.tolist() == [[want[at][i] for i in range(3)] for at in sorted(want)]
    ids = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    assert found.tokens.tolist() == [ids[request][position] for request, position in sorted(want)]
    assert 0 < found.prefill.sum() == prefill < len(want)
    assert (found.counts(8) == counts).all()
    assert found.counts(8, found.prefill).sum() == prefill * 3 * 2
    assert found.texts[0] == "text of 24"


def test_a_token_without_a_row_in_some_layer_is_refused(
    logs: tuple[list[Path], list[Any]],
) -> None:
    paths, outputs = logs
    lines = paths[0].read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if json.loads(line)["type"] == "route")
    paths[0].write_text("".join(lines[:at] + lines[at + 1 :]))
    with pytest.raises(UserError, match="without a row in some layer"):
        recording.read(paths, outputs)


# ---- what is said of it --------------------------------------------------------------------------


def test_an_indentation_is_spaces_that_begin_a_line() -> None:
    texts = ["if", " x", ":", "\n", "    ", "y", " ", "=", "\n\n", "  ", "    "]
    first = np.array([i in (0, 10) for i in range(len(texts))])
    names = [specialists.CLASSES[i] for i in specialists.labels(texts, first)]
    assert names[4] == names[9] == "indentation"
    assert names[3] == names[6] == names[10] == "whitespace"


def test_a_specialist_is_named_by_what_it_takes_beyond_its_share() -> None:
    texts = np.array(["1", "a", "2", "b", "1", "c"], dtype=object)
    label = specialists.labels(texts, np.zeros(6, bool))
    ids = np.array([[0], [1], [0], [1], [0], [0]])
    found = specialists.specialist(3, 0, ids, label, texts)
    assert found is not None
    assert (found.layer, found.expert, found.class_name) == (3, 0, "digits")
    assert (found.share, found.expected, found.load) == (3 / 4, 3 / 6, 4 / 6)
    # "1" came twice and expert 0 took both: 2 - 2 * 4/6 beyond an even spread, "2": 1 - 4/6.
    assert found.top[0] == ("1", 2)
    assert specialists.specialist(3, 2, ids, label, texts) is None


def test_the_most_specialised_are_not_all_alike() -> None:
    rng = np.random.default_rng(4)
    texts = np.array(rng.choice(["1", "a", ",", "\n"], 400), dtype=object)
    label = specialists.labels(texts, np.zeros(400, bool))
    expert = {"1": 0, "a": 1, ",": 2, "\n": 3}
    ids = np.array([[[expert[t]]] * 4 for t in texts])
    chosen = specialists.most_specialised(ids, label, texts, 4, 6)
    assert len(chosen) == 6
    for layer in range(4):
        assert sum(found.layer == layer for found in chosen) <= 2
    assert max(sum(f.class_name == g.class_name for g in chosen) for f in chosen) <= 3
    assert all(found.share == 1 for found in chosen)


def test_tokens_are_shown_so_that_they_can_be_told_apart() -> None:
    assert card.shown("    ") == "`4 spaces`"
    assert card.shown("\n") == r"`\n`"
    assert "|" not in card.shown("a|b")
