# SPDX-License-Identifier: Apache-2.0
"""JSON lines: one object a token and layer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.formats.linefile import Held, LineFile, refusal
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
        self,
        path: Path,
        header: dict[str, Any],
        layers: Sequence[MoELayer],
        weights: str,
        private: bool = False,
    ) -> None:
        if weights != "float32":
            raise RouteLogError(
                f"VLLM_LOG_MOE_WEIGHTS={weights} is for .parquet logs and {path} is none; "
                "unset it or name a .parquet directory"
            )
        first_line = encode_object(header)
        self._layers = list(layers)
        self._top_k = max(item.top_k for item in layers)
        self._file = LineFile(path, private)
        try:
            self._file.put(first_line, Held())
            self._file.flush()
        except OSError as error:
            self._file.discard()
            raise refusal(path, error) from None
        self._file.seal_header()

    @property
    def bytes(self) -> int:
        return self._file.size

    @property
    def held(self) -> Held:
        return self._file.held

    def write_routes(
        self,
        forward_pass_id: int,
        rows: RowTable,
        topk_ids: npt.NDArray[Any],
        topk_weights: npt.NDArray[Any],
        good: npt.NDArray[Any],
    ) -> None:
        lines = encode_routes(self._layers, forward_pass_id, rows, topk_ids, topk_weights, good)
        flagged = int(np.count_nonzero(good[rows.flags != 0]))
        self._file.put(lines, Held(int(np.count_nonzero(good)), flagged))

    def write_request(self, record: dict[str, Any]) -> None:
        self._file.put(encode_object(record), Held(requests=1))

    def write_record(self, record: dict[str, Any], rows: int) -> None:
        """Add a record that stands for ``rows`` rows."""
        self._file.put(encode_object(record), Held(rows))

    def most_bytes(self, num_rows: int, id_bytes: int) -> int:
        # The longest line: a float32 as a double takes 24 characters, an id 5, a position 10.
        return num_rows * (190 + 31 * self._top_k + id_bytes)

    def flush(self) -> None:
        self._file.flush()

    def close(self, end: dict[str, Any]) -> None:
        self._file.put(encode_object(end), Held())
        self._file.flush()
        self._file.close()

    def abandon(self) -> None:
        self._file.cut_back()

    def close_abandoned(self, make_end: Callable[[], dict[str, Any]]) -> None:
        self._file.end_with(lambda: encode_object(make_end()))

    def discard(self) -> None:
        self._file.discard()


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
