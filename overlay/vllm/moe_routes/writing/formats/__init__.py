# SPDX-License-Identifier: Apache-2.0
"""How rows become bytes: one module a format, chosen by the name of the log."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.writing.formats.linefile import Held
from vllm.moe_routes.writing.rows import RowTable


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

    @property
    def held(self) -> Held:
        """What was handed to the operating system, and is still there as far as is known."""

    def most_bytes(self, num_rows: int, id_bytes: int) -> int:
        """A bound of the bytes that rows take.

        Args:
            num_rows: tokens times layers.
            id_bytes: length of the longest request id, as JSON.
        """

    def flush(self) -> None:
        """Hand everything added so far to the operating system."""

    def close(self, end: dict[str, Any]) -> None:
        """Write the end record; everything before it is flushed."""

    def abandon(self) -> None:
        """Stop after an error: forget what can't be written, so that ``held`` is all there is."""

    def close_abandoned(self, make_end: Callable[[], dict[str, Any]]) -> None:
        """Close after ``abandon``, with an end record if there is any room for one.

        Args:
            make_end: the end record, by what is held when it is called; it may be called twice.
        """

    def discard(self) -> None:
        """Remove a log in which nothing was recorded."""


def create(
    path: Path,
    header: dict[str, Any],
    layers: Sequence[MoELayer],
    weights: str,
    private: bool = False,
) -> RouteFile:
    """Create the log at ``path``, which must not exist; its header is on disk when this returns.

    Args:
        path: where; its name says the format.
        header: the meta record.
        layers: the recorded layers, in slot order.
        weights: precision to keep weights in, one of ``config.WEIGHTS``.
        private: readable by its owner only, whatever the umask.

    Raises:
        RouteLogError: it exists, or can't be created.
    """
    if path.name.endswith(".parquet"):
        from vllm.moe_routes.writing.formats.parquet import ParquetLog

        return ParquetLog(path, header, layers, weights, private)
    from vllm.moe_routes.writing.formats.jsonl import JsonlLog

    return JsonlLog(path, header, layers, weights, private)


def shortest_flush(path: Path) -> float:
    """Seconds between flushes below which this format's files would get too small to be of use."""
    return 30.0 if path.name.endswith(".parquet") else 0.0
