# SPDX-License-Identifier: Apache-2.0
"""What the patched vLLM files call. Each is a no-op while the recorder is off."""

from typing import Any, NamedTuple

import torch
import vllm.moe_routes.capture  # noqa: F401  registers the op
from torch import Tensor


class Tap(NamedTuple):
    """A layer's place in the capture buffer."""

    ids: Tensor
    weights: Tensor
    slot: int


def _write_moe_log_header(layer: Any) -> None:
    """Called at the end of ``FusedMoE.__init__``: give the layer its place for a tap.

    The log's header lists the layers that came through here; ``recorder.attach`` sets the taps of
    those that are recorded, once the model is loaded and before it is compiled.
    """
    layer.moe_route_tap = None


def _log_moe_routes(layer: Any, topk_ids: Tensor, topk_weights: Tensor, row0: int = 0) -> None:
    """Called after ``router.select_experts``: copy the choices into the capture buffer.

    Args:
        layer: the ``FusedMoE`` layer.
        topk_ids: [n, top_k], logical expert ids.
        topk_weights: [n, top_k].
        row0: row of the forward pass that the first row here belongs to.
    """
    tap = layer.moe_route_tap
    if tap is not None:
        torch.ops.vllm.moe_routes_capture(
            tap.ids, tap.weights, topk_ids, topk_weights, row0, tap.slot
        )
