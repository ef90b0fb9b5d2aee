# SPDX-License-Identifier: Apache-2.0
"""What the experts of a recorded run have specialised in: pure functions of routes and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from expert_profiler.metrics import token_types

Ids: TypeAlias = "npt.NDArray[Any]"

#: ``token_types.CLASSES``, and the white space that begins a line.
CLASSES = (*token_types.CLASSES, "indentation")
INDENTATION = len(token_types.CLASSES)


def labels(texts: Sequence[str], first: Ids) -> npt.NDArray[np.int64]:
    """The class of each token, codes into :data:`CLASSES`, [tokens].

    Args:
        texts: of the tokens, request after request in the order of the text.
        first: [tokens] bool, whether a token is its request's first.
    """
    found = token_types.token_classes(texts).astype(np.int64)
    for i in range(1, len(texts)):
        spaces = not texts[i].strip(" ")
        if spaces and not first[i] and texts[i - 1].endswith("\n"):
            found[i] = INDENTATION
    return found


@dataclass(frozen=True)
class Specialist:
    """An expert that one class of tokens has (nearly) to itself.

    Attributes:
        layer, expert: which one.
        class_name: the class that it takes most beyond that class's share of all choices.
        share: of the expert's choices, those by tokens of this class; 0 to 1.
        expected: of all choices in the layer, those by tokens of this class; 0 to 1.
        load: of all choices in the layer, those of this expert; 0 to 1.
        top: token texts, largest excess over an even spread first, and how often it took each.
    """

    layer: int
    expert: int
    class_name: str
    share: float
    expected: float
    load: float
    top: list[tuple[str, int]]


def specialist(layer: int, expert: int, topk_ids: Ids, label: Ids, texts: Ids) -> Specialist | None:
    """What an expert takes; None for one that takes nothing.

    Args:
        layer, expert: which one.
        topk_ids: [tokens, top_k] of this layer.
        label: [tokens], codes into :data:`CLASSES`.
        texts: [tokens], array of strings.
    """
    taken = (topk_ids == expert).any(axis=1)
    choices = int(taken.sum())
    if not choices:
        return None
    of_expert = np.bincount(label[taken], minlength=len(CLASSES)) / choices
    of_all = np.bincount(label, minlength=len(CLASSES)) / len(label)
    best = int(np.argmax(of_expert - of_all))
    names, inverse = np.unique(texts, return_inverse=True)
    mine, everyone = np.bincount(inverse[taken], minlength=len(names)), np.bincount(inverse)
    excess = mine - everyone * choices / len(label)
    order = [int(i) for i in np.argsort(-excess, kind="stable")[:8] if excess[i] > 0]
    return Specialist(
        layer=layer,
        expert=expert,
        class_name=CLASSES[best],
        share=float(of_expert[best]),
        expected=float(of_all[best]),
        load=choices / topk_ids.size,
        top=[(str(names[i]), int(mine[i])) for i in order],
    )


def most_specialised(
    topk_ids: Ids, label: Ids, texts: Ids, num_experts: int, count: int
) -> list[Specialist]:
    """The ``count`` experts with the largest share beyond the expected, and a load of 1% or more.

    At most two of a layer and three of a class, so that what is shown is not all the same.
    topk_ids: [tokens, layers, top_k].
    """
    everyone = (
        specialist(layer, expert, ids, label, texts)
        for layer, ids in enumerate(topk_ids.swapaxes(0, 1))
        for expert in range(num_experts)
    )
    candidates = [found for found in everyone if found is not None and found.load >= 0.01]
    candidates.sort(key=lambda found: found.expected - found.share)
    chosen: list[Specialist] = []
    for found in candidates:
        same_layer = sum(other.layer == found.layer for other in chosen)
        same_class = sum(other.class_name == found.class_name for other in chosen)
        if same_layer < 2 and same_class < 3 and len(chosen) < count:
            chosen.append(found)
    return sorted(chosen, key=lambda found: (found.layer, found.expert))
