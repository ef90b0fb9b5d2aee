# SPDX-License-Identifier: Apache-2.0
"""Reading logs: true counts of good ones, one helpful line for each kind of bad one."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_profiler.errors import UserError
from expert_profiler.log import open_log, row_identity
from expert_profiler.log.usable_rows import SHORTEST_RUN, IdenticalRuns
from tests.support.logs import (
    Record,
    meta,
    route,
    run_rows,
    write_log,
    write_outputs,
    write_public_log,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "moe_routes.jsonl"


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught, open_log(path):
        pass
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- good logs ---------------------------------------------------------------------------------


def test_a_sound_log_has_nothing_to_note(path: Path) -> None:
    with open_log(write_log(path, run_rows())) as log:
        assert log.notes == []
        assert not log.is_public_logger
        assert log.end is not None
        assert (log.num_rows, log.requests, log.layers, log.num_experts) == (24, 2, (0, 1), 8)
        assert log.counts().phase_rows() == {"prefill": 10, "decode": 14}


ROWS = st.lists(
    st.builds(
        route,
        req_id=st.sampled_from(["0", "a-b", "\u2713"]),
        token_idx=st.integers(0, 5),
        layer=st.sampled_from([0, 1, 7]),
        topk_ids=st.permutations(range(8)).map(lambda ids: ids[:2]),
        phase=st.sampled_from(["prefill", "decode"]),
    ).flatmap(
        lambda row: st.sampled_from([row, row, row | {"flag": "recomputed"}, row | {"flag": None}])
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=25, deadline=None)
@given(rows=ROWS)
def test_counts_equal_a_naive_count(rows: list[Record], tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("log") / "moe_routes.jsonl"
    with open_log(write_log(path, rows, meta(layers=(0, 1, 7)))) as log:
        for include in (False, True):
            naive: Counter[tuple[int, str, int]] = Counter()
            for row in rows:
                if include or row.get("flag") is None:
                    naive.update((row["layer"], row["phase"], id_) for id_ in row["topk_ids"])
            counts = log.counts(include_flagged=include)
            found = {
                (counts.layers[i], counts.phases[j], int(k)): int(counts.values[i, j, k])
                for i, j, k in zip(*np.nonzero(counts.values), strict=True)
            }
            assert found == naive
            assert counts.values.sum() == counts.rows.sum() * 2
        keys = [
            (row["req_id"], row["token_idx"], row["layer"])
            for row in rows
            if row.get("flag") is None
        ]
        assert log.duplicates == len(keys) - len(set(keys))
        assert log.num_rows == len(keys)
        assert log.rows_flagged == len(rows) - len(keys)


def test_one_layer_can_be_counted_alone(path: Path) -> None:
    rows = [route("0", 0, 0, [1, 2]), route("0", 0, 1, [3, 4])]
    with open_log(write_log(path, rows)) as log:
        counts = log.counts(layer=1)
        assert counts.layers == (1,)
        assert np.flatnonzero(counts.per_expert).tolist() == [3, 4]


def test_an_unknown_layer_lists_those_there_are(path: Path) -> None:
    header = meta(layers=(0, 1, 2, 5))
    with (
        open_log(write_log(path, run_rows(layers=(0, 1, 2, 5)), header)) as log,
        pytest.raises(UserError, match=r"no layer 3; choose --layer from: 0-2, 5"),
    ):
        log.counts(layer=3)


def test_marked_rows_are_left_out_and_noted(path: Path) -> None:
    rows = [route("0", 0, 0, [1, 2]), route("0", 0, 0, [3, 4], flag="recomputed")]
    with open_log(write_log(path, rows)) as log:
        assert log.counts().per_expert.sum() == 2
        assert log.counts(include_flagged=True).per_expert.sum() == 4
        assert log.duplicates == 0
        assert "1 marked rows" in log.notes[0]


def test_a_public_loggers_log_is_read_and_says_what_it_lacks(path: Path) -> None:
    with open_log(write_public_log(path, run_rows())) as log:
        assert log.is_public_logger
        assert log.counts().phases == ("unknown",)
        assert log.num_experts == 8
        assert log.lost_rows == []
        assert any("8 assumed" in note for note in log.notes)
        assert any("no end record" in note for note in log.notes)


def test_the_files_of_all_ranks_are_one_log(tmp_path: Path) -> None:
    names = ["moe_routes.jsonl", "moe_routes.pp1.jsonl"]
    for layer, name in enumerate(names):
        header = meta(layers=(layer,), files=names)
        write_log(tmp_path / name, run_rows(layers=(layer,)), header)
    with open_log(tmp_path / names[0]) as log:
        assert log.layers == (0, 1)
        assert log.num_rows == 24
        assert log.end is not None
        assert log.end.rows == 24
        assert log.notes == []


def test_a_missing_file_of_another_rank_is_named(tmp_path: Path) -> None:
    header = meta(files=["moe_routes.jsonl", "moe_routes.pp1.jsonl"])
    path = write_log(tmp_path / "moe_routes.jsonl", run_rows(), header)
    assert "moe_routes.pp1.jsonl is missing" in error_of(path)


def test_a_sibling_outside_the_folder_is_refused(path: Path) -> None:
    header = meta(files=["moe_routes.jsonl", "../elsewhere.jsonl"])
    assert "plain file names" in error_of(write_log(path, run_rows(), header))


def test_one_rank_cut_short_means_the_run_was(tmp_path: Path) -> None:
    names = ["moe_routes.jsonl", "moe_routes.pp1.jsonl"]
    for layer, name in enumerate(names):
        header = meta(layers=(layer,), files=names)
        write_log(tmp_path / name, run_rows(layers=(layer,)), header, finished=layer == 0)
    with open_log(tmp_path / names[0]) as log:
        assert log.end is None
        assert log.lost_rows == ["moe_routes.pp1.jsonl has no end record: the run was cut short"]


@pytest.mark.parametrize("name", ["renamed.jsonl", "it's.jsonl", "run[1]*?.jsonl", "log.jsonl.gz"])
def test_any_file_name_is_read_as_it_stands(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "key=value [x]"
    folder.mkdir()
    with open_log(write_log(folder / name, run_rows())) as log:
        assert log.num_rows == 24


def test_a_log_of_many_blocks_is_read_whole_and_in_order(path: Path) -> None:
    rows = [route("0", i, 0, [i % 8, (i + 1) % 8], [0.5, i + 0.25]) for i in range(250_000)]
    with open_log(write_log(path, rows, meta(layers=(0,)))) as log:
        assert log.num_rows == len(rows)
        ordered = log.query(
            "SELECT count(*) FROM (SELECT token_idx - lag(token_idx) OVER (ORDER BY rowid) AS step "
            "FROM routes) WHERE step = 1"
        )
        assert ordered == [(len(rows) - 1,)]


def test_progress_ends_at_100(path: Path) -> None:
    seen: list[float] = []
    with open_log(write_log(path, run_rows()), on_progress=seen.append):
        pass
    assert seen[-1] == 100


def test_no_scratch_folder_is_left_behind(path: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with open_log(write_log(path, run_rows())):
        assert list(scratch.iterdir())
    assert not list(scratch.iterdir())


# ---- findings ----------------------------------------------------------------------------------


def test_a_log_without_end_was_cut_short(path: Path) -> None:
    with open_log(write_log(path, run_rows(), finished=False)) as log:
        assert log.end is None
        assert log.lost_rows == ["moe_routes.jsonl has no end record: the run was cut short"]
        assert log.num_rows == 24


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_an_unfinished_last_line_is_left_out_and_said(path: Path, cut: int) -> None:
    write_log(path, run_rows(), finished=False)
    whole = path.read_bytes()
    last = len(whole.splitlines()[-1])
    path.write_bytes(whole[: -cut - 1])
    with open_log(path) as log:
        assert log.num_rows == 23
        assert f"{last - cut} bytes left out" in log.lost_rows[0]


def test_zeros_that_a_crashed_machine_left_at_the_end_are_left_out(path: Path) -> None:
    write_log(path, run_rows(), finished=False)
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    with open_log(path) as log:
        assert log.num_rows == 24
        assert "512 bytes left out" in log.lost_rows[0]


def test_a_last_line_that_only_lacks_its_newline_counts(path: Path) -> None:
    write_log(path, run_rows())
    path.write_bytes(path.read_bytes()[:-1])
    with open_log(path) as log:
        assert log.end is not None
        assert log.notes == []


def test_drops_and_a_failed_self_check_are_loud(path: Path) -> None:
    check = {
        "verdict": "fail",
        "checks": [{"name": "ids", "verdict": "fail", "detail": "layer 3 never fired"}],
    }
    end = {"drops": {"queue_full": 7, "closed": 0}, "self_check": check}
    with open_log(write_log(path, run_rows(), end=end)) as log:
        assert log.lost_rows == [
            "the recorder dropped rows: 7 queue_full",
            "the recorder's self-check failed: ids: layer 3 never fired",
        ]


def test_an_end_record_with_another_row_count_is_a_finding(path: Path) -> None:
    with open_log(write_log(path, run_rows(), end={"rows": 25})) as log:
        assert log.lost_rows == ["the end record says 25 rows, the log holds 24"]


def test_duplicates_are_counted_and_noted(path: Path) -> None:
    rows = run_rows()
    with open_log(write_log(path, rows + rows[:3])) as log:
        assert log.duplicates == 3
        assert any("3 rows repeat" in note for note in log.notes)


def runs_of(path: Path, rows: list[Record]) -> IdenticalRuns:
    with open_log(write_log(path, rows)) as log:
        return log.identical_runs


def naive_rows_in_runs(rows: list[Record]) -> int:
    """Rows in long runs, counted layer by layer with a plain loop."""
    found = 0
    for layer in {row["layer"] for row in rows}:
        run, before = 0, None
        for row in [row for row in rows if row["layer"] == layer] + [None]:
            this = row and (row["topk_ids"], row["topk_weights"])
            if this is not None and this == before:
                run += 1
                continue
            if run >= SHORTEST_RUN:
                found += run
            run, before = 1, this
    return found


def test_the_known_public_fault_is_found(path: Path) -> None:
    warm_up = [route("w", i, 0, [0, 1], [0.5, 0.25]) for i in range(16_640)]
    true = [route("t", i, 0, [i % 8, (i + 1) % 8], [0.5, i / 8192]) for i in range(4_384)]
    found = runs_of(path, warm_up + true)
    assert (found.rows, found.longest, found.layers) == (16_640, 16_640, (0,))
    assert found.share == pytest.approx(16_640 / 21_024)
    with open_log(path) as log:
        assert "16,640 of 21,024 rows (79.1%)" in log.suspicions[0]


@pytest.mark.parametrize(("length", "hit"), [(SHORTEST_RUN - 1, 0), (SHORTEST_RUN, 1)])
def test_the_shortest_run_that_counts(path: Path, length: int, hit: int) -> None:
    rows = [route("0", i, 1, [3, 4]) for i in range(length)]
    assert runs_of(path, rows + run_rows()).rows == hit * length


def test_interleaved_layers_do_not_hide_a_run(path: Path) -> None:
    rows = [route("0", i, layer, [layer, 4]) for i in range(100) for layer in (0, 1)]
    found = runs_of(path, rows)
    assert (found.rows, found.layers) == (200, (0, 1))


def test_the_same_experts_with_other_weights_are_no_warm_up(path: Path) -> None:
    rows = [route("0", i, 0, [3, 4], [0.5, i / 1000]) for i in range(200)]
    assert runs_of(path, rows).rows == 0


@settings(max_examples=20, deadline=None)
@given(
    runs=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 2), st.sampled_from([1, 2, 40, 63, 64, 90])),
        min_size=1,
        max_size=8,
    )
)
def test_identical_runs_equal_a_plain_loop(runs, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    rows = [
        route("0", i, layer, [value, 7]) for layer, value, length in runs for i in range(length)
    ]
    path = tmp_path_factory.mktemp("log") / "moe_routes.jsonl"
    assert runs_of(path, rows).rows == naive_rows_in_runs(rows)


# ---- the row identity --------------------------------------------------------------------------


def test_the_row_identity_holds_for_a_sound_run(path: Path, tmp_path: Path) -> None:
    outputs = write_outputs(tmp_path / "outputs.jsonl")
    with open_log(write_log(path, run_rows())) as log:
        identity = row_identity.identity_of(log, outputs)
    assert identity.holds
    assert identity.expected == (3 + 4 - 1) + (2 + 5 - 1)
    assert identity.per_layer == {0: 12, 1: 12}


def test_cached_positions_are_not_expected(path: Path, tmp_path: Path) -> None:
    outputs = write_outputs(tmp_path / "outputs.jsonl")
    rows = [row for row in run_rows() if row["req_id"] != "0" or row["token_idx"] >= 2]
    rows.append({"type": "request", "req_id": "0", "num_prompt_tokens": 3, "cached_tokens": 2})
    with open_log(write_log(path, rows)) as log:
        identity = row_identity.identity_of(log, outputs)
    assert (identity.holds, identity.expected, identity.cached) == (True, 10, 2)


def test_a_row_gone_in_one_layer_names_the_request(path: Path, tmp_path: Path) -> None:
    outputs = write_outputs(tmp_path / "outputs.jsonl")
    with open_log(write_log(path, run_rows()[:-1])) as log:
        identity = row_identity.identity_of(log, outputs)
    assert not identity.holds
    assert identity.per_layer == {0: 12, 1: 11}
    assert identity.mismatches == ("request 1: 5 to 6 positions, 6 expected",)


def test_sums_that_agree_by_chance_do_not_satisfy_the_identity(path: Path, tmp_path: Path) -> None:
    outputs = write_outputs(tmp_path / "outputs.jsonl", [(3, 3), (2, 6)])
    with open_log(write_log(path, run_rows())) as log:
        identity = row_identity.identity_of(log, outputs)
    assert identity.expected == 12
    assert not identity.holds


def test_a_request_that_the_outputs_lack_breaks_the_identity(path: Path, tmp_path: Path) -> None:
    outputs = write_outputs(tmp_path / "outputs.jsonl", [(3, 4)])
    with open_log(write_log(path, run_rows())) as log:
        assert "request 1: not in the outputs" in row_identity.identity_of(log, outputs).mismatches


def test_malformed_outputs_are_named_with_their_line(path: Path, tmp_path: Path) -> None:
    outputs = write_outputs(tmp_path / "outputs.jsonl")
    with outputs.open("a") as file:
        file.write('{"req_id": "2"}\n')
    with (
        open_log(write_log(path, run_rows())) as log,
        pytest.raises(UserError, match=r"outputs\.jsonl, line 3: no 'prompt_token_ids'"),
    ):
        row_identity.identity_of(log, outputs)


# ---- bad input ---------------------------------------------------------------------------------


def test_a_missing_log_says_how_to_make_one(path: Path) -> None:
    assert error_of(path) == (f"no log at {path}; make one with: ./test.sh, or name yours")


def test_a_directory_is_no_log(tmp_path: Path) -> None:
    assert "is a directory" in error_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_no_log(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "is empty" in error_of(path)


def test_a_gzip_file_says_how_to_unpack_it(path: Path) -> None:
    write_log(path, run_rows())
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert f"gunzip -k {path}" in error_of(path)


@pytest.mark.parametrize("content", [b"PAR1\x15\x04", b"\x7fELF\0\0", b"\x28\xb5\x2f\xfd"])
def test_a_binary_file_is_no_log(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "binary file" in error_of(path)


@pytest.mark.parametrize(
    ("first", "fact"),
    [
        (b"hello\n", "line 1: not valid JSON"),
        (b"\xff\xfe\n", "line 1: not valid JSON"),
        (b"[1]\n", "line 1: the header"),
        (json.dumps(route("0", 0, 0, [1])).encode() + b"\n", 'line 1: the header ("type": "meta")'),
        (b'{"type": "meta", "top_k": "four"}\n', "line 1: malformed header: top_k"),
        (b'{"type": "meta", "layers_logged": 3}\n', "line 1: malformed header: layers_logged"),
        (b'{"type": "meta", "mod', "line 1: not valid JSON"),
    ],
)
def test_the_first_line_must_be_the_header(path: Path, first: bytes, fact: str) -> None:
    path.write_bytes(first)
    assert fact in error_of(path)


def test_a_log_without_routes_is_refused(path: Path) -> None:
    assert "no route rows" in error_of(write_log(path, []))


BROKEN_LINES = [
    b'{"type": "route", "req_id": "0", "tok',
    b"not JSON",
    b"[1, 2]",
    b'{"no": "type"}',
    b'{"type": "unheard of"}',
    b'{"type": "route", "req_id": "0", "token_idx": 0, "layer": 0, "topk_weights": [1]}',
    b'{"type": "route", "req_id": "0", "token_idx": 0, "layer": "x", "topk_ids": [1], '
    b'"topk_weights": [1]}',
    b'{"type": "route", "req_id": "0", "token_idx": 0, "layer": 0, "topk_ids": [1, null], '
    b'"topk_weights": [1, 1]}',
    b"\0\0\0",
]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("broken", BROKEN_LINES)
def test_a_malformed_line_is_named(path: Path, broken: bytes, finished: bool) -> None:
    lines = write_log(path, run_rows(), finished=finished).read_bytes().splitlines()
    lines.insert(10, broken)
    path.write_bytes(b"\n".join(lines) + b"\n")
    message = error_of(path)
    assert re.search(r"line 11: not (valid JSON|a valid record)", message)
    assert "./test.sh" in message


def test_a_malformed_line_is_found_even_when_the_last_is_unfinished(path: Path) -> None:
    lines = write_log(path, run_rows(), finished=False).read_bytes().splitlines()
    lines.insert(10, b"broken")
    path.write_bytes(b"\n".join(lines)[:-20])
    assert "line 11: not valid JSON" in error_of(path)


def test_a_malformed_last_line_with_a_newline_is_no_truncation(path: Path) -> None:
    write_log(path, run_rows(), finished=False)
    path.write_bytes(path.read_bytes() + b'{"type": "rou\n')
    assert "line 26: not valid JSON" in error_of(path)


def test_a_malformed_end_record_is_named(path: Path) -> None:
    assert "malformed end record" in error_of(write_log(path, run_rows(), end={"rows": None}))


def test_an_id_beyond_the_headers_experts_is_named(path: Path) -> None:
    rows = [*run_rows(), route("0", 9, 1, [8, 1])]
    with (
        open_log(write_log(path, rows)) as log,
        pytest.raises(UserError, match=r"expert id 8 in layer 1, but the header says 8 experts"),
    ):
        log.counts()
