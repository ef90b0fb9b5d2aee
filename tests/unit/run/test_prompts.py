"""The prompts of a run."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_profiler.artifacts import PROMPT_SEPARATOR
from expert_profiler.errors import UserError
from expert_profiler.run import hub, prompts


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "answer", lambda *_: None)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = SimpleNamespace(load_dataset=load, disable_progress_bars=lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(hub, "answer", lambda *_: 200)


def test_25_different_word_problems_are_shipped() -> None:
    shipped = prompts.read_prompts(prompts.SHIPPED)
    assert len(shipped) == len(set(shipped)) == 25
    for prompt in shipped:
        assert prompt.endswith("?") and prompt == prompt.strip() and "\n" not in prompt
        assert any(char.isdigit() for char in prompt)


@pytest.mark.usefixtures("no_hub")
def test_an_offline_machine_takes_the_shipped_ones_and_says_so() -> None:
    found = prompts.load_prompts(None)
    assert found.name == "shipped-word-problems-25"
    assert "can't be reached" in found.note
    assert found.prompts == prompts.read_prompts(prompts.SHIPPED)


def test_the_first_25_gsm8k_questions_where_the_hub_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(name: str, config: str, split: str) -> list[dict[str, str]]:
        assert (name, config, split) == ("openai/gsm8k", "main", "test[:25]")
        return [{"question": f" How many is {i}? ", "answer": str(i)} for i in range(25)]

    fake_datasets(monkeypatch, load)
    found = prompts.load_prompts()
    assert found.name == "gsm8k-test-25"
    assert found.prompts[24] == "How many is 24?"


@pytest.mark.parametrize("rows", [OSError("connection reset"), [{"question": "only one?"}]])
def test_a_hub_that_fails_midway_costs_only_the_note(
    monkeypatch: pytest.MonkeyPatch, rows: Any
) -> None:
    def load(*_: str, **__: str) -> Any:
        if isinstance(rows, Exception):
            raise rows
        return rows

    fake_datasets(monkeypatch, load)
    found = prompts.load_prompts()
    assert found.name == "shipped-word-problems-25"
    assert "OSError" in found.note or "short" in found.note


def test_an_unreachable_hub_costs_under_3_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    # An address that is set aside for documentation: packets to it vanish.
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1")
    start = time.monotonic()
    assert hub.answer("api/datasets/openai/gsm8k") is None
    assert time.monotonic() - start < 3


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "_request", lambda *_: pytest.fail("asked"))
    assert hub.answer("api/models/x/y") is None


def test_a_files_prompts_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes("\ufeffFirst,\r\ntwo lines\r\n\r\n---\r\n\r\n  Zweite ü \n".encode())
    found = prompts.load_prompts(str(file))
    assert found.prompts == ["First,\ntwo lines", "  Zweite ü "]
    assert found.name == "file" and str(file) in found.note


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1)


@given(
    st.lists(
        texts.map(lambda text: text.strip("\n")).filter(
            lambda text: (
                text.strip() not in ("", "---")
                and not text.startswith(("\ufeff", "---\n"))
                and not text.endswith("\n---")
                and PROMPT_SEPARATOR not in text
            )
        ),
        min_size=1,
    )
)
def test_what_is_written_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, given_prompts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_prompts(path, given_prompts)
    assert prompts.read_prompts(path) == given_prompts
    joined = path.read_bytes().removesuffix(b"\n")
    found = prompts.PromptSet(given_prompts, "file", "")
    assert found.sha256 == hashlib.sha256(joined).hexdigest()


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (None, "no prompts file"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"one\n\n---\n\n\n\n---\n\nthree\n", "prompt 2 of 3"),
        (b"one\n\n---\n\n", "prompt 2 of 2"),
        (b"caf\xe9", "not UTF-8 at byte 3"),
    ],
)
def test_a_bad_prompts_file_gets_one_line(tmp_path: Path, content: bytes | None, fact: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=fact) as caught:
        prompts.load_prompts(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_prompts_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the prompts file"):
        prompts.load_prompts(str(tmp_path))
