# SPDX-License-Identifier: Apache-2.0
"""How rows become bytes: one module a format, chosen by the name of the log."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.rows import RowTable


class RouteFile(Protocol):
    """A log that is being written. Every method runs on the writer thread."""

    @property
    def bytes(self) -> int:
        """Size of what was written; after a flush, of all that was added."""

    def write_routes(
        self,
        forward_pass_id: int,
        rows: RowTable,
        topk_ids: npt.NDArray[Any],
        topk_weights: npt.NDArray[Any],
        good: npt.NDArray[Any],
    ) -> None:
        """Add one pass, token by token and layer by layer.

        Args:
            forward_pass_id: the pass.
            rows: request, position, phase and flag of the n tokens.
            topk_ids: [n, L, K].
            topk_weights: [n, L, K] float32.
            good: [n, L] bool; rows that are not are left out.
        """

    def write_request(self, record: dict[str, Any]) -> None:
        """Add a request's record."""

    def flush(self) -> None:
        """Hand everything added so far to the operating system."""

    def close(self, end: dict[str, Any]) -> None:
        """Write the end record; everything before it is flushed."""

    def abandon(self) -> None:
        """Give up after a write error; what reached the disk stays readable."""


def create(
    path: Path, header: dict[str, Any], layers: Sequence[MoELayer], weights: str
) -> RouteFile:
    """Create the log at ``path``, which must not exist; its header is on disk when this returns.

    Raises:
        RouteLogError: it exists, or can't be created.
    """
    if path.name.endswith(".parquet"):
        from vllm.moe_routes.formats.parquet import ParquetLog

        return ParquetLog(path, header, layers, weights)
    from vllm.moe_routes.formats.jsonl import JsonlLog

    return JsonlLog(path, header, layers, weights)


def shortest_flush(path: Path) -> float:
    """Seconds between flushes below which this format's files would get too small to be of use."""
    return 30.0 if path.name.endswith(".parquet") else 0.0
