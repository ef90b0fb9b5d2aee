# SPDX-License-Identifier: Apache-2.0
"""Where the rows of one hook call belong in a pass's buffer. Pure, host numbers only.

A pass's rows are a rank's own tokens, padded. A call sees all of them, or a chunk (``chunk_start``
says where it begins), or, before a naive dispatch's experts, the rows of every data-parallel rank
one after another.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vllm.moe_routes.errors import RouteLogError


class Rows(NamedTuple):
    """Rows ``[first, first + size)`` of a call belong at ``row0`` of the buffer."""

    first: int
    size: int
    row0: int


def locate(num_rows: int, chunk_start: int, dp_rank: int, tokens_across_dp: Sequence[int]) -> Rows:
    """Find a call's own rows and their place.

    Args:
        num_rows: rows of the call.
        chunk_start: first of them, within this rank's own rows; 0 where nothing is chunked.
        dp_rank: this rank's place among the data-parallel ranks.
        tokens_across_dp: [dp] padded tokens of every data-parallel rank in this pass.

    Raises:
        RouteLogError: the number of rows fits no layout known here.
    """
    own, total = tokens_across_dp[dp_rank], sum(tokens_across_dp)
    if chunk_start + num_rows <= own:
        return Rows(0, num_rows, chunk_start)
    if num_rows == total and chunk_start == 0:
        return Rows(sum(tokens_across_dp[:dp_rank]), own, 0)
    raise RouteLogError(
        f"an MoE layer saw {num_rows} rows where this rank has {own} and all ranks have "
        f"{total}; recording this engine is not supported, unset VLLM_LOG_MOE"
    )
