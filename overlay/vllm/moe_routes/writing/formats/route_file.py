# SPDX-License-Identifier: Apache-2.0
"""A file of routes that is being written: what every format does, and the choice of one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.schema import Record
from vllm.moe_routes.writing.formats.jsonl import JsonlFile
from vllm.moe_routes.writing.formats.linefile import Contents
from vllm.moe_routes.writing.formats.parquet import ParquetDirectory
from vllm.moe_routes.writing.rows import PassRoutes


class RouteFile(Protocol):
    """A route log's bytes. Every method runs on the writer thread."""

    @property
    def bytes(self) -> int:
        """Size of what was written; after a flush, of all that was added."""

    @property
    def durable(self) -> Contents:
        """What was handed to the operating system, and is still there as far as is known."""

    def write_routes(self, routes: PassRoutes) -> None:
        """Add one pass, token by token and layer by layer."""

    def write_request(self, record: Record) -> None:
        """Add a request's record."""

    def most_bytes(self, num_rows: int, id_bytes: int) -> int:
        """A bound of the bytes that rows take.

        Args:
            num_rows: tokens times layers.
            id_bytes: length of the longest request id, as JSON.
        """

    def flush(self) -> None:
        """Hand everything added so far to the operating system."""

    def close(self, end: Record) -> None:
        """Write the end record; everything before it is flushed."""

    def abandon(self) -> None:
        """Stop after an error: forget what can't be written, so that all there is is durable."""

    def close_abandoned(self, make_end: Callable[[], Record]) -> None:
        """Close after ``abandon``, with an end record if there is any room for one.

        Args:
            make_end: the end record, by what is durable when it is called; it may be called twice.
        """

    def discard(self) -> None:
        """Remove a log in which nothing was recorded."""


def create(
    path: Path, header: Record, layers: Sequence[MoELayer], weights: str, private: bool
) -> RouteFile:
    """Create the log at ``path``, which must not exist; its header is on disk when this returns.

    Args:
        path: where; its name says the format.
        header: the meta record.
        layers: the recorded layers, in slot order.
        weights: precision to keep weights in, one of ``config.WEIGHTS``.
        private: readable by its owner only, whatever the umask.

    Raises:
        RouteLogError: it exists, can't be created, or can't hold such weights.
    """
    if path.name.endswith(".parquet"):
        return ParquetDirectory(path, header, layers, weights, private)
    if weights != "float32":
        raise RouteLogError(
            f"VLLM_LOG_MOE_WEIGHTS={weights} is for .parquet logs and {path} is none; "
            "unset it or name a .parquet directory"
        )
    return JsonlFile(path, header, layers, private)


def shortest_flush(path: Path) -> float:
    """Seconds between flushes below which this format's files would get too small to be of use."""
    return 30.0 if path.name.endswith(".parquet") else 0.0
