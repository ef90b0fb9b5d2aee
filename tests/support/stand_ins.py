# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for what the recorder is attached to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.moe_routes.hooks import _write_moe_log_header


def a_moe(**changes: Any) -> SimpleNamespace:
    """What the recorder reads of a ``FusedMoE``."""
    layer = SimpleNamespace(
        layer_name="model.layers.0.mlp.experts",
        top_k=2,
        logical_num_experts=8,
        renormalize=False,
        scoring_func="softmax",
        custom_routing_function=None,
        is_sequence_parallel=False,
        quant_method=SimpleNamespace(is_monolithic=False),
        router=SimpleNamespace(enable_eplb=False),
    )
    vars(layer).update(changes)
    _write_moe_log_header(layer)
    return layer


def a_config(layers: dict[str, SimpleNamespace]) -> SimpleNamespace:
    """What the recorder reads of a ``VllmConfig``."""
    return SimpleNamespace(
        compilation_config=SimpleNamespace(
            static_forward_context=layers,
            static_all_moe_layers=list(layers),
            cudagraph_mode=None,
            mode=None,
        ),
        model_config=SimpleNamespace(
            model="/models/tiny",
            served_model_name=["tiny"],
            seed=1,
            dtype=torch.float32,
            quantization=None,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            data_parallel_rank=0,
            prefill_context_parallel_size=1,
            enable_expert_parallel=False,
            enable_dbo=False,
            use_ubatching=False,
            enable_eplb=False,
        ),
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=32, enable_chunked_prefill=True, async_scheduling=False
        ),
        cache_config=SimpleNamespace(enable_prefix_caching=False),
        speculative_config=None,
        lora_config=None,
    )
