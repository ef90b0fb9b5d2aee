# SPDX-License-Identifier: Apache-2.0
"""The prompts of a run: GSM8K where the hub answers, the project's own where not, or a file."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expert_profiler.artifacts import PROMPT_SEPARATOR
from expert_profiler.errors import UserError
from expert_profiler.run import hub

COUNT = 25
SHIPPED = Path(__file__).resolve().parents[1] / "data" / "word_problems.txt"
GSM8K = "openai/gsm8k"


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and the facts that go into the artifacts with them."""

    prompts: list[str]
    name: str  # "gsm8k-test-25", "shipped-word-problems-25" or "file"
    note: str  # where they are from and why, one line

    @property
    def sha256(self) -> str:
        """Of prompts.txt's text as UTF-8: of the prompts joined with the separator."""
        return hashlib.sha256(PROMPT_SEPARATOR.join(self.prompts).encode()).hexdigest()


def load_prompts(source: str | None = None) -> PromptSet:
    """The prompts of a run.

    Args:
        source: a file of prompts; None takes the first 25 GSM8K test questions where the hub
            answers (an offline machine loses under 3 s), and the 25 shipped ones where not.

    Raises:
        UserError: the file is missing, no text, or holds an empty prompt.
    """
    if source is not None:
        path = Path(source)
        return PromptSet(read_prompts(path), "file", f"from {path}")
    questions, why_not = gsm8k_questions()
    if questions:
        return PromptSet(questions, "gsm8k-test-25", "the first 25 test questions of GSM8K")
    note = f"25 word problems written for this project, because {why_not}"
    return PromptSet(read_prompts(SHIPPED), "shipped-word-problems-25", note)


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file that has a line ``---`` between blank lines from one to the next.

    Line ends are normalised; empty lines around a prompt are not part of it.
    """
    example = "give a text file with --prompts, or leave --prompts out"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no prompts file {path}; {example}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; {example}") from None
    except OSError as error:
        raise UserError(
            f"cannot read the prompts file {path}: {error.strerror}; {example}"
        ) from None
    prompts = [part.strip("\n") for part in text.split(PROMPT_SEPARATOR)]
    if not text.strip():
        raise UserError(f"{path} is empty, it must hold at least one prompt; {example}")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip() or prompt.strip() == "---":
            raise UserError(
                f"prompt {number} of {len(prompts)} in {path} is empty; "
                "take out the '---' line before or after it"
            )
    return prompts


def gsm8k_questions() -> tuple[list[str], str]:
    """The first 25 GSM8K test questions, or an empty list and the reason."""
    # The libraries retry for minutes before they give up; so one short question first.
    status = hub.answer(f"api/datasets/{GSM8K}")
    if status is None:
        return [], "the Hugging Face hub can't be reached"
    if status != 200:
        return [], f"the Hugging Face hub answered {status} for {GSM8K}"
    # Read when huggingface_hub is imported. Seconds.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    noisy = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in noisy]
    try:
        for logger in noisy:
            logger.setLevel(logging.CRITICAL)
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.load_dataset(GSM8K, "main", split=f"test[:{COUNT}]")
        questions = [str(row["question"]).strip() for row in rows]
    except Exception as error:  # whatever fails in there, the shipped prompts do the job
        return [], f"GSM8K could not be loaded ({type(error).__name__})"
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
    return (questions, "") if len(questions) == COUNT else ([], "GSM8K came back short")


def write_prompts(path: Path, prompts: Sequence[str]) -> None:
    """Write prompts.txt: the prompts joined with the separator, and a last line end."""
    path.write_text(PROMPT_SEPARATOR.join(prompts) + "\n", encoding="utf-8")
