# SPDX-License-Identifier: Apache-2.0
"""What a model must beat to have learned anything: a unigram and an interpolated 3-gram model.

Both are counted on the training tokens and judged on the very tokens that the model is judged on.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]


def unigram(training: Tokens, vocabulary: int) -> Probabilities:
    """[vocabulary], with one added to every count: no token has probability 0."""
    counts = np.bincount(training, minlength=vocabulary) + 1.0
    return np.asarray(counts / counts.sum(), np.float64)


def trigram(training: Tokens, judged: Tokens, vocabulary: int) -> Probabilities:
    """Probability of each of ``judged[2:]`` after the two tokens before it, [len(judged) - 2].

    Interpolated as Witten and Bell do: after a context seen n times with t different successors,
    P = (count + t * P_shorter) / (n + t), from the unigram to two tokens of context.
    """
    probability = unigram(training, vocabulary)[judged[2:]]
    for order in (1, 2):
        probability = _interpolate(training, judged, vocabulary, order, probability)
    return probability


def _interpolate(
    training: Tokens, judged: Tokens, vocabulary: int, order: int, shorter: Probabilities
) -> Probabilities:
    """The next order's probabilities; ``shorter``: those with one token of context less."""
    grams, counts = np.unique(_codes(training, vocabulary, order + 1), return_counts=True)
    contexts, first = np.unique(grams // vocabulary, return_index=True)
    seen = np.add.reduceat(counts, first)
    kinds = np.diff(np.append(first, len(grams)))

    asked = _codes(judged[2 - order :], vocabulary, order + 1)
    count = _look_up(grams, counts, asked)
    n = _look_up(contexts, seen, asked // vocabulary)
    t = _look_up(contexts, kinds, asked // vocabulary)
    mixed = (count + t * shorter) / np.maximum(n + t, 1)
    return np.asarray(np.where(n > 0, mixed, shorter), np.float64)


def _codes(tokens: Tokens, vocabulary: int, length: int) -> Tokens:
    """One number a run of ``length`` tokens, [len(tokens) - length + 1]."""
    runs = np.lib.stride_tricks.sliding_window_view(tokens, length)
    return np.asarray(runs @ vocabulary ** np.arange(length - 1, -1, -1), np.int64)


def _look_up(keys: Tokens, values: Tokens, asked: Tokens) -> Tokens:
    """The value of every asked key, 0 where there is none. ``keys`` is sorted."""
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.asarray(np.where(keys[at] == asked, values[at], 0), np.int64)
