# SPDX-License-Identifier: Apache-2.0
"""What the patched vLLM files call. Each is a no-op while the recorder is off."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.moe_routes.capture.references import Kept  # capture, which it imports, registers the op
from vllm.moe_routes.capture.row_layout import Batch, Layout, locate, ubatch_row0
from vllm.moe_routes.errors import RouteLogError


class LogicalIds:
    """Hands a pass's logical ids from a router to the hook behind it, where EPLB replaces them."""

    def __init__(self) -> None:
        self._ids: Tensor | None = None

    def put(self, ids: Tensor) -> None:
        self._ids = ids

    def take(self) -> Tensor:
        """The ids put last. Given once: nothing keeps a graph's memory, no pass gets old ids."""
        ids, self._ids = self._ids, None
        if ids is None:
            raise RouteLogError(
                "a router of this model chose experts without noting their logical ids; recording "
                "it is not supported with EPLB, drop --enable-eplb or unset VLLM_LOG_MOE"
            )
        return ids


class Tap(NamedTuple):
    """Where a layer's choices go.

    Attributes:
        ids: the buffer's.
        weights: the buffer's.
        slot: the layer's place on the buffer's second axis.
        layout: where its rows belong; None where they are the pass's rows as they are.
        logical_ids: where its router leaves them; None where it returns them.
        kept: where the choices wait until the pass ends; None where they are written to the buffer.
    """

    ids: Tensor
    weights: Tensor
    slot: int
    layout: Layout | None = None
    logical_ids: LogicalIds | None = None
    kept: Kept | None = None


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
    tap = layer.moe_route_tap
    if tap is None:
        return
    if tap.logical_ids is not None:
        topk_ids = tap.logical_ids.take()
    if tap.layout is not None:
        n = topk_ids.shape[0]
        first, size, row0 = locate(n, row0, tap.layout, _batch(tap.layout))
        topk_ids = topk_ids[first : first + size]
        topk_weights = topk_weights[first : first + size]
        if tap.kept is not None:  # else the other ranks' rows stay in memory too, uncharged
            topk_ids, topk_weights = topk_ids.clone(), topk_weights.clone()
    if tap.kept is not None:
        tap.kept[tap.slot, row0] = (topk_ids, topk_weights)
        return
    torch.ops.vllm.moe_routes_capture(tap.ids, tap.weights, topk_ids, topk_weights, row0, tap.slot)


def _batch(layout: Layout) -> Batch:
    """What the call under way runs in: host numbers, the same in every replay of a CUDA graph."""
    # They import this module, by way of the layers.
    from vllm.forward_context import get_forward_context
    from vllm.v1.worker.ubatching import dbo_current_ubatch_id

    context = get_forward_context()
    tokens: list[int] = context.dp_metadata.num_tokens_across_dp_cpu.tolist()
    ubatch_id = dbo_current_ubatch_id()
    if ubatch_id == 0:
        return Batch(tokens)
    num_tokens = context.batch_descriptor.num_tokens  # of all micro-batches
    return Batch(tokens, ubatch_row0(ubatch_id, num_tokens, layout.num_ubatches))
