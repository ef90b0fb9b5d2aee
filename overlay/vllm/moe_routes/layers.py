# SPDX-License-Identifier: Apache-2.0
"""Which MoE layers a model has, and which of them are recorded. Pure."""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vllm.moe_routes.errors import RouteLogError

_ITEM = re.compile(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?")


class MoELayer(NamedTuple):
    """One MoE layer.

    Attributes:
        layer: index of the transformer layer, read off its name; dense layers leave gaps.
        name: module name, unique in the model.
        top_k: experts chosen per token.
        num_experts: logical experts.
        source: "router" when ids and weights are those that the kernel used.
        renormalize: whether the chosen weights were scaled to sum to one.
        scoring_func: "softmax", "sigmoid", or "custom" where the model brings its own function.
    """

    layer: int
    name: str
    top_k: int
    num_experts: int
    source: str
    renormalize: bool
    scoring_func: str


def layer_index(name: str) -> int:
    """Transformer layer index of a module name: ``model.layers.3.mlp.experts`` -> 3.

    Raises:
        RouteLogError: the name holds no index, or more than one.
    """
    found = [part for part in name.split(".") if part.isdecimal()]
    if len(found) != 1:
        raise RouteLogError(
            f"MoE layer {name!r} has {len(found)} numbers in its name, so its layer index is not "
            "known; recording this model is not supported, unset VLLM_LOG_MOE"
        )
    return int(found[0])


def describe(named_modules: Iterable[tuple[str, Any]]) -> list[MoELayer]:
    """List the MoE layers, ordered by layer index.

    Args:
        named_modules: pairs of module name and ``FusedMoE`` module.

    Raises:
        RouteLogError: two layers share an index, which would merge their rows.
    """
    layers = [
        MoELayer(
            layer=layer_index(name),
            name=name,
            top_k=int(module.top_k),
            num_experts=int(module.logical_num_experts),
            source="router",
            renormalize=bool(module.renormalize),
            scoring_func="custom" if module.custom_routing_function else module.scoring_func,
        )
        for name, module in named_modules
    ]
    layers.sort(key=lambda item: item.layer)
    for a, b in itertools.pairwise(layers):
        if a.layer == b.layer:
            raise RouteLogError(
                f"MoE layers {a.name!r} and {b.name!r} share layer index {a.layer}; recording this "
                "model is not supported, unset VLLM_LOG_MOE"
            )
    return layers


def parse_selection(text: str, prefix: str = "VLLM_LOG_MOE_LAYERS=") -> set[int] | None:
    """``"0,3-5"`` -> {0, 3, 4, 5}; ``"all"`` -> None. ``prefix`` begins messages.

    Raises:
        RouteLogError: the text is neither.
    """
    if text.strip() == "all":
        return None
    chosen: set[int] = set()
    for item in text.split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise RouteLogError(
                f"{prefix}{text[:80]!r}: {item[:80]!r} is no layer; use all, 0 or 0,3-5"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first > 10_000:
            raise RouteLogError(f"{prefix}{text[:80]!r}: {item.strip()!r} is no range")
        chosen.update(range(first, last + 1))
    return chosen


def select(
    text: str, layers: Sequence[MoELayer], prefix: str = "VLLM_LOG_MOE_LAYERS="
) -> list[MoELayer]:
    """The layers to record.

    Args:
        text: the selection.
        layers: the MoE layers of the whole model, of every pipeline stage.
        prefix: stands before the text in messages; says where it comes from.

    Raises:
        RouteLogError: a chosen layer is no MoE layer of the model.
    """
    chosen = parse_selection(text, prefix)
    if chosen is None:
        return list(layers)
    unknown = sorted(chosen - {item.layer for item in layers})
    if unknown:
        known = ",".join(str(item.layer) for item in layers)
        raise RouteLogError(
            f"{prefix}{text[:80]!r}: layer {unknown[0]} is no MoE layer of this model; "
            f"its MoE layers are {known}"
        )
    return [item for item in layers if item.layer in chosen]
