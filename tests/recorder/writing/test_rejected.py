"""Which rows a speculating request computed for nothing, on made-up sequences of steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.moe_routes.writing.formats import jsonl
from vllm.moe_routes.writing.rows import Flag, rejected

from tests.support.build import QUICK, a_layer, a_table, clean_routes


class Speculated(NamedTuple):
    """One step of a request: where it began, its rows' input tokens, drafts and what came of it."""

    first: int
    inputs: list[int]
    num_drafts: int
    num_tokens_after: int


def _decode(prompt: int, true_tokens: list[int], steps: list[list[bool]]) -> list[Speculated]:
    """Run a request whose model would produce ``true_tokens`` whatever is drafted.

    Args:
        prompt: prompt length, of ``true_tokens``.
        true_tokens: the sequence.
        steps: of every decode step, which drafts are right. A wrong one is -1.
    """
    run = [Speculated(0, true_tokens[:prompt], 0, prompt + 1)]
    known = prompt + 1
    for right in steps:
        drafts = [true_tokens[known + i] if ok else -1 for i, ok in enumerate(right)]
        inputs = [true_tokens[known - 1], *drafts]
        confirmed = next((i for i, ok in enumerate(right) if not ok), len(right))
        # The scheduler rolls back: the next step begins behind the last confirmed token.
        run.append(Speculated(known - 1, inputs, len(drafts), known + confirmed + 1))
        known += confirmed + 1
    return run


def _flags(step: Speculated) -> list[bool]:
    positions = step.first + np.arange(len(step.inputs))
    flags: list[bool] = rejected(positions, step.num_drafts, step.num_tokens_after).tolist()
    return flags


@QUICK
@given(prompt=st.integers(1, 6), steps=st.lists(st.lists(st.booleans(), max_size=5), max_size=8))
def test_what_is_left_is_the_sequence_once_and_in_order(
    prompt: int, steps: list[list[bool]]
) -> None:
    sequence = [100 + i for i in range(prompt + sum(len(s) + 1 for s in steps) + 8)]
    run = _decode(prompt, sequence, steps)
    kept = [
        (step.first + i, token)
        for step in run
        for i, (token, bad) in enumerate(zip(step.inputs, _flags(step), strict=True))
        if not bad
    ]
    # Every position up to the last token, which was sampled and never an input.
    assert kept == list(enumerate(sequence[: run[-1].num_tokens_after - 1]))


@pytest.mark.parametrize(
    ("right", "flags"),
    [
        ([], [False]),
        ([True, True], [False, False, False]),
        ([True, False, True], [False, False, True, True]),
        ([False, True], [False, True, True]),
    ],
)
def test_everything_behind_the_first_wrong_draft_is_rejected(
    right: list[bool], flags: list[bool]
) -> None:
    _, step = _decode(4, list(range(20)), [right])
    assert _flags(step) == flags


def test_a_prompt_in_chunks_is_never_rejected() -> None:
    """Its rows lie before the last token too, but the last chunk's end is the prompt's."""
    assert not rejected(np.arange(8), 0, 20).any()
    assert not rejected(np.arange(8, 20), 0, 21).any()


def test_a_request_that_samples_nothing_keeps_its_last_row() -> None:
    """A pooling request's last token is an input, and no draft."""
    assert not rejected(np.arange(5), 0, num_tokens=5).any()


def test_a_request_preempted_right_after_its_drafts_keeps_the_confirmed_ones() -> None:
    """It begins at 0 again, so where its next step begins says nothing about the drafts."""
    positions = np.array([9, 10, 11, 12])
    assert rejected(positions, 3, num_tokens=12).tolist() == [False, False, True, True]


def test_a_stop_among_the_confirmed_drafts_ends_the_sequence_there() -> None:
    positions = np.array([9, 10, 11, 12])
    assert rejected(positions, 3, num_tokens=11).tolist() == [False, True, True, True]


def test_the_file_says_rejected() -> None:
    layers = [a_layer(0)]
    routes = clean_routes(layers, 2)
    rows = a_table(2, flags=[Flag.NONE, Flag.REJECTED])
    good = np.ones((2, 1), dtype=bool)
    lines = jsonl.encode_routes(layers, 0, rows, routes.topk_ids, routes.topk_weights, good)
    first, second = lines.splitlines()
    assert b"flag" not in first
    assert b'"flag":"rejected"' in second
