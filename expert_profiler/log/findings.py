"""What is found out about a log: counts, runs of identical rows, the row identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import duckdb

PHASES = ("prefill", "decode", "unknown")
# Distinct tokens never route alike this long, bit for bit; padding and warm-up passes do.
CONTAMINATION_RUN = 64


@dataclass(frozen=True)
class Counts:
    """How often each expert was chosen.

    values: [layers, phases, experts] int64; rows: [layers, phases] int64, the rows behind them.
    Expert ids are logical and run from 0 to experts - 1.
    """

    layers: tuple[int, ...]
    phases: tuple[str, ...]
    values: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    @property
    def num_experts(self) -> int:
        return int(self.values.shape[2])

    @property
    def per_expert(self) -> npt.NDArray[np.int64]:
        """[experts] int64: over all layers and phases."""
        total: npt.NDArray[np.int64] = self.values.sum(axis=(0, 1))
        return total

    @property
    def per_phase(self) -> npt.NDArray[np.int64]:
        """[phases, experts] int64: over all layers."""
        total: npt.NDArray[np.int64] = self.values.sum(axis=0)
        return total

    def phase_rows(self) -> dict[str, int]:
        return dict(zip(self.phases, self.rows.sum(axis=0).tolist(), strict=True))


@dataclass(frozen=True)
class Contamination:
    """Rows inside runs of at least ``CONTAMINATION_RUN`` identical rows of one layer."""

    rows: int
    share: float  # of all unflagged rows, 0 to 1
    longest_run: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Identity:
    """The row identity: unique positions a layer = sum(prompt + generated - 1) - cached."""

    expected: int
    cached: int
    requests: int
    per_layer: dict[int, int]
    mismatches: tuple[str, ...]  # one sentence a request whose positions differ

    @property
    def holds(self) -> bool:
        return not self.mismatches and all(n == self.expected for n in self.per_layer.values())


def selection(
    cells: npt.NDArray[np.int64], layers: tuple[int, ...], include_flagged: bool
) -> npt.NDArray[np.int64]:
    """Those of ``cells`` ([n, 3 or more]: layer, phase, flagged, …) that are asked for."""
    mask = np.isin(cells[:, 0], layers)
    return cells[mask if include_flagged else mask & (cells[:, 2] == 0)]


def phase_codes(cells: npt.NDArray[np.int64]) -> list[int]:
    """The phases to show: both known ones whenever one occurs, "unknown" only if it occurs."""
    seen = set(cells[:, 1].tolist())
    return [code for code in (0, 1) if seen & {0, 1}] + ([2] if 2 in seen else [])


def find_contamination(db: duckdb.DuckDBPyConnection, num_rows: int) -> Contamination:
    """Look for long runs in ``routes``; num_rows: unflagged rows."""
    # A run starts where a row differs from the one before it and ends where the next starts.
    runs = db.execute(
        """
        SELECT layer, sum(size), max(size) FROM (
          SELECT layer, lead(i, 1, n + 1) OVER (PARTITION BY layer ORDER BY i) - i AS size
          FROM (SELECT layer, row_number() OVER w AS i, count(*) OVER (PARTITION BY layer) AS n,
                       route_hash IS DISTINCT FROM lag(route_hash) OVER w AS starts
                FROM routes WHERE NOT flagged WINDOW w AS (PARTITION BY layer ORDER BY rowid))
          WHERE starts)
        WHERE size >= ? GROUP BY layer ORDER BY layer""",
        [CONTAMINATION_RUN],
    ).fetchall()
    rows = sum(int(size) for _, size, _ in runs)
    longest = max((int(size) for *_, size in runs), default=0)
    share = rows / num_rows if rows else 0.0
    return Contamination(rows, share, longest, tuple(int(layer) for layer, *_ in runs))


def hold_against(
    db: duckdb.DuckDBPyConnection,
    positions: Mapping[str, int],
    cached: Mapping[str, int],
    layers: Sequence[int],
) -> Identity:
    """Hold ``routes`` against the positions that each request forwarded, and those cached."""
    expected = {req: n - cached.get(req, 0) for req, n in positions.items()}
    found = db.execute(
        "SELECT req_id, min(n), max(n), count(*) FROM (SELECT req_id, layer, "
        "count(DISTINCT token_idx) AS n FROM routes WHERE NOT flagged GROUP BY req_id, layer) "
        "GROUP BY req_id"
    ).fetchall()
    seen = {str(req): (int(low), int(high), int(n)) for req, low, high, n in found}
    # A logger that does not know the requests can still satisfy the sums.
    nothing = (0, 0, 0)
    mismatches = []
    if expected.keys() & seen.keys():
        mismatches = [
            f"request {req}: {_span(*seen.get(req, nothing)[:2])} positions, {want} expected"
            for req, want in expected.items()
            if seen.get(req, nothing) != (want, want, len(layers))
        ]
        strangers = sorted(seen.keys() - expected.keys())
        mismatches += [f"request {req}: not in the outputs" for req in strangers]
    per_layer = db.execute(
        "SELECT layer, count(*) FROM (SELECT DISTINCT req_id, token_idx, layer FROM routes "
        "WHERE NOT flagged) GROUP BY layer"
    ).fetchall()
    return Identity(
        expected=sum(expected.values()),
        cached=sum(cached.get(req, 0) for req in positions),
        requests=len(positions),
        per_layer=dict.fromkeys(layers, 0) | {int(layer): int(n) for layer, n in per_layer},
        mismatches=tuple(mismatches),
    )


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
