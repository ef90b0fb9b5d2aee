# SPDX-License-Identifier: Apache-2.0
"""The files of a Parquet route log. Needs pyarrow and the schema, neither vLLM nor torch.

A log is a directory of ``part-000000.parquet``, ``part-000001.parquet``, … and nothing else: some
readers refuse a directory with any other file in it, whatever its name. What is no row stands in
the footers, as key-value metadata:

- ``moe_routes.meta``, in every part: the header, as JSON. The first part has no rows: it is there
  before any row is.
- ``moe_routes.requests``, where there are some: request records as JSON lines, each with
  ``after_rows``, the number of the part's rows that come before it.
- ``moe_routes.end``, in the last part: the end record. Without it the log was cut short.

A part is written beside the directory and renamed into it, so a part that exists is whole.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# Relative: the analysis library loads this module where there is no package named vllm.
from ...schema import FOOTER_END, FOOTER_META, FOOTER_REQUESTS, ROUTE_FIELDS, Record

#: Columns of few distinct values, in runs or in a pattern that the compressor finds.
_DICTIONARY = (
    "req_id", "token_idx", "layer", "topk_ids.list.element", "phase", "forward_pass_id", "flag"
)  # fmt: skip
_WEIGHTS = "topk_weights.list.element"


def schema(
    num_experts: int, top_k: int | None, weights: str, req_id: pa.DataType | None = None
) -> pa.Schema:
    """Columns of a part, named as the keys of a JSON line.

    Args:
        num_experts: the largest layer's; ids are uint8 where they fit, else int16.
        top_k: experts chosen per row; None where layers differ, which makes the lists variable.
        weights: "float32", "float16", or "float64" for a log of another writer.
        req_id: of another writer that numbers its requests; a string else.
    """
    size = -1 if top_k is None else top_k
    ids = pa.uint8() if num_experts <= 256 else pa.int16()
    floats = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}
    types = {
        "string": pa.dictionary(pa.int32(), pa.string()) if req_id is None else req_id,
        "int16": pa.int16(),
        "int32": pa.int32(),
        "int64": pa.int64(),
        "ids": pa.list_(pa.field("element", ids), size),
        "weights": pa.list_(pa.field("element", floats[weights]), size),
        "label": pa.dictionary(pa.int8(), pa.string()),
    }
    return pa.schema([(field.name, types[field.kind]) for field in ROUTE_FIELDS])


class PartWriter:
    """Writes the parts of one dataset.

    Args:
        folder: directory to make.
        columns: a :func:`schema`.
        header: the meta record.
        private: readable by its owner only, whatever the umask.

    Raises:
        FileExistsError: ``folder`` exists.
        OSError: it can't be made.
    """

    def __init__(
        self, folder: Path, columns: pa.Schema, header: Record, private: bool = False
    ) -> None:
        self._meta = _json(header)  # may raise, and then leaves no directory behind
        self._folder = folder
        self.columns = columns
        # DuckDB can't read split float16.
        half = columns.field("topk_weights").type.value_type == pa.float16()
        self._weights_encoding = "PLAIN" if half else "BYTE_STREAM_SPLIT"
        self._parts = 0
        #: Size of the parts, in bytes.
        self.bytes = 0
        self._mode = 0o600 if private else 0o666
        folder.mkdir(0o700 if private else 0o777)
        try:
            self.write(columns.empty_table())
        except OSError:
            folder.rmdir()
            raise

    def write(
        self,
        rows: pa.Table,
        requests: Sequence[Record] = (),
        end: Record | None = None,
    ) -> None:
        """Add a part: rows, the request records among them, and at last the end record."""
        footer = {FOOTER_META: self._meta}
        if requests:
            footer[FOOTER_REQUESTS] = b"".join(_json(record) + b"\n" for record in requests)
        if end is not None:
            footer[FOOTER_END] = _json(end)
        name = self._name(self._parts)
        # Beside the directory: a reader of the directory must not meet it, nor a crash leave it.
        scratch = self._folder.with_name(f".{self._folder.name}.{name}")
        scratch.unlink(missing_ok=True)  # of a run that was killed
        # pyarrow writes into the file that is there, and leaves its mode as it is.
        os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode))
        try:
            pq.write_table(
                rows.replace_schema_metadata(footer),
                scratch,
                use_dictionary=list(_DICTIONARY),
                column_encoding={_WEIGHTS: self._weights_encoding},
                compression="zstd",
                compression_level=1,
                write_statistics=["token_idx", "layer", "forward_pass_id"],
                store_schema=True,
            )
            size = scratch.stat().st_size
            os.replace(scratch, self._folder / name)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        self._parts += 1
        self.bytes += size

    def exists(self, part: int) -> bool:
        """Whether a part that was written is still there."""
        return (self._folder / self._name(part)).exists()

    def discard(self) -> None:
        """Remove a log in which nothing was recorded."""
        (self._folder / self._name(0)).unlink(missing_ok=True)
        self._folder.rmdir()

    @staticmethod
    def _name(part: int) -> str:
        return f"part-{part:06d}.parquet"


def _json(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
