# SPDX-License-Identifier: Apache-2.0
"""The fault table: what the tests observed, and that nothing is missing from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from expert_profiler.log import open_log

#: The long form: more kills, more rows, more examples.
FULL = os.environ.get("FAULTS_FULL") == "1"


class Row(NamedTuple):
    """What one kind of fault did to rows; every figure is a sum over ``times`` faults.

    Attributes:
        fault: what was done.
        times: how often.
        executed: rows the engine executed while a recording was on.
        written: rows the recorder says are in the file.
        readable: rows that a reader found in it.
        lost: rows the recorder, or its file's missing end, reports as lost.
        left_out: rows left out on purpose: not sampled, or past a bound.
    """

    fault: str
    times: int
    executed: int
    written: int
    readable: int
    lost: int
    left_out: int = 0


TABLE: list[Row] = []


def note(row: Row) -> None:
    """Add a row to the table, which must add up."""
    assert row.written == row.readable, f"the file holds other rows than it says: {row}"
    assert row.executed == row.written + row.lost + row.left_out, f"unreported rows: {row}"
    TABLE.append(row)


def as_lines() -> list[str]:
    """The table, as Markdown."""
    sums: dict[str, Row] = {}
    for row in TABLE:
        old = sums.get(row.fault)
        figures = row[1:] if old is None else [a + b for a, b in zip(old[1:], row[1:], strict=True)]
        sums[row.fault] = Row(row.fault, *figures)
    lines = [
        "| fault | times | rows executed | written | readable | reported lost | left out |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sums.values():
        lines.append(f"| {row.fault} | " + " | ".join(f"{n:,}" for n in row[1:]) + " |")
    total = [sum(column) for column in list(zip(*sums.values(), strict=True))[1:]]
    lines.append("| **all** | " + " | ".join(f"{n:,}" for n in total) + " |")
    return lines


def routes_in(path: Path) -> int:
    """Whole route lines of a log, counted with nothing but ``json``."""
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    return sum(json.loads(line)["type"] == "route" for line in lines)


def end_of(path: Path) -> dict[str, Any] | None:
    """The end record of a log; None where there is none."""
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    last: dict[str, Any] = json.loads(lines[-1])
    return last if last["type"] == "end" else None


def check_cut(log: Path, flushed: int, layers: int) -> int:
    """What a killed recorder leaves: what was flushed, whole tokens, and a named cut.

    Every row that was flushed is there, and at most one pass is torn.

    Args:
        log: what it leaves.
        flushed: rows that were flushed, at least.
        layers: rows a token.

    Returns:
        Rows it holds.
    """
    held = routes_in(log)
    assert held >= flushed
    assert end_of(log) is None
    with open_log(log) as found:
        assert any("cut short" in text for text in found.lost_rows)
        assert found.num_rows + found.rows_flagged == held
        [(torn,)] = found.query(
            "SELECT count(DISTINCT forward_pass_id) FROM (SELECT forward_pass_id, req_id, "
            "token_idx FROM routes GROUP BY ALL HAVING count(*) <> ?)",
            [layers],
        )
        assert torn <= 1
    return held


def lost(totals: dict[str, Any]) -> int:
    """Rows that an end record or a status reports as lost."""
    return int(sum(totals["drops"].values()))


def left_out(totals: dict[str, Any]) -> int:
    """Rows that it reports as left out on purpose."""
    return int(totals["rows_skipped"] + totals.get("rows_past_end", 0))
