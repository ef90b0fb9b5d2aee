# SPDX-License-Identifier: Apache-2.0
"""Token classes and what they tell of experts: by hand, closed forms, a second implementation."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_profiler.metrics import token_types as tt
from tests.support.routing import routings


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" two", "word"),
        ("don't", "word"),
        ("naïve", "word"),
        ("字", "word"),
        ("42", "digits"),
        (" 3.14", "digits"),
        ("),", "punctuation"),
        ("$", "punctuation"),
        ("<", "punctuation"),
        ("-", "punctuation"),
        ("...", "punctuation"),
        ("\n\n", "whitespace"),
        ("", "special"),
        ("<|endoftext|>", "special"),
        ("</s>", "special"),
        ("[PAD]", "special"),
        ("[1]", "other"),
        ("x2", "other"),
        ("\ufffd", "other"),
    ],
)
def test_every_kind_of_text_has_its_class(text: str, name: str) -> None:
    assert tt.CLASSES[tt.token_class(text)] == name
    assert tt.token_classes([text, text]).tolist() == [tt.CLASSES.index(name)] * 2


def test_special_tokens_can_be_named() -> None:
    assert tt.token_classes(["word", "word"], special={"word"}).tolist() == [tt.SPECIAL] * 2


def test_examples_of_the_docstrings() -> None:
    joint = tt.joint_counts(np.array([0, 1]), np.array([[0, 1], [1, 2]]), 2, 3)
    assert joint.tolist() == [[1, 1, 0], [0, 1, 1]]
    assert tt.mutual_information_bits(np.array([[2, 0], [0, 2]])) == 1
    assert tt.mutual_information_bits(np.array([[1, 1], [1, 1]])) == 0
    assert tt.class_lift(np.array([[3, 1], [1, 3]])).tolist() == [[1.5, 0.5], [0.5, 1.5]]


def test_two_blocks_tell_one_bit_and_one_hot_expert_none() -> None:
    labels = np.array([0, 1] * 8)
    blocks = np.array([[0, 1], [2, 3]] * 8)
    joint = tt.joint_counts(labels, blocks, 2, 4)
    assert tt.mutual_information_bits(joint) == pytest.approx(1)
    assert tt.class_lift(joint).tolist() == [[2, 2, 0, 0], [0, 0, 2, 2]]
    hot = tt.joint_counts(labels, np.zeros((16, 1), int), 2, 4)
    assert tt.mutual_information_bits(hot) == 0
    assert np.isnan(tt.class_lift(hot)[:, 1:]).all()


def test_nothing_counted_tells_nothing() -> None:
    assert math.isnan(tt.mutual_information_bits(np.zeros((2, 3), int)))


def test_chance_alone_is_as_large_as_its_formula_says() -> None:
    rng = np.random.default_rng(0)
    labels, ids = rng.integers(0, 3, 4000), rng.integers(0, 8, (4000, 1))
    found = tt.permutation_test(labels, ids, 3, 8, draws=200)
    assert found.null_mean == pytest.approx(2 * 7 / (2 * math.log(2) * 4000), rel=0.1)
    joint = tt.joint_counts(labels, ids, 3, 8)
    assert tt.chance_bits(joint) == pytest.approx(2 * 7 / (2 * math.log(2) * 4000))
    assert tt.chance_bits(np.array([[2, 0], [0, 2]])) == pytest.approx(0.1803, abs=1e-4)
    assert found.p_value > 0.01


@pytest.mark.parametrize("grouped", [False, True])
def test_a_relation_is_found(grouped: bool) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 400)
    ids = (labels * 4 + rng.integers(0, 4, 400))[:, None]
    request = np.arange(400) // 40 if grouped else None
    found = tt.permutation_test(labels, ids, 2, 8, request=request, draws=99)
    assert found.p_value == 0.01
    assert found.observed > 0.9 > 0.3 > found.null_p95


def test_runs_in_both_are_no_relation_when_requests_are_given() -> None:
    # Labels and experts each stay the same for 20 tokens, drawn apart from each other.
    rng = np.random.default_rng(2)
    labels = np.repeat(rng.integers(0, 2, 20), 20)
    ids = np.repeat(rng.integers(0, 4, 20), 20)[:, None]
    ids = np.roll(ids, 10, axis=0)
    shuffled = tt.permutation_test(labels, ids, 2, 4, draws=99)
    assert shuffled.p_value == 0.01  # shuffling tokens takes the runs for a relation
    rotated = tt.permutation_test(labels, ids, 2, 4, request=np.zeros(400), draws=99)
    assert rotated.p_value > 0.05


def test_false_alarms_are_as_rare_as_the_p_value_says() -> None:
    rng = np.random.default_rng(3)
    values = [
        tt.permutation_test(
            rng.integers(0, 2, 60), rng.integers(0, 4, (60, 1)), 2, 4, draws=19, seed=i
        ).p_value
        for i in range(200)
    ]
    assert np.mean(np.array(values) <= 0.05) < 0.1  # 0.05 expected, 0.1 is over 3 deviations off


def test_a_rotation_keeps_each_requests_labels_and_their_order() -> None:
    labels, request = np.array([1, 2, 3, 7, 8]), np.array([0, 0, 0, 4, 4])
    for seed in range(9):
        moved = tt._rotated(labels, request, np.random.default_rng(seed)).tolist()
        assert moved[:3] in ([1, 2, 3], [2, 3, 1], [3, 1, 2])
        assert moved[3:] in ([7, 8], [8, 7])


@settings(derandomize=True, deadline=None)
@given(routings(), st.integers(0, 99))
def test_information_equals_entropies_of_plain_counters(routing, seed: int) -> None:  # type: ignore[no-untyped-def]
    ids, experts = routing
    labels = np.random.default_rng(seed).integers(0, 3, len(ids))
    choices = [(int(c), int(e)) for c, row in zip(labels, ids, strict=True) for e in row]
    joint = tt.joint_counts(labels, ids, 3, experts)
    found = Counter(choices)
    assert joint.tolist() == [[found[c, e] for e in range(experts)] for c in range(3)]

    def entropy(counter: Counter) -> float:  # type: ignore[type-arg]
        n = sum(counter.values())
        return -sum(m / n * math.log2(m / n) for m in counter.values())

    # I = H(C) + H(E) - H(C, E)
    expected = (
        entropy(Counter(c for c, _ in choices))
        + entropy(Counter(e for _, e in choices))
        - entropy(found)
    )
    assert tt.mutual_information_bits(joint) == pytest.approx(expected, abs=1e-9)
    lift = tt.class_lift(joint)
    for c, e in found:
        of_class = [x for d, x in choices if d == c]
        everywhere = sum(x == e for _, x in choices) / len(choices)
        assert lift[c, e] == pytest.approx(of_class.count(e) / len(of_class) / everywhere)
