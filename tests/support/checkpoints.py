"""Tiny random checkpoints, one per router that vLLM implements, built with transformers' classes.

Each is a few layers of a real architecture, with the traits that routing depends on switched on:
groups, correction biases, dense layers in between, a scaling factor that is not one. Weights are
random with a fixed seed and exact in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expert_profiler.run.tiny_model import (
    EOS_ID,
    PAD_ID,
    VOCAB_SIZE,
    bfloat16_exact,
    write_tokenizer,
)

HIDDEN = 128
HEADS = 4
EXPERTS = 16
TOP_K = 4
#: Spread of router logits over tokens: wide enough that ties at the edge of the top k are rare.
ROUTER_GAIN = 2.0


@dataclass(frozen=True)
class Architecture:
    """A checkpoint, and what a log of it has to say.

    Attributes:
        model: prefix of transformers' ``…Config`` and ``…ForCausalLM``.
        config: keyword arguments of the config, on top of :data:`COMMON`.
        moe_layers: indices of the layers with experts.
        module: name of a layer's experts module in vLLM, with ``{}`` for the index.
        renormalize: what the header says of every layer.
        scoring_func: likewise.
        top_k: likewise.
        num_experts: likewise.
        scale: factor in Hugging Face's weights that vLLM applies after the experts.
        env: environment that vLLM needs to run it on CPU.
        engine: arguments of ``vllm.LLM`` that it needs on CPU.
        bfloat16: parameters that vLLM's CPU kernels take in this type only.
        ignored: parameters of the router that vLLM's CPU backend leaves out of the choice.
        biased: whether a correction bias is random rather than zero.
    """

    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    moe_layers: tuple[int, ...] = (0, 1, 2)
    module: str = "model.layers.{}.mlp.experts"
    renormalize: bool = True
    scoring_func: str = "softmax"
    top_k: int = TOP_K
    num_experts: int = EXPERTS
    scale: float = 1.0
    env: Mapping[str, str] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    bfloat16: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    biased: bool = True


COMMON: dict[str, Any] = {
    "bos_token_id": EOS_ID,
    "eos_token_id": EOS_ID,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "max_position_embeddings": 2048,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 3,
    "num_key_value_heads": HEADS // 2,
    "pad_token_id": PAD_ID,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB_SIZE,
}
_QWEN: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
}
_DEEPSEEK: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "moe_intermediate_size": 64,
    "n_group": 4,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": TOP_K,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "routed_scaling_factor": 2.5,
    "topk_group": 2,
    "v_head_dim": 32,
}
_ERNIE: dict[str, Any] = {
    "head_dim": 32,
    "moe_intermediate_size": 64,
    "moe_k": TOP_K,
    "moe_layer_start_index": 1,
    "moe_num_experts": EXPERTS,
    "moe_num_shared_experts": 1,
}
#: vLLM's CPU backend has no MLA; with plain attention it can run the same model. That attention
#: hands [n, heads, size] to the rotary kernel, which on CPU reads it as [n, size] and turns the
#: wrong rows, so vLLM's PyTorch version of it takes its place.
_NO_MLA: dict[str, Any] = {
    "env": {"VLLM_MLA_DISABLE": "1"},
    "engine": {"compilation_config": {"custom_ops": ["-rotary_embedding"]}},
}

ARCHITECTURES: dict[str, Architecture] = {
    "qwen2-moe": Architecture(
        "Qwen2Moe",
        {
            **_QWEN,
            "norm_topk_prob": False,
            "num_hidden_layers": 4,
            "mlp_only_layers": [2],  # a dense layer between two with experts
            "shared_expert_intermediate_size": 64,
        },
        moe_layers=(0, 1, 3),
        renormalize=False,
    ),
    "qwen3-moe": Architecture("Qwen3Moe", {**_QWEN, "head_dim": 32, "norm_topk_prob": True}),
    "mixtral": Architecture(
        "Mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        module="model.layers.{}.block_sparse_moe.experts",
        num_experts=8,
        top_k=2,
    ),
    "olmoe": Architecture(
        "Olmoe",
        {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "norm_topk_prob": False},
        renormalize=False,
    ),
    "deepseek-v2": Architecture(
        "DeepseekV2",
        {**_DEEPSEEK, "norm_topk_prob": False, "topk_method": "group_limited_greedy"},
        moe_layers=(1, 2),
        renormalize=False,
        scale=2.5,
        **_NO_MLA,
    ),
    "deepseek-v3": Architecture(
        "DeepseekV3",
        {
            **_DEEPSEEK,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 0,
            "scoring_func": "sigmoid",  # these two keys only vLLM reads
            "topk_method": "noaux_tc",
        },
        moe_layers=(1, 2),
        scoring_func="sigmoid",
        scale=2.5,
        **_NO_MLA,
    ),
    "glm4-moe": Architecture(
        "Glm4Moe",
        {
            "first_k_dense_replace": 1,
            "head_dim": 32,
            "moe_intermediate_size": 64,
            "n_group": 2,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_experts_per_tok": TOP_K,
            "num_nextn_predict_layers": 0,
            "routed_scaling_factor": 1.5,
            "topk_group": 1,
            "use_qk_norm": True,
        },
        moe_layers=(1, 2),
        scoring_func="sigmoid",
        scale=1.5,
    ),
    "ernie4.5-moe": Architecture("Ernie4_5_Moe", _ERNIE, moe_layers=(1, 2), biased=False),
    "ernie4.5-moe-biased": Architecture(
        "Ernie4_5_Moe", _ERNIE, moe_layers=(1, 2), ignored=("e_score_correction_bias",)
    ),
    "gpt-oss": Architecture(
        "GptOss",
        {
            "head_dim": 32,
            "max_position_embeddings": 131072,  # what its default rope scaling is made for
            "num_experts_per_tok": TOP_K,
            "num_local_experts": EXPERTS,
            "sliding_window": 32,
        },
        bfloat16=("sinks",),
    ),
    "granite-moe": Architecture(
        "GraniteMoe",
        {"num_experts_per_tok": TOP_K, "num_local_experts": EXPERTS},
        module="model.layers.{}.block_sparse_moe.experts",
    ),
    "phi-moe": Architecture(  # a custom routing function
        "Phimoe",
        {
            "attention_bias": True,
            "lm_head_bias": True,
            "num_experts_per_tok": 2,
            "num_local_experts": EXPERTS,
        },
        module="model.layers.{}.block_sparse_moe.experts",
        renormalize=False,
        top_k=2,
        scoring_func="custom",
        # transformers spells it Phimoe
        engine={"hf_overrides": {"architectures": ["PhiMoEForCausalLM"]}},
    ),
}


def build(folder: Path, architecture: Architecture, seed: int = 0) -> None:
    """Write the checkpoint of ``architecture`` to the new folder ``folder``."""
    import torch
    import transformers

    config = getattr(transformers, f"{architecture.model}Config")(
        **{**COMMON, "dtype": torch.float32, **architecture.config}
    )
    model = getattr(transformers, f"{architecture.model}ForCausalLM")(config)
    fill(model, seed, architecture.biased)
    model.generation_config.eos_token_id = EOS_ID
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)


def fill(model: Any, seed: int, biased: bool) -> None:
    """Give every tensor of ``model`` seeded random values that keep activations near one."""
    import numpy as np
    import torch

    rng = np.random.default_rng(seed)
    for name, tensor in sorted(model.state_dict().items()):
        values = rng.standard_normal(tuple(tensor.shape), dtype=np.float32)
        values = bfloat16_exact(values * np.float32(spread(name, tuple(tensor.shape))))
        if _is_norm(name):
            values = np.ones_like(values) if name.endswith("weight") else np.zeros_like(values)
        elif "e_score_correction_bias" in name:
            # Positive: where all else is masked out Hugging Face masks with 0, vLLM with -inf.
            values = np.abs(values) if biased else np.zeros_like(values)
        tensor.copy_(torch.from_numpy(values))


def spread(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a tensor's values: ``shape`` is [..., out, in], or [..., n]."""
    if "e_score_correction_bias" in name:
        return 0.2
    if name.endswith("bias") or "sinks" in name or len(shape) == 1:
        return 0.2
    if "embed_tokens" in name:
        return 1.0
    # GPT-OSS stores its experts as [experts, in, out].
    fan_in = (
        shape[-2] if "gate_up_proj" in name or name.endswith("experts.down_proj") else shape[-1]
    )
    router = name.endswith((".gate.weight", ".router.weight", ".router.layer.weight"))
    return (ROUTER_GAIN if router else 1.0) / math.sqrt(fan_in)


def _is_norm(name: str) -> bool:
    return "norm" in name.rpartition(".")[0].rpartition(".")[2]
