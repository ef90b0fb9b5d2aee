# SPDX-License-Identifier: Apache-2.0
"""Parquet: rows wait as arrays and are written part by part; no loop over rows."""

import contextlib
import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.schema import FLAGS, PHASES, Record
from vllm.moe_routes.writing.formats.linefile import Contents, refusal
from vllm.moe_routes.writing.rows import PassRoutes

#: A part is closed at this many rows, if no flush closes it earlier.
PART_ROWS = 1 << 20
#: Or at this size of the waiting ids and weights: making a part takes about five times as much.
PART_BYTES = 12 << 20


def _dataset() -> Any:
    """The module that needs pyarrow, which vLLM does not install."""
    try:
        from vllm.moe_routes.writing.formats import dataset
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "pyarrow":
            raise
        raise RouteLogError(
            "a .parquet route log needs pyarrow, which is not installed; run: pip install pyarrow, "
            "or name a .jsonl file"
        ) from None
    return dataset


class ParquetDirectory:
    """A ``route_file.RouteFile``; ``bytes`` are those of the parts on disk."""

    def __init__(
        self, path: Path, header: Record, layers: Sequence[MoELayer], weights: str, private: bool
    ) -> None:
        self._dataset = _dataset()
        self._layer_ids = np.array([item.layer for item in layers], dtype=np.int16)
        self._top_k = np.array([item.top_k for item in layers])
        same_k = len(set(self._top_k.tolist())) == 1
        self._columns = self._dataset.schema(
            max(item.num_experts for item in layers),
            int(self._top_k[0]) if same_k else None,
            weights,
        )
        self._id_type = self._columns.field("topk_ids").type.value_type.to_pandas_dtype()
        self._weight_type = np.dtype(weights)
        #: Of the waiting passes; their ids and weights are [R, K], of the R rows that are good.
        self._passes: list[PassRoutes] = []
        self._requests: list[Record] = []
        self._rows = self._flagged = self._bytes = 0
        #: Contents of every part, after the first one, which holds the header.
        self._contents: list[Contents] = []
        try:
            self._parts = self._dataset.PartWriter(path, self._columns, header, private)
        except OSError as error:
            raise refusal(path, error, "directory") from None

    @property
    def bytes(self) -> int:
        size: int = self._parts.bytes
        return size

    @property
    def durable(self) -> Contents:
        parts = [part for i, part in enumerate(self._contents, 1) if self._parts.exists(i)]
        return Contents(*map(sum, zip(*parts, strict=True))) if parts else Contents()

    def most_bytes(self, num_rows: int, id_bytes: int) -> int:
        # What waits is as good as on the disk. Ids, weights, and six columns of numbers.
        widest = self._id_type().itemsize + self._weight_type.itemsize
        return (num_rows + self._rows) * int(32 + self._top_k.max() * widest)

    def write_routes(self, routes: PassRoutes) -> None:
        rows, good = routes.rows, routes.good
        every = good.all()
        # Indexing and astype copy: the arrays may be a buffer that is used again.
        ids, weights = (
            (item.reshape(-1, item.shape[2]) if every else item[good]).astype(kind)
            for item, kind in (
                (routes.topk_ids, self._id_type),
                (routes.topk_weights, self._weight_type),
            )
        )
        self._passes.append(routes._replace(topk_ids=ids, topk_weights=weights))
        self._rows += len(ids)
        if rows.flags.any():
            self._flagged += int(np.count_nonzero(good[rows.flags != 0]))
        self._bytes += ids.nbytes + weights.nbytes
        if self._rows >= PART_ROWS or self._bytes >= PART_BYTES:
            self.flush()

    def write_request(self, record: Record) -> None:
        self._requests.append({**record, "after_rows": self._rows})

    def flush(self) -> None:
        if self._rows or self._requests:
            self._write_part()

    def close(self, end: Record) -> None:
        gone = [i for i in range(len(self._contents) + 1) if not self._parts.exists(i)]
        if gone:
            raise OSError(errno.ESTALE, f"part {gone[0]} was removed while the log was written")
        self._write_part(end)

    def abandon(self) -> None:
        with contextlib.suppress(Exception):  # the first error was reported; these rows are counted
            self.flush()
        self._forget()

    def close_abandoned(self, make_end: Callable[[], Record]) -> None:
        self._write_part(make_end())

    def discard(self) -> None:
        self._parts.discard()

    def _write_part(self, end: Record | None = None) -> None:
        self._parts.write(self._table(), self._requests, end)
        self._contents.append(Contents(self._rows, self._flagged, len(self._requests)))
        self._forget()

    def _forget(self) -> None:
        self._passes.clear()
        self._requests = []
        self._rows = self._flagged = self._bytes = 0

    def _table(self) -> Any:
        """The waiting rows as a table of ``self._columns``."""
        import pyarrow as pa

        if not self._rows:
            return self._columns.empty_table()
        passes = self._passes
        token, slot = np.nonzero(np.concatenate([item.good for item in passes]))
        tokens = [len(item.rows.req_ids) for item in passes]
        is_decode = np.concatenate([item.rows.is_decode for item in passes])
        flags = np.concatenate([item.rows.flags for item in passes])
        positions = np.concatenate([item.rows.positions for item in passes]).astype(np.int32)
        pass_ids = np.repeat([item.forward_pass_id for item in passes], tokens)
        names = pa.array([name for item in passes for name in item.rows.req_ids], pa.string())
        codes = names.dictionary_encode()
        of_row = codes.indices.to_numpy()[token]
        labels = pa.DictionaryArray.from_arrays
        flag_codes = flags.astype(np.int8)[token] - 1
        columns = [
            labels(pa.array(of_row), codes.dictionary),
            pa.array(positions[token]),
            pa.array(self._layer_ids[slot]),
            self._lists("topk_ids", np.concatenate([item.topk_ids for item in passes]), slot),
            self._lists(
                "topk_weights", np.concatenate([item.topk_weights for item in passes]), slot
            ),
            labels(pa.array(is_decode.astype(np.int8)[token]), list(PHASES)),
            pa.array(pass_ids[token]),
            labels(pa.array(flag_codes, mask=flag_codes < 0), list(FLAGS)),
        ]
        return pa.Table.from_arrays(columns, schema=self._columns)

    def _lists(self, name: str, values: npt.NDArray[Any], slot: npt.NDArray[Any]) -> Any:
        """[R, K] as a list column; rows of a layer with a smaller top_k get shorter lists."""
        import pyarrow as pa

        kind = self._columns.field(name).type
        if pa.types.is_fixed_size_list(kind):
            return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind)
        top_k = self._top_k[slot]
        offsets = np.concatenate([[0], np.cumsum(top_k)]).astype(np.int32)
        filled = values[np.arange(values.shape[1]) < top_k[:, None]]
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(filled), type=kind)
