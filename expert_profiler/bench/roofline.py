# SPDX-License-Identifier: Apache-2.0
"""What recording should cost on a GPU, projected from shapes and bandwidths; nothing is measured.

python -m expert_profiler.bench.roofline        prints the table of docs/overhead.md
"""

from __future__ import annotations

from typing import NamedTuple

#: Bytes that a choice moves in device memory besides those of its id: the hook reads an int32 id
#: and a float32 weight and writes the weight; the snapshot reads and writes it; the copy to the
#: host reads it.
FIXED_BYTES = (4 + 4) + 4 + (4 + 4) + 4
#: Times that its id's bytes move: cleared, written, read and written by the snapshot, read.
ID_MOVES = 5
#: Kernels a layer: one copies ids, one weights.
KERNELS = 2
#: Seconds of a small kernel inside a CUDA graph: an assumption, the usual order of magnitude.
KERNEL_SECONDS = 1.5e-6


class Model(NamedTuple):
    """A model's routing, its weights and the memory that a step reads them from.

    Attributes:
        layers: MoE layers.
        weight_bytes: of all its weights, as served; a large batch reads all of them every step.
        bytes_per_second: of one device.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    weight_bytes: float
    bytes_per_second: float
    devices: int


MODELS = (
    Model("Qwen1.5-MoE-A2.7B, 1 x H100 SXM", 24, 60, 4, 14.3e9 * 2, 3.35e12, 1),
    Model("Qwen3-30B-A3B, 1 x H100 SXM", 48, 128, 8, 30.5e9 * 2, 3.35e12, 1),
    Model("DeepSeek-V3, 8 x H200", 58, 256, 8, 671e9 * 1, 4.8e12, 8),
)


class Projection(NamedTuple):
    """Of one decode step.

    Attributes:
        captured_bytes: what a step leaves in the buffer and sends to the host.
        moved_bytes: what it moves in device memory to get there.
        traffic_seconds: ``moved_bytes`` / bandwidth of one device; a tensor-parallel engine
            records on one.
        launch_seconds: the kernels of all layers, ``KERNEL_SECONDS`` each.
        step_seconds: least time of the step: all weights read once.
        share: (traffic + launches) / step.
    """

    captured_bytes: int
    moved_bytes: int
    traffic_seconds: float
    launch_seconds: float
    step_seconds: float
    share: float


def project(model: Model, batch: int) -> Projection:
    """A decode step of ``batch`` tokens."""
    choices = batch * model.layers * model.top_k
    id_bytes = 1 if model.experts <= 255 else 2  # as ``capture.ids_dtype``
    moved = choices * (FIXED_BYTES + ID_MOVES * id_bytes)
    traffic = moved / model.bytes_per_second
    launches = model.layers * KERNELS * KERNEL_SECONDS
    step = model.weight_bytes / (model.bytes_per_second * model.devices)
    return Projection(
        choices * (4 + id_bytes), moved, traffic, launches, step, (traffic + launches) / step
    )


def table(batch: int = 256) -> str:
    """Markdown."""
    lines = [
        f"| decode step of {batch} tokens | captured | moved | traffic | launches | step, at least "
        "| share |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        p = project(model, batch)
        lines.append(
            f"| {model.name} | {p.captured_bytes / 1e3:.0f} kB "
            f"| {p.moved_bytes / 1e6:.2f} MB | {p.traffic_seconds * 1e6:.2f} us "
            f"| {p.launch_seconds * 1e6:.0f} us | {p.step_seconds * 1e3:.1f} ms | {p.share:.2%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
