# SPDX-License-Identifier: Apache-2.0
"""Which experts take which kind of token: classes of token texts, and what they tell of experts.

``labels`` is [tokens] integers, the class of each token (such as codes into ``CLASSES``);
``topk_ids`` is [tokens, K], the experts of each token in one layer, all different in a row. A
sample is one choice: a token of class c that takes expert e adds one to cell (c, e).
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from expert_profiler.metrics.usage import Floats

Ids: TypeAlias = "npt.NDArray[Any]"
Ints: TypeAlias = "npt.NDArray[np.int64]"

#: What ``token_classes`` tells apart; a code is an index into this.
CLASSES = ("word", "digits", "punctuation", "whitespace", "special", "other")
WORD, DIGITS, PUNCTUATION, WHITESPACE, SPECIAL, OTHER = range(len(CLASSES))

# The names that tokenizers give their control tokens.
_BRACKETS = (("<|", "|>"), ("<", ">"), ("[", "]"))


def token_class(text: str, special: Collection[str] = ()) -> int:
    """The code of one token's text; spaces around a text don't count.

    word: letters and their marks, with - ' _ inside. digits: decimal digits with . or , inside.
    punctuation: punctuation and symbols. whitespace: nothing else. special: a control token: in
    ``special``, an empty text, or a name such as <|endoftext|>, <s> and [PAD]. other: a mixture,
    or bytes that are no character by themselves.
    token_class(" two") = WORD, token_class("42") = DIGITS, token_class("),") = PUNCTUATION.
    """
    if text in special or not text:
        return SPECIAL
    core = text.strip()
    if not core:
        return WHITESPACE
    if any(_is_name(core, *ends) for ends in _BRACKETS):
        return SPECIAL
    if "\ufffd" in core:
        return OTHER
    kinds = {unicodedata.category(character)[0] for character in core}
    if kinds <= {"P", "S"}:
        return PUNCTUATION
    plain = {unicodedata.category(c)[0] for c in core if c not in "-'\u2019_"}
    if plain <= {"L", "M"}:
        return WORD
    if all(c.isdecimal() or c in ".," for c in core):
        return DIGITS
    return OTHER


def token_classes(texts: Sequence[str], special: Collection[str] = ()) -> npt.NDArray[np.int8]:
    """``token_class`` of each text. [texts] int8, codes into ``CLASSES``."""
    known: dict[str, int] = {}
    for text in texts:
        if text not in known:
            known[text] = token_class(text, special)
    return np.array([known[text] for text in texts], dtype=np.int8)


def joint_counts(labels: Ids, topk_ids: Ids, num_classes: int, num_experts: int) -> Ints:
    """n_ce = choices of expert e by tokens of class c. [classes, experts] int64, sum tokens * K.

    joint_counts([0, 1], [[0, 1], [1, 2]], 2, 3) = [[1, 1, 0], [0, 1, 1]].
    """
    keys = labels.astype(np.int64)[:, None] * num_experts + topk_ids
    cells = np.bincount(keys.ravel(), minlength=num_classes * num_experts)
    return cells.reshape(num_classes, num_experts)


def mutual_information_bits(joint: Ids) -> float:
    """I(C; E) = sum_ce p_ce * log2(p_ce / (p_c * p_e)): what the class tells of the expert.

    joint: [classes, experts] counts, such as ``joint_counts``. Bits, 0 (independent) to
    min(H(C), H(E)); NaN without counts. It is never exactly 0 on a sample: by chance alone it is
    about ``chance_bits``, which ``permutation_test`` measures.
    mutual_information_bits([[2, 0], [0, 2]]) = 1; of [[1, 1], [1, 1]] = 0.
    """
    total = float(joint.sum())
    if total == 0:
        return float("nan")
    p = joint / total
    independent = p.sum(axis=1, keepdims=True) * p.sum(axis=0, keepdims=True)
    cells = p > 0
    bits = float((p[cells] * np.log2(p[cells] / independent[cells])).sum())
    return max(0.0, bits)  # rounding may leave a last bit below


def chance_bits(joint: Ids) -> float:
    """What ``mutual_information_bits`` has by sampling alone, about, for independent samples.

    (rows - 1) * (columns - 1) / (2 * ln 2 * n), of the rows and columns that occur; n = sum.
    Bits; NaN without counts. chance_bits([[2, 0], [0, 2]]) = 1 / (2 * 0.6931 * 4) = 0.1803.
    """
    n = int(joint.sum())
    if n == 0:
        return float("nan")
    rows, columns = (int((joint.sum(axis=axis) > 0).sum()) for axis in (1, 0))
    return (rows - 1) * (columns - 1) / (2 * math.log(2) * n)


def class_lift(joint: Ids) -> Floats:
    """P(e | c) / P(e): how much more often class c takes expert e than all tokens do.

    joint: [classes, experts] counts. [classes, experts] float64, 0 (never) up, 1 where the class
    makes no difference; NaN for a class without tokens and an expert never chosen.
    class_lift([[3, 1], [1, 3]]) = [[1.5, 0.5], [0.5, 1.5]].
    """
    total = joint.sum()
    expected = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, joint * float(total) / expected, np.nan)


@dataclass(frozen=True)
class PermutationTest:
    """An observed value beside its distribution when labels and experts are unrelated.

    p_value = (1 + draws at least as large as observed) / (1 + draws), 1 / (1 + draws) to 1.
    """

    observed: float
    null_mean: float
    null_p95: float
    p_value: float
    draws: int


def permutation_test(
    labels: Ids,
    topk_ids: Ids,
    num_classes: int,
    num_experts: int,
    *,
    request: Ids | None = None,
    draws: int = 200,
    seed: int = 0,
) -> PermutationTest:
    """Whether ``mutual_information_bits`` of class and expert is more than chance gives.

    Without ``request``, each draw shuffles the labels over all tokens. With ``request`` ([tokens]
    integers, equal neighbours are one text in order), each draw rotates the labels of every
    request by its own random number of places: labels and routing keep their order in the text, so
    that runs of alike tokens with alike experts are not taken for a relation of the two.
    """
    observed = mutual_information_bits(joint_counts(labels, topk_ids, num_classes, num_experts))
    rng = np.random.default_rng(seed)
    null = np.empty(draws)
    for draw in range(draws):
        moved = rng.permutation(labels) if request is None else _rotated(labels, request, rng)
        null[draw] = mutual_information_bits(
            joint_counts(moved, topk_ids, num_classes, num_experts)
        )
    # A rotation by 0 gives the observed value again up to rounding: it must count as "as large".
    reached = int((null >= observed - 1e-12).sum())
    return PermutationTest(
        observed,
        float(null.mean()),
        float(np.quantile(null, 0.95)),
        (1 + reached) / (1 + draws),
        draws,
    )


def _rotated(labels: Ids, request: Ids, rng: np.random.Generator) -> Ids:
    """Each request's labels moved on by a random number of places, the end to the start."""
    n = len(labels)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(request)) + 1])
    lengths = np.diff(np.append(starts, n))
    shifts = rng.integers(0, lengths)
    start, length, shift = (np.repeat(each, lengths) for each in (starts, lengths, shifts))
    moved: Ids = labels[start + (np.arange(n) - start + shift) % length]
    return moved


def _is_name(core: str, opening: str, closing: str) -> bool:
    """<name> with letters inside: "<" and "<=" and "[1]" are punctuation and text."""
    inside = core[len(opening) : -len(closing)]
    return (
        core.startswith(opening)
        and core.endswith(closing)
        and inside.strip("/|_").replace("_", "").isalpha()
    )
