"""The names that vLLM 0.15.1 gives to layers with experts, and what is read off them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.layers import describe

#: By model file: a name with {} for the index, and the first indices that have experts.
NAMES = {
    "afmoe": ("model.layers.{}.mlp.experts", (2, 3)),
    "bailing_moe": ("model.layers.{}.mlp.experts", (1, 2)),
    "dbrx": ("transformer.blocks.{}.ffn.experts", (0, 1)),
    "deepseek_v2": ("model.layers.{}.mlp.experts", (1, 2)),
    "deepseek_v3": ("model.layers.{}.mlp.experts", (3, 4, 60)),
    "deepseek_vl2": ("language.model.layers.{}.mlp.experts", (1, 2)),
    "ernie45_moe": ("model.layers.{}.mlp.experts", (1, 2)),
    "glm4_moe": ("model.layers.{}.mlp.experts", (1, 2, 45)),
    "gpt_oss": ("model.layers.{}.mlp.experts", (0, 1)),
    "granitemoe": ("model.layers.{}.block_sparse_moe.experts", (0, 1)),
    "grok1": ("model.layers.{}.moe_block.experts", (0, 1)),
    "jamba": ("model.layers.{}.feed_forward.experts", (1, 3, 5)),
    "kimi_linear": ("model.layers.{}.block_sparse_moe.experts", (1, 2)),
    "lfm2_moe": ("model.layers.{}.feed_forward.experts", (2, 3)),
    "llama4": ("language_model.model.layers.{}.feed_forward.experts", (1, 3)),
    "minimax_m2": ("model.layers.{}.mlp.experts", (0, 1)),
    "mixtral": ("model.layers.{}.block_sparse_moe.experts", (0, 1)),
    "nemotron_h": ("model.layers.{}.mixer.experts", (1, 3, 6)),
    "olmoe": ("model.layers.{}.mlp.experts", (0, 1)),
    "phimoe": ("model.layers.{}.block_sparse_moe.experts", (0, 1)),
    "qwen2_moe": ("model.layers.{}.mlp.experts", (0, 1, 23)),
    "qwen3_moe": ("model.layers.{}.mlp.experts", (0, 1, 93)),
    "qwen3_next": ("model.layers.{}.mlp.experts", (0, 1)),
    "qwen3_vl_moe": ("language_model.model.layers.{}.mlp.experts", (0, 1)),
    "step3_text": ("model.layers.{}.moe.experts", (4, 5)),
}


def _module() -> SimpleNamespace:
    # The sum of what describe() has read off a layer at any time; it may read fewer.
    return SimpleNamespace(
        top_k=2,
        logical_num_experts=8,
        renormalize=True,
        scoring_func="softmax",
        custom_routing_function=None,
        routed_scaling_factor=1.0,
        e_score_correction_bias=None,
    )


@pytest.mark.parametrize("model", NAMES)
def test_a_models_own_names_give_its_layer_indices(model: str) -> None:
    name, indices = NAMES[model]
    # In an order that is not theirs: vLLM lists them as they are made, rank by rank.
    found = describe([(name.format(i), _module()) for i in reversed(indices)])
    assert [(item.layer, item.name) for item in found] == [(i, name.format(i)) for i in indices]


def test_a_layer_with_two_sets_of_experts_is_refused() -> None:
    """ernie45_vl: each sees a masked subset of the tokens."""
    names = [f"language_model.model.layers.1.mlp.{kind}_experts" for kind in ("text", "vision")]
    with pytest.raises(RouteLogError, match="share layer index 1"):
        describe([(name, _module()) for name in names])
