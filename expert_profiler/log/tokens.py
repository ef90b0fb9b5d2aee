# SPDX-License-Identifier: Apache-2.0
"""Read a log token by token, in the order of the text: a token's rows of all layers together.

Rows are sorted by DuckDB, which spills to disk, and come in batches, so memory does not grow with
the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from expert_profiler.errors import UserError
from expert_profiler.log.route_log import RouteLog
from expert_profiler.log.usable_rows import UNFLAGGED
from expert_profiler.resources import program

Ids: TypeAlias = "npt.NDArray[np.int16]"

# Choices (tokens x layers x K) held at a time: 24 MB of ids and weights.
_BATCH_CHOICES = 4_000_000


@dataclass(frozen=True)
class TokenBatch:
    """Tokens sorted by (request, position).

    request: [n] int64, 0 up, in the order in which the requests first occur in the log.
    position: [n] int64, ``token_idx``. phase: [n] int8, index into ``schema.PHASES``.
    ids: [n, layers, K] int16, -1 where a token has no row in a layer, and in the last columns of a
    layer with a smaller top-k. weights: [n, layers, K] float32, NaN in those places.
    """

    request: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    phase: npt.NDArray[np.int8]
    ids: Ids
    weights: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.request)

    def part(self, tokens: slice) -> TokenBatch:
        """A copy of some of the tokens."""
        return TokenBatch(*(getattr(self, column.name)[tokens].copy() for column in fields(self)))


def top_ks(log: RouteLog, condition: str = UNFLAGGED) -> list[int]:
    """The number of experts that a token chooses in each of ``log.layers``; 0 without rows."""
    sizes = dict.fromkeys(log.layers, 0)
    for layer, low, high in log.query(
        f"SELECT layer, min(len(topk_ids)), max(len(topk_ids)) FROM routes WHERE {condition} "  # noqa: S608
        "GROUP BY layer"
    ):
        if low != high:
            raise UserError(
                f"{log.path}: rows of layer {layer} have {low} to {high} expert ids; "
                f"list all faults with: {program()} validate --routes {log.path}"
            )
        sizes[int(layer)] = int(high)
    return [sizes[layer] for layer in log.layers]


def request_names(log: RouteLog) -> list[str]:
    """``req_id`` of each request index of ``TokenBatch.request``."""
    _order_requests(log)
    rows = log.query("SELECT req_id FROM request_order ORDER BY request")
    return [str(name) for (name,) in rows]


def batches(
    log: RouteLog,
    condition: str = UNFLAGGED,
    *,
    on_tokens: Callable[[int], None] | None = None,
) -> Iterator[TokenBatch]:
    """All tokens that have a row which satisfies ``condition``, once each.

    Where a (request, position, layer) comes more than once, each time is a token of its own, the
    repeats after the request's other tokens: the sums over a log are those of ``log.counts()``.

    on_tokens gets the number of tokens of each batch.
    """
    k = max(top_ks(log, condition), default=0)
    if k == 0:
        return
    layers = np.array(log.layers)
    size = max(1, _BATCH_CHOICES // (len(layers) * k))
    rest: list[npt.NDArray[Any]] | None = None
    for columns in _sorted_rows(log, condition, size * len(layers), k):
        if rest is not None:
            columns = [np.concatenate(pair) for pair in zip(rest, columns, strict=True)]
        request, repeat, position = columns[:3]
        new = np.flatnonzero(
            (np.diff(request) != 0) | (np.diff(repeat) != 0) | (np.diff(position) != 0)
        )
        # The last token may go on in the next rows.
        end = int(new[-1]) + 1 if len(new) else 0
        rest = [column[end:] for column in columns]
        if end:
            whole = _pivot([column[:end] for column in columns], new, layers, k)
            yield from _pieces(whole, size, on_tokens)
    if rest is not None:
        last = _pivot(rest, np.array([len(rest[0]) - 1]), layers, k)
        yield from _pieces(last, size, on_tokens)


def _pieces(
    batch: TokenBatch, size: int, on_tokens: Callable[[int], None] | None
) -> Iterator[TokenBatch]:
    for start in range(0, len(batch), size):
        piece = batch if len(batch) <= size else batch.part(slice(start, start + size))
        yield piece
        if on_tokens is not None:
            on_tokens(len(piece))


def _order_requests(log: RouteLog) -> None:
    log.query(
        "CREATE TEMP TABLE IF NOT EXISTS request_order AS SELECT req_id, "
        "row_number() OVER (ORDER BY min(rowid)) - 1 AS request FROM routes GROUP BY req_id"
    )


def _sorted_rows(
    log: RouteLog, condition: str, size: int, k: int
) -> Iterator[list[npt.NDArray[Any]]]:
    """Columns request, repeat, position, layer, phase, ids [rows, K], weights [rows, K]."""
    _order_requests(log)
    # Numbering the repeats sorts everything once more: only where there are any.
    repeat = (
        "row_number() OVER (PARTITION BY req_id, token_idx, layer ORDER BY rowid) - 1"
        if log.duplicates
        else "0"
    )
    sql = f"""
        SELECT request, repeat, token_idx, layer, phase, topk_ids, topk_weights
        FROM (SELECT req_id, ({repeat})::BIGINT AS repeat, token_idx, layer, phase, topk_ids,
                     topk_weights FROM routes WHERE {condition})
        JOIN request_order USING (req_id)
        ORDER BY request, repeat, token_idx, layer"""  # noqa: S608 (no text from outside)
    for chunk in log.arrow(sql, size):
        yield _columns(chunk, k)


def _columns(chunk: Any, k: int) -> list[npt.NDArray[Any]]:
    plain = [chunk.column(i).to_numpy(zero_copy_only=False) for i in range(5)]
    ids, weights = chunk.column(5), chunk.column(6)
    lengths = np.diff(np.asarray(ids.offsets))
    if not np.array_equal(lengths, np.diff(np.asarray(weights.offsets))):
        raise UserError(
            f"rows with another number of weights than expert ids; see: {program()} validate"
        )
    flat_ids = ids.flatten().to_numpy(zero_copy_only=False).astype(np.int16)
    flat_weights = weights.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    if (lengths == k).all():
        return [*plain, flat_ids.reshape(-1, k), flat_weights.reshape(-1, k)]
    inside = np.arange(k) < lengths[:, None]
    wide_ids = np.full((len(lengths), k), -1, dtype=np.int16)
    wide_weights = np.full((len(lengths), k), np.nan, dtype=np.float32)
    wide_ids[inside], wide_weights[inside] = flat_ids, flat_weights
    return [*plain, wide_ids, wide_weights]


def _pivot(
    columns: Sequence[npt.NDArray[Any]],
    ends: npt.NDArray[np.int64],
    layers: npt.NDArray[np.int64],
    k: int,
) -> TokenBatch:
    """Whole tokens; ends: [tokens or more] the index of each token's last row."""
    request, _, position, layer, phase, ids, weights = columns
    ends = ends[ends < len(request)]
    starts = np.zeros(len(request), dtype=np.int64)
    starts[ends[:-1] + 1] = 1
    token = np.cumsum(starts)
    place = np.searchsorted(layers, layer)
    wide_ids = np.full((len(ends), len(layers), k), -1, dtype=np.int16)
    wide_weights = np.full((len(ends), len(layers), k), np.nan, dtype=np.float32)
    wide_ids[token, place] = ids
    wide_weights[token, place] = weights
    return TokenBatch(
        request[ends].astype(np.int64),
        position[ends].astype(np.int64),
        phase[ends].astype(np.int8),
        wide_ids,
        wide_weights,
    )
