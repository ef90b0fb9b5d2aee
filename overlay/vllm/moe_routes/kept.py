# SPDX-License-Identifier: Apache-2.0
"""Choices of an eager pass on the host, kept as they are until the pass ends.

An op costs its call there, not its bytes. So a layer's hook only keeps what the router returned,
and all layers are copied by two calls once the pass is over: that copy is the snapshot. Compiled
passes and CUDA graphs can hold no list; they write to the buffer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.moe_routes.capture import WEIGHT_DTYPE, CaptureBuffer, moe_routes_capture

#: By slot and first row, what a call of that layer's router returned: ids and weights, each
#: [n, >= top_k]. A dictionary, so that passes nobody takes, as idle ranks run, don't pile up.
Kept = dict[tuple[int, int], tuple[Tensor, Tensor]]


def put_together(
    kept: Kept, slots: Sequence[int], buffer: CaptureBuffer, num_rows: int
) -> CaptureBuffer:
    """A pass's choices as a buffer to read from; ``kept`` is empty afterwards.

    Args:
        kept: of the pass, in the order in which the layers fired.
        slots: [L] of the recorded layers, ascending.
        buffer: the whole one; holds what does not come as one call a layer over all rows.
        num_rows: rows of the pass.

    Returns:
        One whose first ``num_rows`` rows are [num_rows, L, K]. Where a layer did not fire, or not
        for all rows, ``not_an_id`` stands there.
    """
    places, choices = list(kept), list(kept.values())
    kept.clear()
    shapes = {ids.shape for ids, _ in choices}
    if len(shapes) == 1 and places == [(slot, 0) for slot in slots]:
        n, k = next(iter(shapes))
        if n >= num_rows and k == buffer.ids.shape[2]:
            weights = torch.stack([given for _, given in choices], dim=1)
            # The ids keep the router's dtype: a call less, and none wraps around.
            return buffer._replace(
                ids=torch.stack([ids for ids, _ in choices], dim=1),
                weights=weights.to(WEIGHT_DTYPE),
                own=True,
            )
    buffer.clear(num_rows)
    for (slot, row0), (ids, given) in zip(places, choices, strict=True):
        moe_routes_capture(buffer.ids, buffer.weights, ids, given, row0, slot)
    return buffer.narrowed(slots)
