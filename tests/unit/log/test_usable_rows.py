# SPDX-License-Identifier: Apache-2.0
"""One decision which rows are counted, and the reasons of those that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from expert_profiler.errors import UserError
from expert_profiler.log import open_log
from expert_profiler.log.usable_rows import SHORTEST_RUN
from tests.support.logs import Record, meta, route, run_rows, write_log

WARM_UP = [route("w", i, layer, [0, 1], [0.5, 0.25]) for i in range(80) for layer in (0, 1)]
SHORT = [route("v", i, 0, [0, 1], [0.5, 0.125]) for i in range(SHORTEST_RUN - 1)]
FLAGGED = [route("0", 0, 0, [1, 2], flag="recomputed")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "moe_routes.jsonl"


def choices(rows: list[Record]) -> int:
    return sum(len(row["topk_ids"]) for row in rows)


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("identical", [False, True])
def test_rows_are_left_out_for_two_reasons_and_counted_by_reason(
    path: Path, flagged: bool, identical: bool
) -> None:
    true = SHORT + run_rows()
    write_log(path, WARM_UP + true + FLAGGED)
    kept = true + (FLAGGED if flagged else []) + (WARM_UP if identical else [])
    with open_log(path) as log:
        assert log.identical_runs.rows == len(WARM_UP)
        rows = log.usable_rows(include_flagged=flagged, include_identical=identical)
        assert (rows.flagged, rows.identical) == (0 if flagged else 1, 0 if identical else 160)
        found = log.query(f"SELECT count(*) FROM routes WHERE {rows.condition}")  # noqa: S608
        assert found == [(len(kept),)]
        counts = log.counts(include_flagged=flagged, include_identical=identical)
        assert counts.rows.sum() == len(kept)
        assert counts.values.sum() == choices(kept)
        one = log.counts(layer=1, include_flagged=flagged, include_identical=identical)
        assert one.values.sum() == choices([row for row in kept if row["layer"] == 1])


def test_where_nothing_else_is_left_identical_rows_are_counted(path: Path) -> None:
    with open_log(write_log(path, WARM_UP)) as log:
        assert log.usable_rows().identical == 0
        assert log.counts(include_identical=False).rows.sum() == len(WARM_UP)


@pytest.mark.parametrize("identical", [False, True])
def test_an_id_in_the_place_of_a_missing_row_is_refused(path: Path, identical: bool) -> None:
    rows = [*WARM_UP, *run_rows(), route("9", 0, 0, [-1, -1])]
    with (
        open_log(write_log(path, rows, meta())) as log,
        pytest.raises(UserError, match="expert id -1 in layer 0"),
    ):
        log.counts(include_identical=identical)
