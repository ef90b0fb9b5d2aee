# SPDX-License-Identifier: Apache-2.0
"""What the hook of a recorded layer finds on the layer: where its choices go."""

from typing import NamedTuple

from torch import Tensor
from vllm.moe_routes.capture.references import References
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
        dp_rank: this rank's place among several data-parallel ranks; None where it is alone, and
            the layer's rows are the pass's as they are.
        logical_ids: where its router leaves them; None where it returns them.
        references: where the choices wait until the pass ends; None where they are written to the
            buffer.
    """

    ids: Tensor
    weights: Tensor
    slot: int
    dp_rank: int | None = None
    logical_ids: LogicalIds | None = None
    references: References | None = None
