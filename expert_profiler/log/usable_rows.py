# SPDX-License-Identifier: Apache-2.0
"""Decide which rows are counted, for histogram, report, comparison and exports alike.

- A flagged row (recomputed, overrun or rejected) is not part of its request's sequence, or not for
  the first time: it is left out.
- A row in a long run of identical rows is warm-up or padding that was logged as a token: it is left
  out where other rows remain.
- An expert id outside the header's experts, such as the -1 that other recorders put in the place of
  a missing row, is refused by ``RouteLog.counts``: no count could be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb

#: Distinct tokens never route alike this long, bit for bit; padding and warm-up passes do.
SHORTEST_RUN = 64
UNFLAGGED = "NOT flagged"
_IN_NO_RUN = "rowid NOT IN (SELECT row FROM identical_runs)"


@dataclass(frozen=True)
class IdenticalRuns:
    """Rows inside runs of at least ``SHORTEST_RUN`` identical rows: same layer, ids, weights.

    rows: in such runs; share: of all unflagged rows, 0 to 1; longest: rows of the longest run.
    """

    rows: int = 0
    share: float = 0.0
    longest: int = 0
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class UsableRows:
    """Rows to count.

    condition: SQL on ``routes`` that chooses them; flagged, identical: rows left out, by reason.
    """

    condition: str
    flagged: int
    identical: int


def find_identical_runs(db: duckdb.DuckDBPyConnection, num_rows: int) -> IdenticalRuns:
    """Look for long runs in ``routes`` (num_rows unflagged rows), in file order.

    Makes the table ``identical_runs``: the rowid and layer of each row in such a run, and how many
    rows the run has.
    """
    db.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE identical_runs AS
        SELECT row, layer, count(*) OVER (PARTITION BY layer, run) AS size FROM (
          SELECT row, layer, sum(starts::INTEGER) OVER (PARTITION BY layer ORDER BY row) AS run
          FROM (SELECT rowid AS row, layer, route_hash IS DISTINCT FROM
                       lag(route_hash) OVER (PARTITION BY layer ORDER BY rowid) AS starts
                FROM routes WHERE {UNFLAGGED}))
        QUALIFY size >= ?""",  # noqa: S608 (no text from outside)
        [SHORTEST_RUN],
    )
    runs = db.execute(
        "SELECT layer, count(*), max(size) FROM identical_runs GROUP BY layer ORDER BY layer"
    ).fetchall()
    rows = sum(int(size) for _, size, _ in runs)
    longest = max((int(size) for *_, size in runs), default=0)
    share = rows / num_rows if rows else 0.0
    return IdenticalRuns(rows, share, longest, tuple(int(layer) for layer, *_ in runs))


def choose(
    runs: IdenticalRuns, *, num_rows: int, num_flagged: int, include_flagged: bool
) -> UsableRows:
    """Decide which rows to count.

    Args:
        runs: those to leave out; an empty one keeps them.
        num_rows: unflagged rows.
        num_flagged: flagged rows.
        include_flagged: count them too.
    """
    conditions = [] if include_flagged else [UNFLAGGED]
    identical = runs.rows if runs.rows < num_rows else 0
    if identical:
        conditions.append(_IN_NO_RUN)
    left_out = 0 if include_flagged else num_flagged
    return UsableRows(" AND ".join(conditions) or "true", left_out, identical)
