# SPDX-License-Identifier: Apache-2.0
"""The counting pass agrees with plain loops, however the rows are cut into batches."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_profiler.log.row_counts import RowBatch, RowCounts

QUICK = settings(max_examples=80, deadline=None, derandomize=True, database=None)
# request, position, layer, phase, flagged, ids
Row = tuple[str, int, int, int, bool, tuple[int, ...]]


def batches(rows: Sequence[Row], cuts: Sequence[int], dtype: type) -> list[RowBatch]:
    found = []
    edges = [0, *sorted(cut for cut in cuts if cut < len(rows)), len(rows)]
    for low, high in itertools.pairwise(edges):
        part = rows[low:high]
        if not part:
            continue
        names = list(dict.fromkeys(row[0] for row in part))
        lengths = np.array([len(row[5]) for row in part])
        same = len(set(lengths.tolist())) == 1
        found.append(
            RowBatch(
                names,
                np.array([names.index(row[0]) for row in part], dtype=np.int32),
                np.array([row[1] for row in part], dtype=np.int64),
                np.array([row[2] for row in part], dtype=np.int32),
                np.array([row[3] for row in part], dtype=np.uint8),
                np.array([row[4] for row in part], dtype=bool),
                int(lengths[0]) if same else lengths,
                np.array([x for row in part for x in row[5]], dtype=dtype),
            )
        )
    return found


def counted(rows: Sequence[Row], cuts: Sequence[int] = (), dtype: type = np.int32) -> RowCounts:
    counts = RowCounts()
    for batch in batches(rows, cuts, dtype):
        counts.add(batch)
    return counts


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "\u2713"]),
        st.integers(0, 4),
        st.sampled_from([0, 1, 5, 70, 70_000, -3]),
        st.integers(0, 2),
        st.sampled_from([False, False, True]),
        st.lists(st.sampled_from([0, 1, 2, 255]), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=40,
)
CUTS = st.lists(st.integers(1, 40), max_size=4)


@QUICK
@given(rows=ROWS, cuts=CUTS, narrow=st.booleans())
def test_cells_equal_a_naive_count(rows: list[Row], cuts: list[int], narrow: bool) -> None:
    counts = counted(rows, cuts, np.uint8 if narrow else np.int32)
    choices: Counter[tuple[int, ...]] = Counter()
    lines: Counter[tuple[int, ...]] = Counter()
    for _, _, layer, phase, flagged, ids in rows:
        lines[layer, phase, int(flagged)] += 1
        choices.update((layer, phase, int(flagged), x) for x in ids)
    assert [tuple(cell) for cell in counts.cells.tolist()] == sorted(
        (*key, n) for key, n in choices.items()
    )
    assert [tuple(cell) for cell in counts.cell_rows.tolist()] == sorted(
        (*key, n) for key, n in lines.items()
    )
    assert counts.requests == len({row[0] for row in rows})


@QUICK
@given(rows=ROWS, cuts=CUTS)
def test_the_longest_run_equals_a_plain_loop(rows: list[Row], cuts: list[int]) -> None:
    by_layer = defaultdict(list)
    for _, _, layer, _, flagged, ids in rows:
        if not flagged:
            by_layer[layer].append(ids)
    longest = 0
    for routes in by_layer.values():
        run, before = 0, None
        for ids in routes:
            run = run + 1 if ids == before else 1
            before = ids
            longest = max(longest, run)
    assert counted(rows, cuts).longest_run == longest


@QUICK
@given(rows=ROWS, cuts=CUTS)
def test_surely_no_duplicates_is_never_said_of_a_log_with_some(
    rows: list[Row], cuts: list[int]
) -> None:
    keys = [row[:3] for row in rows if not row[4]]
    if len(keys) != len(set(keys)):
        assert not counted(rows, cuts).surely_no_duplicates


@QUICK
@given(
    firsts=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
    cuts=CUTS,
)
def test_surely_no_duplicates_is_said_of_every_whole_log(
    firsts: list[int], sizes: list[int], seed: int, cuts: list[int]
) -> None:
    rows: list[Row] = [
        (str(req), first + i, layer, 0, False, (1, 2))
        for req, first in enumerate(firsts)
        for i in range(sizes[req])
        for layer in (0, 3, 9)
    ]
    np.random.default_rng(seed).shuffle(rows)  # type: ignore[arg-type]
    assert counted(rows, cuts).surely_no_duplicates
    again = [*rows, rows[seed % len(rows)]]
    assert not counted(again, cuts).surely_no_duplicates
    # As many rows as before: one twice, another nowhere.
    replaced = [*rows[1:], rows[-1]]
    assert len(rows) == 1 or not counted(replaced, cuts).surely_no_duplicates


def test_ids_that_no_expert_has_are_counted_too() -> None:
    rows: list[Row] = [("a", 0, 0, 0, False, (-1, 3, 1 << 20)), ("a", 1, 0, 0, False, (-1, 3, 4))]
    found = counted(rows).cells.tolist()
    assert found == [[0, 0, 0, -1, 2], [0, 0, 0, 3, 2], [0, 0, 0, 4, 1], [0, 0, 0, 1 << 20, 1]]


def test_rows_without_ids_count_as_rows() -> None:
    counts = counted([("a", 0, 0, 0, False, ()), ("a", 1, 0, 0, False, ())])
    assert counts.cells.tolist() == []
    assert counts.cell_rows.tolist() == [[0, 0, 0, 2]]
    assert counts.longest_run == 2


def test_a_position_beyond_every_model_is_left_to_the_exact_check() -> None:
    rows: list[Row] = [("a", 1 << 40, 0, 0, False, (1,))]
    assert not counted(rows).surely_no_duplicates
