# SPDX-License-Identifier: Apache-2.0
"""Where the rows of one hook call belong in a pass's buffer. Pure, host numbers only.

A pass's rows are a rank's own tokens, padded. A call sees all of them, or a chunk (``chunk_start``
says where it begins), or, before a naive dispatch's experts, the rows of every rank one after
another. With sequence parallelism "every rank" means every tensor-parallel rank, each of which has
one shard of its data-parallel rank's tokens. A micro-batch is a pass of its own, except that its
rows stand behind those of the micro-batches before it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vllm.moe_routes.errors import RouteLogError


class Layout(NamedTuple):
    """A layer's place among the ranks. Only layers that need a mapping have one.

    Attributes:
        dp_rank: this rank's place among the data-parallel ranks.
        sp_size: shards of a data-parallel rank's tokens; 1 without sequence parallelism.
        sp_rank: this rank's shard.
        num_ubatches: micro-batches that a pass may be split into.
    """

    dp_rank: int
    sp_size: int = 1
    sp_rank: int = 0
    num_ubatches: int = 1


class Batch(NamedTuple):
    """What one call runs in.

    Attributes:
        tokens_across_dp: [dp] padded tokens of every data-parallel rank in this (micro-)batch.
        row0: the micro-batch's first row in the pass.
    """

    tokens_across_dp: Sequence[int]
    row0: int = 0


class Rows(NamedTuple):
    """Rows ``[first, first + size)`` of a call belong at ``row0`` of the buffer."""

    first: int
    size: int
    row0: int


def ubatch_row0(ubatch_id: int, num_tokens: int, num_ubatches: int) -> int:
    """First row of a micro-batch: all but the last hold ``num_tokens // num_ubatches`` rows."""
    return ubatch_id * (num_tokens // num_ubatches)


def locate(num_rows: int, chunk_start: int, layout: Layout, batch: Batch) -> Rows:
    """Find a call's own rows and their place.

    Args:
        num_rows: rows of the call.
        chunk_start: first of them, within this rank's own rows; 0 where nothing is chunked.
        layout: this rank's place.
        batch: what the call runs in.

    Raises:
        RouteLogError: the number of rows fits no layout known here.
    """
    tokens = batch.tokens_across_dp
    shards = [-(-count // layout.sp_size) for count in tokens]
    own = shards[layout.dp_rank]
    total = sum(shards) * layout.sp_size
    if chunk_start + num_rows <= own:
        first, size = 0, num_rows
    elif num_rows == total and chunk_start == 0:
        before = sum(shards[: layout.dp_rank]) * layout.sp_size
        first, size = before + layout.sp_rank * own, own
    else:
        raise RouteLogError(
            f"an MoE layer saw {num_rows} rows where this rank has {own} and all ranks have "
            f"{total}; recording this engine is not supported, unset VLLM_LOG_MOE"
        )
    # A shard is padded too: past the (micro-)batch's own tokens lie another shard's rows.
    start = layout.sp_rank * own + chunk_start
    size = max(0, min(size, tokens[layout.dp_rank] - start))
    return Rows(first, size, batch.row0 + start)
