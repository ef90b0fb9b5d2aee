# SPDX-License-Identifier: Apache-2.0
"""What is refused, with the reason and the remedy: nothing doubtful is ever logged."""

from collections.abc import Iterable, Iterator
from typing import Any

import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.fused_moe.zero_expert_fused_moe import ZeroExpertFusedMoE
from vllm.moe_routes.capture.snapshot import SNAPSHOTTERS
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.recording.provenance import execution

#: Modules of Ernie 4.5 VL: text and vision tokens take turns, each under a mask.
MASKED = (".text_experts", ".vision_experts")


def check_supported(config: VllmConfig, device_type: str, modules: Iterable[Any]) -> None:
    """Refuse what would be recorded wrongly.

    Args:
        config: the engine's.
        device_type: "cpu", "cuda", …
        modules: the ``FusedMoE`` layers of this rank.

    Raises:
        RouteLogError: the first reason found.
    """
    for fact, remedy in _refusals(config, device_type, list(modules)):
        raise RouteLogError(f"route recording is not supported with {fact}; {remedy}")


def _refusals(
    config: VllmConfig, device_type: str, modules: list[Any]
) -> Iterator[tuple[str, str]]:
    parallel = config.parallel_config
    unset = "or unset VLLM_LOG_MOE"
    if device_type not in SNAPSHOTTERS:
        yield f"device {device_type!r}", f"use one of {', '.join(SNAPSHOTTERS)} {unset}"
    if envs.VLLM_USE_V2_MODEL_RUNNER:
        yield "VLLM_USE_V2_MODEL_RUNNER=1", f"unset it {unset}"
    if parallel.prefill_context_parallel_size > 1:
        yield "prefill context parallelism", f"set it to 1 {unset}"
    if parallel.data_parallel_size > 1 and device_type == "cpu" and execution(config) != "eager":
        # Traced once without guards: the other ranks' row counts of that one pass would stay.
        yield "data parallelism in compiled mode on CPU", f"add --enforce-eager {unset}"
    if parallel.enable_dbo or parallel.use_ubatching:
        yield "dual batch overlap (micro-batches)", f"drop --enable-dbo {unset}"
    if config.speculative_config is not None:
        fact = "speculative decoding, whose rejected rows are not marked yet"
        yield fact, f"drop --speculative-config {unset}"
    if config.lora_config is not None:
        yield "LoRA", f"drop --enable-lora {unset}"
    for module in modules:
        method = module.quant_method
        # CPUFusedMOE is hooked inside; every other monolithic kernel hides its top-k.
        hooked_inside = device_type == "cpu" and isinstance(method, UnquantizedFusedMoEMethod)
        if method.is_monolithic and not hooked_inside:
            fact = f"{type(method).__name__}, whose kernel hides its routing"
            yield fact, f"choose another quantization or MoE backend {unset}"
        if isinstance(module, ZeroExpertFusedMoE):
            fact = "zero-computation experts, whose ids lie past those of the experts"
            yield fact, f"use another model {unset}"
        if module.layer_name.endswith(MASKED):
            fact = f"{module.layer_name}, which sees only some of a pass's tokens"
            yield fact, f"use the text-only model {unset}"
        if module.is_sequence_parallel:
            yield "sequence-parallel MoE layers", f"set --tensor-parallel-size 1 {unset}"
