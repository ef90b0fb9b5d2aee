# SPDX-License-Identifier: Apache-2.0
"""Token types in a report: tokens from outputs.jsonl, texts from a local tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from expert_profiler import errors
from expert_profiler.log import vocabulary
from expert_profiler.metrics import token_types
from tests.support.logs import meta, route, run_rows, write_log
from tests.unit.report.test_report_page import data_of

WORDS = ["<|end|>", "two", "cats", "7", "42", ".", ",", " "]


def checkpoint(folder: Path) -> Path:
    """A folder with a word-level tokenizer; ids are indices into WORDS."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=WORDS[0])
    )
    made.add_special_tokens([WORDS[0]])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_experts_that_take_digits_are_found(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model")
    rng = np.random.default_rng(1)
    rows, outputs = [], []
    for req in range(6):
        ids = rng.integers(0, len(WORDS), 40).tolist()
        outputs.append({"req_id": str(req), "prompt_token_ids": ids[:30], "token_ids": ids[30:]})
        for position, token in enumerate(ids[:-1]):
            digits = WORDS[token].isdigit()
            special = [6, 7] if digits else rng.permutation(6)[:2].tolist()
            rows.append(route(str(req), position, 0, special, phase="prefill"))
            rows.append(route(str(req), position, 1, rng.permutation(8)[:2].tolist()))
    path = write_log(tmp_path / "log.jsonl", rows, meta(model_id="model"))
    lines = "".join(json.dumps(record) + "\n" for record in outputs)
    (tmp_path / "outputs.jsonl").write_text(lines)
    types = data_of(path)["token_types"]
    assert types["tokens"] == 6 * 39
    tested = types["tested"]
    assert tested[0]["p_value"] <= 0.02 < 0.05 < tested[1]["p_value"]
    joint = np.array(types["joint_counts"][0])
    digits = token_types.CLASSES.index("digits")
    assert joint[digits, 6] == joint[:, 6].sum() > 0
    counted = sum(
        WORDS[t].isdigit() for o in outputs for t in [*o["prompt_token_ids"], *o["token_ids"]][:-1]
    )
    assert joint[digits].sum() == 2 * counted


def test_without_texts_the_report_says_why(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.jsonl", run_rows())
    assert data_of(path)["token_types"]["skipped"].startswith("no outputs.jsonl beside log.jsonl")
    (tmp_path / "outputs.jsonl").write_text("")
    with pytest.raises(vocabulary.UnavailableError, match="local folder tiny/moe"):
        vocabulary.find(path, "tiny/moe")
    paths = vocabulary.find(path, "tiny/moe", tokenizer=checkpoint(tmp_path / "model"))
    with pytest.raises(vocabulary.UnavailableError, match="no request of the log stands in"):
        vocabulary.Labels(["0", "1"], *paths)


def test_named_files_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(errors.UserError, match="no file"):
        vocabulary.find(tmp_path / "log.jsonl", "m", outputs=tmp_path / "no.jsonl")
    (tmp_path / "outputs.jsonl").write_text("")
    with pytest.raises(errors.UserError, match=r"no tokenizer\.json in"):
        vocabulary.find(tmp_path / "log.jsonl", "m", tokenizer=tmp_path)
