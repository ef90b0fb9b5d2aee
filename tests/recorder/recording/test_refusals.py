# SPDX-License-Identifier: Apache-2.0
"""What is refused at start, in which words, and that nothing else is."""

from __future__ import annotations

import ast
import inspect
from typing import Any, NamedTuple

import pytest
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.fused_moe.zero_expert_fused_moe import ZeroExpertFusedMoE
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.recording import refusals

from tests.support.stand_ins import a_config, a_moe


class SomeFusedKernelMethod:
    is_monolithic = True


def _unquantized(is_monolithic: bool) -> UnquantizedFusedMoEMethod:
    """vLLM's own class, not set up: making one asks the platform for kernels."""
    method = UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod)
    vars(method)["_is_monolithic"] = is_monolithic
    return method


def _zero_expert_layer() -> ZeroExpertFusedMoE:
    """vLLM's own class, not set up: making one needs a model around it."""
    return ZeroExpertFusedMoE.__new__(ZeroExpertFusedMoE)


class Case(NamedTuple):
    """A change to a plain engine, by part of its config ("" is the config, "moe" one layer)."""

    changes: dict[str, dict[str, Any]] | None = None
    device: str = "cuda"
    environ: dict[str, str] | None = None


def _check(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {name: a_moe() for name in ("a", "b")}
    config = a_config(modules)
    for part, facts in (case.changes or {}).items():
        target = modules["b"] if part == "moe" else getattr(config, part) if part else config
        vars(target).update(facts)
    for name, value in (case.environ or {}).items():
        monkeypatch.setenv(name, value)
    refusals.check_supported(config, case.device, modules.values())


def _parallel(**facts: Any) -> dict[str, dict[str, Any]]:
    return {"parallel_config": facts}


DP_COMPILED = {
    **_parallel(data_parallel_size=2),
    "compilation_config": {"mode": CompilationMode.DYNAMO_TRACE_ONCE},
}
FUSED = {"moe": {"quant_method": SomeFusedKernelMethod()}}

#: Every refusal: (what is asked for, the fact told, the remedy told).
REFUSED: dict[str, tuple[Case, str, str]] = {
    "device": (Case(device="xpu"), "device 'xpu'", "use one of cpu, cuda"),
    "v2-runner": (
        Case(environ={"VLLM_USE_V2_MODEL_RUNNER": "1"}),
        "VLLM_USE_V2_MODEL_RUNNER=1",
        "unset it",
    ),
    "pcp": (
        Case(_parallel(prefill_context_parallel_size=2)),
        "prefill context parallelism",
        "set it to 1",
    ),
    "dp-compiled-on-cpu": (
        Case(DP_COMPILED, "cpu"),
        "data parallelism in compiled mode on CPU",
        "add --enforce-eager",
    ),
    "dbo": (
        Case(_parallel(enable_dbo=True)),
        "dual batch overlap (micro-batches)",
        "drop --enable-dbo",
    ),
    "ubatching": (
        Case(_parallel(use_ubatching=True)),
        "dual batch overlap (micro-batches)",
        "drop --enable-dbo",
    ),
    "speculative": (
        Case({"": {"speculative_config": object()}}),
        "speculative decoding, whose rejected rows are not marked yet",
        "drop --speculative-config",
    ),
    "lora": (Case({"": {"lora_config": object()}}), "LoRA", "drop --enable-lora"),
    "fused-kernel-on-cuda": (
        Case(FUSED),
        "SomeFusedKernelMethod, whose kernel hides its routing",
        "choose another quantization or MoE backend",
    ),
    "fused-kernel-on-cpu": (
        Case(FUSED, "cpu"),
        "SomeFusedKernelMethod, whose kernel hides its routing",
        "choose another quantization or MoE backend",
    ),
    "unquantized-fused-elsewhere": (
        Case({"moe": {"quant_method": _unquantized(True)}}),
        "UnquantizedFusedMoEMethod, whose kernel hides its routing",
        "choose another quantization or MoE backend",
    ),
    "masked-tokens": (
        Case({"moe": {"layer_name": "model.layers.1.mlp.vision_experts"}}),
        "model.layers.1.mlp.vision_experts, which sees only some of a pass's tokens",
        "use the text-only model",
    ),
    "sequence-parallel": (
        Case({"moe": {"is_sequence_parallel": True}}),
        "sequence-parallel MoE layers",
        "set --tensor-parallel-size 1",
    ),
}

GRAPHS = {
    "compilation_config": {
        "mode": CompilationMode.VLLM_COMPILE,
        "cudagraph_mode": CUDAGraphMode.FULL,
    }
}

ACCEPTED: dict[str, Case] = {
    "plain-cuda": Case(),
    "plain-cpu": Case(device="cpu"),
    "compiled-cpu": Case(
        {"compilation_config": {"mode": CompilationMode.DYNAMO_TRACE_ONCE}}, "cpu"
    ),
    "cuda-graphs": Case(GRAPHS),
    "tensor-parallel": Case(_parallel(tensor_parallel_size=2, enable_expert_parallel=True)),
    "pipeline-parallel": Case(_parallel(pipeline_parallel_size=2)),
    "data-parallel-cuda": Case({**GRAPHS, **_parallel(data_parallel_size=2)}),
    "data-parallel-cpu": Case(_parallel(data_parallel_size=2), "cpu"),
    "eplb": Case(_parallel(enable_eplb=True, enable_expert_parallel=True)),
    "prefix-caching": Case({"cache_config": {"enable_prefix_caching": True}}),
    "async-scheduling": Case({"scheduler_config": {"async_scheduling": True}}),
    "quantized": Case({"model_config": {"quantization": "gptq_marlin"}}),
    "unquantized-cpu": Case({"moe": {"quant_method": _unquantized(True)}}, "cpu"),
    "unquantized-cuda": Case({"moe": {"quant_method": _unquantized(False)}}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_one_line_of_fact_and_remedy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, fact, remedy = REFUSED[name]
    with pytest.raises(RouteLogError) as refused:
        _check(case, monkeypatch)
    said = f"route recording is not supported with {fact}; {remedy} or unset VLLM_LOG_MOE"
    assert str(refused.value) == said


@pytest.mark.parametrize("name", ACCEPTED)
def test_everything_else_is_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _check(ACCEPTED[name], monkeypatch)


def test_zero_computation_experts_are_refused() -> None:
    """Their ids lie past the experts', so that "in range" has no meaning."""
    layer = _zero_expert_layer()
    vars(layer).update(vars(a_moe()))
    with pytest.raises(RouteLogError, match=r"zero-computation experts.*use another model"):
        refusals.check_supported(a_config({}), "cuda", [layer])


def test_no_refusal_is_without_a_test() -> None:
    tree = ast.parse(inspect.getsource(refusals._refusals))
    written = sum(isinstance(node, ast.Yield) for node in ast.walk(tree))
    remedies = {remedy for _, _, remedy in REFUSED.values()}
    assert written == len(remedies | {"use another model"})


def test_the_first_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Case({**_parallel(prefill_context_parallel_size=2), "": {"lora_config": object()}})
    with pytest.raises(RouteLogError, match="prefill context parallelism"):
        _check(both, monkeypatch)


def test_one_layer_among_many_is_enough() -> None:
    modules = [a_moe(), a_moe(quant_method=SomeFusedKernelMethod()), a_moe()]
    with pytest.raises(RouteLogError, match="SomeFusedKernelMethod"):
        refusals.check_supported(a_config({}), "cuda", modules)


def test_a_real_unquantized_layer_on_cpu_is_recorded_inside_its_kernel() -> None:
    """It is monolithic there: accepted because ``cpu_fused_moe`` carries the hook."""
    from vllm.model_executor.layers.fused_moe import cpu_fused_moe

    source = inspect.getsource(cpu_fused_moe.CPUFusedMOE) + inspect.getsource(
        cpu_fused_moe.SGLFusedMOE
    )
    assert source.count("_log_moe_routes(layer, topk_ids, topk_weights)") == 2
    stub = a_moe(quant_method=_unquantized(True))
    refusals.check_supported(a_config({}), "cpu", [stub])
