# SPDX-License-Identifier: Apache-2.0
"""JSON lines: one object a token and layer."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy.typing as npt
from vllm.moe_routes.errors import ConflictError, RouteLogError
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.rows import Flag, RowTable

_FLAG_NAMES = [None, *(flag.name.lower() for flag in Flag if flag)]
_PHASES = ("prefill", "decode")
_encoder = msgspec.json.Encoder()


class _Route(msgspec.Struct, tag_field="type", tag="route", omit_defaults=True):
    req_id: str
    token_idx: int
    layer: int
    topk_ids: list[int]
    topk_weights: list[float]
    phase: str
    forward_pass_id: int
    flag: str | None = None


class JsonlLog:
    """A ``formats.RouteFile``."""

    def __init__(
        self, path: Path, header: dict[str, Any], layers: Sequence[MoELayer], weights: str
    ) -> None:
        if weights != "float32":
            raise RouteLogError(
                f"VLLM_LOG_MOE_WEIGHTS={weights} is for .parquet logs and {path} is none; "
                "unset it or name a .parquet directory"
            )
        first_line = encode_object(header)
        self._layers = list(layers)
        self.bytes = 0
        self._file = _create(path)
        self._put(first_line)
        self._file.flush()

    def write_routes(
        self,
        forward_pass_id: int,
        rows: RowTable,
        topk_ids: npt.NDArray[Any],
        topk_weights: npt.NDArray[Any],
        good: npt.NDArray[Any],
    ) -> None:
        self._put(encode_routes(self._layers, forward_pass_id, rows, topk_ids, topk_weights, good))

    def write_request(self, record: dict[str, Any]) -> None:
        self.write_record(record)

    def write_record(self, record: dict[str, Any]) -> None:
        """Add any record."""
        self._put(encode_object(record))

    def flush(self) -> None:
        self._file.flush()

    def close(self, end: dict[str, Any]) -> None:
        self._put(encode_object(end))
        self._file.close()

    def abandon(self) -> None:
        # What the buffer still holds can't be written either: the same error, already told.
        with contextlib.suppress(OSError):
            self._file.close()

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self.bytes += len(data)


def _create(path: Path) -> IO[bytes]:
    """Create a new file; never append to, overwrite or share one.

    Raises:
        RouteLogError: it exists, or can't be created.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        raise ConflictError(
            f"route log {path} exists; move it away or set VLLM_LOG_MOE to another file"
        ) from None
    except OSError as error:
        raise RouteLogError(
            f"route log {path} can't be created ({error.strerror}); set VLLM_LOG_MOE to a file in "
            "a writable directory"
        ) from None
    return os.fdopen(fd, "wb", buffering=1 << 20)


def encode_object(record: dict[str, Any]) -> bytes:
    """One line: the header, a request or the end record."""
    line: bytes = _encoder.encode(record)
    return line + b"\n"


def encode_routes(
    layers: Sequence[MoELayer],
    forward_pass_id: int,
    rows: RowTable,
    topk_ids: npt.NDArray[Any],
    topk_weights: npt.NDArray[Any],
    good: npt.NDArray[Any],
) -> bytes:
    """The lines of one pass, token by token and layer by layer.

    Args:
        layers: the recorded layers, in slot order.
        forward_pass_id: the pass.
        rows: request, position, phase and flag of the n tokens.
        topk_ids: [n, L, K].
        topk_weights: [n, L, K] float32; written exactly, as doubles.
        good: [n, L] bool; rows that are not are left out.
    """
    all_ids = topk_ids.tolist()
    all_weights = topk_weights.tolist()
    every = bool(good.all())
    slots = [(i, item.layer, item.top_k) for i, item in enumerate(layers)]
    same_k = all(item.top_k == topk_ids.shape[2] for item in layers)
    positions = rows.positions.tolist()
    is_decode, flags = rows.is_decode.tolist(), rows.flags.tolist()
    lines: list[_Route] = []
    for t, req_id in enumerate(rows.req_ids):
        ids, weights, position = all_ids[t], all_weights[t], positions[t]
        phase, flag = _PHASES[is_decode[t]], _FLAG_NAMES[flags[t]]
        for i, layer, top_k in slots:
            if every or good[t, i]:
                k = ids[i] if same_k else ids[i][:top_k]
                w = weights[i] if same_k else weights[i][:top_k]
                lines.append(_Route(req_id, position, layer, k, w, phase, forward_pass_id, flag))
    encoded: bytes = _encoder.encode_lines(lines)
    return encoded
