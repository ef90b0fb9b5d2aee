# SPDX-License-Identifier: Apache-2.0
"""How large a preset's full-precision model is, and whether it fits a GPU: with the arithmetic.

Nothing is downloaded: the shapes are those of the models' config.json files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expert_profiler.errors import UserError
from expert_profiler.run import models
from expert_profiler.run.machine import GpuMemory

GIB = 1 << 30
BYTES_PER_PARAMETER = 2  # bfloat16 and float16
#: Weights beyond this are not tried without a GPU.
MOST_ON_CPU = 8 * GIB


@dataclass(frozen=True)
class MoeShape:
    """What decides the number of parameters. Sizes in elements.

    kv_heads of head_size each for keys and for values; heads for queries and the output.
    qkv_bias: query, key and value have biases. qk_norm: their outputs are normalised, with a weight
    an element of the query and of the key. shared_expert: 0, or the width of a gated expert that
    takes every token. tied: input and output embedding are one.
    """

    vocabulary: int
    hidden: int
    layers: int
    experts: int
    expert_width: int
    heads: int
    kv_heads: int
    head_size: int
    qkv_bias: bool = False
    qk_norm: bool = False
    shared_expert: int = 0
    tied: bool = False

    @property
    def per_layer(self) -> dict[str, int]:
        """Parameters of one layer by part."""
        h, q, kv = self.hidden, self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "attention": 2 * h * q + 2 * h * kv + (q + 2 * kv) * self.qkv_bias,
            "experts": self.experts * 3 * h * self.expert_width,
            "shared expert": (3 * h * self.shared_expert + h) if self.shared_expert else 0,
            "router": self.experts * h,
            "norms": 2 * h + (q + kv) * self.qk_norm,
        }

    @property
    def parameters(self) -> int:
        """All of the model."""
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return embeddings + self.layers * sum(self.per_layer.values()) + self.hidden

    @property
    def weight_bytes(self) -> int:
        return BYTES_PER_PARAMETER * self.parameters


#: By model id, of the presets in full precision.
SHAPES = {
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": MoeShape(
        151_936, 2048, 24, 60, 1408, 16, 16, 128, qkv_bias=True, shared_expert=5632
    ),
    "allenai/OLMoE-1B-7B-0924": MoeShape(50_304, 2048, 16, 64, 1024, 16, 16, 128, qk_norm=True),
    "ibm-granite/granite-3.0-3b-a800m-instruct": MoeShape(
        49_155, 1536, 32, 40, 512, 24, 8, 64, tied=True
    ),
    "ibm-granite/granite-3.0-1b-a400m-instruct": MoeShape(
        49_155, 1024, 24, 32, 512, 16, 8, 64, tied=True
    ),
}


def needed_bytes(shape: MoeShape, ranks: int = 1) -> float:
    """Of each GPU: its share of the weights, 10% on top for activations and a small KV cache, and
    1 GiB for the CUDA context."""
    return shape.weight_bytes / ranks * 1.1 + GIB


def check(model: str, devices: Sequence[GpuMemory], ranks: int) -> None:
    """Refuse a full-precision preset where its weights can't fit; other models pass.

    Args:
        model: hub id.
        devices: the machine's GPUs; the first ``ranks`` share the weights.
        ranks: the tensor-parallel size.

    Raises:
        UserError: no GPU where one is needed, or too little memory, with the arithmetic.
    """
    shape = SHAPES.get(model)
    if shape is None or (not devices and ranks == 1 and shape.weight_bytes <= MOST_ON_CPU):
        return
    share, needed = shape.weight_bytes / ranks, needed_bytes(shape, ranks)
    remedy = "use --model gptq or granite-3b (fit 16 GB), or --tensor-parallel-size with more GPUs"
    if len(devices) < ranks:
        raise UserError(
            f"{model} in full precision needs {ranks} CUDA device(s) with {share / GIB:.1f} GiB "
            f"for weights each, found {len(devices)}; {remedy}"
        )
    smallest = min(devices[:ranks], key=lambda gpu: gpu.free)
    if smallest.free < needed:
        raise UserError(
            f"the full-precision weights take {share / GIB:.1f} GiB a GPU "
            f"({shape.parameters / 1e9:.1f} B parameters x {BYTES_PER_PARAMETER} bytes / {ranks}) "
            f"and {needed / GIB:.1f} GiB with working memory; "
            f"{smallest.name} has {smallest.free / GIB:.1f} GiB free, "
            f"{(needed - smallest.free) / GIB:.1f} GiB too little; {remedy}"
        )


def table(gib: float) -> str:
    """The arithmetic of every preset in full precision, and whether it fits ``gib`` GiB."""
    blocks = []
    for name, preset in models.PRESETS.items():
        shape = SHAPES.get(preset.model)
        if shape is None:
            continue
        parts = " + ".join(f"{part} {n:,}" for part, n in shape.per_layer.items() if n)
        embeddings = "one embedding" if shape.tied else "two embeddings"
        needed = needed_bytes(shape) / GIB
        room = gib - needed
        fits = f"fits {gib:g} GiB, {room:.1f} left" if room >= 0 else f"{-room:.1f} GiB too much"
        blocks.append(
            f"{name}: {preset.model}\n"
            f"  a layer     {parts} = {sum(shape.per_layer.values()):,}\n"
            f"  parameters  {shape.layers} layers + {embeddings} of {shape.vocabulary:,} x "
            f"{shape.hidden:,} + last norm {shape.hidden:,} = {shape.parameters:,}\n"
            f"  weights     x {BYTES_PER_PARAMETER} bytes = {shape.weight_bytes / 1e9:.2f} GB = "
            f"{shape.weight_bytes / GIB:.2f} GiB\n"
            f"  needed      x 1.1 + 1 GiB = {needed:.2f} GiB: {fits}"
        )
    return "\n".join(blocks)
