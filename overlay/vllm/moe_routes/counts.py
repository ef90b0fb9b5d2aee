# SPDX-License-Identifier: Apache-2.0
"""How often every expert was chosen: the counts that all three modes add up to. Pure.

A forward pass is a ``prefill`` pass when all its tokens are prompt tokens, a ``decode`` pass when
all are generated ones, and ``mixed`` otherwise. Passes are counted by that, which the host knows
without looking at the routes, so that no mode has to copy anything per token to tell them apart.
They cover everything that was executed, recomputed and overrun rows included: that is the load.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.schema import FORWARD_MODES, PHASES

#: Choices by layer and expert: [L, width] int64.
Counts = npt.NDArray[np.int64]


class PassTokens(NamedTuple):
    """Tokens of one pass by phase, known to the host before it runs."""

    prefill: int
    decode: int

    @property
    def total(self) -> int:
        return self.prefill + self.decode

    @property
    def forward_mode(self) -> int:
        """Index into ``schema.FORWARD_MODES``."""
        if self.prefill and self.decode:
            return 2
        return 1 if self.decode else 0


#: Told of a pass that can't be counted, and why.
Lost = Callable[[PassTokens, Exception], None]


def pass_tokens(
    num_scheduled_tokens: npt.NDArray[Any],
    num_computed_tokens: npt.NDArray[Any],
    num_prompt_tokens: npt.NDArray[Any],
) -> PassTokens:
    """Count a pass's prompt tokens and generated tokens.

    Args:
        num_scheduled_tokens: [R] rows of every request.
        num_computed_tokens: [R] position of every request's first row.
        num_prompt_tokens: [R].
    """
    total = int(num_scheduled_tokens.sum())
    left = num_prompt_tokens - num_computed_tokens
    if left.max(initial=0) <= 0:  # nearly every pass: fewer calls on the engine's thread
        return PassTokens(0, total)
    prefill = int(np.minimum(num_scheduled_tokens, np.maximum(left, 0)).sum())
    return PassTokens(prefill, total - prefill)


class Shape(NamedTuple):
    """What counts are counted over.

    Attributes:
        layers: the recorded layers, in slot order.
        width: columns of a count: every expert id of any layer, and a last one for lost choices.
        top_k: [L] experts that every layer chooses per token.
        experts: [L] experts of every layer.
    """

    layers: Sequence[MoELayer]
    width: int
    top_k: npt.NDArray[Any]
    experts: npt.NDArray[Any]

    @classmethod
    def of(cls, layers: Sequence[MoELayer]) -> "Shape":
        top_k = np.array([item.top_k for item in layers], dtype=np.int64)
        experts = np.array([item.num_experts for item in layers], dtype=np.int64)
        return cls(layers, int(experts.max()) + 1, top_k, experts)

    @property
    def num_experts(self) -> int:
        return self.width - 1

    @property
    def has(self) -> npt.NDArray[np.bool_]:
        """[L, width - 1]: whether a layer has that expert."""
        has: npt.NDArray[np.bool_] = np.arange(self.num_experts) < self.experts[:, None]
        return has

    def zeros(self) -> Counts:
        """No counts yet, by mode of the pass: [3, L, width] int64."""
        return np.zeros((len(FORWARD_MODES), len(self.layers), self.width), dtype=np.int64)


def count_choices(topk_ids: npt.NDArray[Any], shape: Shape) -> Counts:
    """Count choices on the host.

    Args:
        topk_ids: [n, L, K] of any integer dtype; ``not_an_id`` (255 as uint8, -1 as int16) where
            nothing was captured.
        shape: what to count over.

    Returns:
        [L, width] int64; the last column holds what is no expert id, padding included.
    """
    num_layers = len(shape.layers)
    ids = topk_ids.astype(np.int64)
    unsigned = ids.view(np.uint64)  # below zero is no small number then
    np.minimum(unsigned, np.uint64(shape.num_experts), out=unsigned)
    ids += np.arange(num_layers)[None, :, None] * shape.width
    counted = np.bincount(ids.ravel(), minlength=num_layers * shape.width)
    return counted.reshape(num_layers, shape.width).astype(np.int64)


class PassCounts:
    """Forward passes and tokens of one recording.

    Attributes:
        passes: [3] forward passes by mode.
        tokens: [2] tokens by phase.
    """

    def __init__(self) -> None:
        self.passes = [0, 0, 0]
        self.tokens = [0, 0]

    def add_pass(self, tokens: PassTokens, times: int = 1) -> None:
        """Account for a pass; -1 times takes one back."""
        self.passes[tokens.forward_mode] += times
        self.tokens[0] += times * tokens.prefill
        self.tokens[1] += times * tokens.decode

    def facts(self) -> dict[str, Any]:
        """Passes and tokens, for a status."""
        return {
            "passes_by_mode": dict(zip(FORWARD_MODES, self.passes, strict=True)),
            "tokens": dict(zip(PHASES, self.tokens, strict=True)),
        }


class RunningCounts(PassCounts):
    """Counts of the passes of one recording so far.

    Attributes:
        counts: [3, L, width] int64 choices by mode of the pass, layer and expert; see ``Shape``.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.counts = shape.zeros()

    def add(self, tokens: PassTokens, counts: npt.NDArray[Any]) -> None:
        """Account for a pass and its [L, width] counts."""
        self.add_pass(tokens)
        self.counts[tokens.forward_mode] += counts


def lost_choices(counts: npt.NDArray[Any], tokens: int, shape: Shape) -> npt.NDArray[np.int64]:
    """Choices of every layer that are no expert of that layer: [L] int64.

    Args:
        counts: [L, width], of passes with ``tokens`` tokens in all.
        tokens: executed tokens.
        shape: what was counted over.
    """
    # Columns of a row that a layer with a smaller top_k leaves empty are counted there too.
    padding = shape.top_k.max() - shape.top_k
    lost: npt.NDArray[np.int64] = counts[:, -1].astype(np.int64) - tokens * padding
    lost += np.where(shape.has, 0, counts[:, :-1]).sum(axis=1)
    return lost


def lost_rows(counts: npt.NDArray[Any], tokens: int, shape: Shape) -> int:
    """Rows that the lost choices amount to: a layer that does not fire loses whole rows.

    = sum over layers of ceil(lost choices / top_k). Arguments as of :func:`lost_choices`.
    """
    return int((-(-lost_choices(counts, tokens, shape) // shape.top_k)).sum())


def activation(counts: npt.NDArray[Any], shape: Shape) -> dict[str, float]:
    """How many experts a count touches.

    ``total_activated_experts`` = sum over layers of the experts with a count above 0;
    ``avg_activated_per_layer`` = that / layers; ``expert_utilization`` = that / sum over layers of
    the layer's experts, 0 to 1.

    Args:
        counts: [L, width].
        shape: what was counted over.
    """
    touched = int(np.count_nonzero(counts[:, :-1]))
    experts = int(shape.experts.sum())
    return {
        "total_activated_experts": float(touched),
        "avg_activated_per_layer": round(touched / len(shape.layers), 3),
        "expert_utilization": round(touched / experts, 4),
    }


def max_over_mean(counts: npt.NDArray[Any], shape: Shape) -> float | None:
    """Mean over layers of max(c) / mean(c) of the layer's experts: 1 is even; None without counts.

    Args:
        counts: [L, width].
        shape: what was counted over.
    """
    ratios = layer_balance(counts, shape)
    return round(float(np.mean(ratios)), 4) if ratios.size else None


def layer_balance(counts: npt.NDArray[Any], shape: Shape) -> npt.NDArray[np.float64]:
    """max(c) / mean(c) of every layer, 1 to experts: [L] float64; empty without counts."""
    own = np.where(shape.has, counts[:, :-1], 0)
    total = own.sum(axis=1)
    if not total.all():
        return np.zeros(0)
    ratios: npt.NDArray[np.float64] = own.max(axis=1) * shape.experts.astype(np.float64) / total
    return ratios
