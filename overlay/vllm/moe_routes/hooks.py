# SPDX-License-Identifier: Apache-2.0
"""What the patched vLLM files call. Each is a no-op while the recorder is off."""

from typing import Any

import torch
from torch import Tensor
from vllm.moe_routes.capture.row_layout import locate
from vllm.moe_routes.capture.taps import Tap  # by way of capture.buffer it registers the op


def _write_moe_log_header(layer: Any) -> None:
    """Called at the end of ``FusedMoE.__init__``: give the layer its place for a tap.

    The log's header lists the layers that came through here; ``recorder.attach`` sets the taps of
    those that are recorded, once the model is loaded and before it is compiled.
    """
    layer.moe_route_tap = None


def _note_logical_ids(router: Any, topk_ids: Tensor) -> None:
    """Called in ``BaseRouter.select_experts``, before EPLB maps the ids to physical experts.

    Args:
        router: the layer's; ``recorder.attach`` gives it ``moe_logical_ids`` where that is needed.
        topk_ids: [n, >= top_k], logical expert ids.
    """
    if router.enable_eplb:
        note = getattr(router, "moe_logical_ids", None)
        if note is not None:
            note.put(topk_ids)


def _log_moe_routes(layer: Any, topk_ids: Tensor, topk_weights: Tensor, row0: int = 0) -> None:
    """Called after ``router.select_experts``: keep the choices, or copy them into the buffer.

    Args:
        layer: the ``FusedMoE`` layer.
        topk_ids: [n, >= top_k], expert ids; physical ones under EPLB.
        topk_weights: [n, >= top_k].
        row0: row of the forward pass that the first row here belongs to.
    """
    tap: Tap | None = layer.moe_route_tap
    if tap is None:
        return
    if tap.logical_ids is not None:
        topk_ids = tap.logical_ids.take()
    if tap.dp_rank is not None:
        n = topk_ids.shape[0]
        first, size, row0 = locate(n, row0, tap.dp_rank, _tokens_across_dp())
        topk_ids = topk_ids[first : first + size]
        topk_weights = topk_weights[first : first + size]
        if tap.references is not None:  # else the other ranks' rows stay in memory too, uncharged
            topk_ids, topk_weights = topk_ids.clone(), topk_weights.clone()
    if tap.references is not None:
        tap.references[tap.slot, row0] = (topk_ids, topk_weights)
        return
    torch.ops.vllm.moe_routes_capture(tap.ids, tap.weights, topk_ids, topk_weights, row0, tap.slot)


def _tokens_across_dp() -> list[int]:
    """[dp] tokens of every data-parallel rank: the same in every replay of a CUDA graph."""
    # It imports this module, by way of the layers.
    from vllm.forward_context import get_forward_context

    tokens: list[int] = get_forward_context().dp_metadata.num_tokens_across_dp_cpu.tolist()
    return tokens
