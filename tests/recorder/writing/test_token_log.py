# SPDX-License-Identifier: Apache-2.0
"""One recording is one file, from its header to its end record."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.writing.rows import Step, StopRule
from vllm.moe_routes.writing.token_log import TokenLog

from tests.support.build import QUICK, a_layer, a_pending, a_step, clean_routes, read_lines

LAYERS = [a_layer(1), a_layer(3)]
HEADER = {"type": "meta", "model_id": "m", "top_k": 2}


def _open(path: Path) -> TokenLog:
    return TokenLog(path, HEADER, LAYERS, 255)


def _pass(
    *rows: tuple[str, int, int, int],
    seed: int = 0,
    tokens: list[int] | None = None,
    **facts: Any,
) -> Step:
    n = sum(row[2] for row in rows)
    routes = clean_routes(
        LAYERS, n, seed=seed, token_ids=None if tokens is None else np.array(tokens)
    )
    return a_step(rows, pending=a_pending(routes), **facts)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "x.jsonl"


def _of_type(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["type"] == kind]


# ---- header and end ------------------------------------------------------------------------


def test_the_header_is_in_the_file_before_the_first_pass(log: Path) -> None:
    opened = _open(log)  # kept: closing the file would write what waits in it
    (header,) = read_lines(log)
    assert sum(opened.counts.passes) == 0
    assert list(header) == ["type", "model_id", "top_k", "weights_dtype", "start_time"]
    assert {key: header[key] for key in HEADER} == HEADER
    assert datetime.fromisoformat(header["start_time"]).utcoffset() == timedelta(0)


def test_a_recording_without_a_pass_is_a_header_and_an_end(log: Path) -> None:
    _open(log).close("stop")
    header, end = read_lines(log)
    assert (header["type"], end["type"]) == ("meta", "end")
    assert [end[key] for key in ("rows", "rows_flagged", "passes", "requests")] == [0, 0, 0, 0]
    assert end["self_check"]["verdict"] == "pass"


def test_the_end_record_has_the_documented_keys(log: Path) -> None:
    opened = _open(log)
    opened.consume(_pass(("a-00000000", 0, 3, 3)))
    opened.close("shutdown")
    end = read_lines(log)[-1]
    wanted = ["type", "reason", "rows", "rows_flagged", "passes", "requests", "bytes", "drops"]
    assert [key for key in end if key in wanted] == wanted
    assert {"self_check", "end_time"} <= set(end)
    assert end["reason"] == "shutdown"
    assert set(end["drops"]) >= {"queue_full"}
    assert {*end["self_check"]} == {"verdict", "checks"}
    assert all({*c} == {"name", "verdict", "detail"} for c in end["self_check"]["checks"])


@QUICK
@given(sizes=st.lists(st.integers(1, 5), max_size=6))
def test_the_figures_of_the_end_record_are_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    log = tmp_path_factory.mktemp("log") / "x.jsonl"
    opened = _open(log)
    for i, n in enumerate(sizes):
        done = [f"{i - 1}-{i - 1:08x}"] if i else []
        rows = [(f"{i}-{i:08x}", 0, n, n), ("both-ffffffff", i, 1, 2)]
        opened.consume(_pass(*rows, seed=i, forward_pass_id=i, finished=done))
    opened.close("stop")
    lines = read_lines(log)
    end = lines[-1]
    assert [line["type"] for line in lines].index("end") == len(lines) - 1
    assert [line["type"] for line in lines].count("meta") == 1
    assert end["rows"] == len(_of_type(lines, "route")) == (sum(sizes) + len(sizes)) * len(LAYERS)
    assert end["requests"] == len(_of_type(lines, "request")) == len(sizes) + bool(sizes)
    assert end["passes"] == len(sizes)
    data = log.read_bytes()
    assert end["bytes"] == len(data) - len(data.splitlines(keepends=True)[-1])


def test_flagged_rows_are_in_the_file_and_in_the_figures(log: Path) -> None:
    opened = _open(log)
    rule = {"a-00000000": StopRule(frozenset({9}), 0)}
    opened.consume(_pass(("a-00000000", 0, 3, 3), tokens=[1, 2, 3], new=rule))
    opened.consume(_pass(("a-00000000", 0, 3, 3), tokens=[1, 2, 3], new={}))
    opened.consume(_pass(("a-00000000", 3, 1, 3), tokens=[9], new={}))
    opened.close("stop")
    lines = read_lines(log)
    flags = [line.get("flag") for line in _of_type(lines, "route") if line["layer"] == 3]
    assert flags == [None] * 3 + ["recomputed"] * 3 + ["overrun"]
    assert lines[-1]["rows"] == 7 * 2
    assert lines[-1]["rows_flagged"] == 4 * 2
    (request,) = _of_type(lines, "request")
    assert (request["positions"], request["rows_flagged"]) == (3, 4)


# ---- requests ------------------------------------------------------------------------------


def test_a_request_is_summed_up_when_it_ends_before_the_rows_of_the_next_pass(log: Path) -> None:
    opened = _open(log)
    opened.consume(_pass(("7-0000000a", 0, 3, 3)))
    opened.consume(_pass(("8-0000000b", 0, 1, 1), finished=["7-0000000a"], forward_pass_id=1))
    opened.flush()
    lines = read_lines(log)
    assert [line["type"] for line in lines] == ["meta"] + ["route"] * 6 + ["request"] + [
        "route"
    ] * 2
    assert lines[7] == {
        "type": "request",
        "req_id": "7",
        "raw_id": "7-0000000a",
        "num_prompt_tokens": 3,
        "cached_tokens": 0,
        "missed_tokens": 0,
        "positions": 3,
        "rows_flagged": 0,
        "rows_dropped": 0,
        "finished": True,
    }


def test_a_request_still_running_at_the_end_is_summed_up_and_says_so(log: Path) -> None:
    opened = _open(log)
    opened.consume(_pass(("7-0000000a", 0, 3, 5)))
    opened.close("stop")
    *_, request, end = read_lines(log)
    assert (request["type"], request["finished"], request["positions"]) == ("request", False, 3)
    assert end["requests"] == 1


def test_a_step_without_a_pass_only_ends_requests(log: Path) -> None:
    opened = _open(log)
    opened.consume(_pass(("7-0000000a", 0, 3, 3)))
    opened.consume(a_step(finished=["7-0000000a"], forward_pass_id=-1))
    opened.close("stop")
    lines = read_lines(log)
    assert [line["finished"] for line in _of_type(lines, "request")] == [True]
    assert lines[-1]["passes"] == 1


def test_cached_and_missed_tokens_reach_request_and_end(log: Path) -> None:
    opened = _open(log)
    rows = [("new-00000001", 4, 1, 5), ("old-00000002", 7, 1, 3)]
    opened.consume(_pass(*rows, new={"new-00000001": None}))
    opened.close("stop")
    lines = read_lines(log)
    told = {
        r["req_id"]: (r["cached_tokens"], r["missed_tokens"]) for r in _of_type(lines, "request")
    }
    assert told == {"new": (4, 0), "old": (0, 7)}
    assert (lines[-1]["cached_tokens"], lines[-1]["missed_tokens"]) == (4, 7)


# ---- nothing is lost silently --------------------------------------------------------------


def test_a_dropped_pass_is_counted_row_by_row_and_fails_the_verdict(log: Path) -> None:
    opened = _open(log)
    opened.consume(a_step([("a-00000000", 0, 3, 3)]))
    opened.consume(_pass(("a-00000000", 3, 1, 3), new={}, forward_pass_id=1))
    opened.close("stop")
    lines = read_lines(log)
    end = lines[-1]
    assert end["drops"]["queue_full"] == 3 * len(LAYERS)
    assert end["self_check"]["verdict"] == "fail"
    assert end["passes"] == 1
    assert [line["token_idx"] for line in _of_type(lines, "route")] == [3, 3]


def test_positions_of_a_request_are_its_unflagged_rows_in_the_file_even_after_a_drop(
    log: Path,
) -> None:
    opened = _open(log)
    opened.consume(a_step([("a-00000000", 0, 3, 3)]))
    opened.consume(_pass(("a-00000000", 3, 1, 3), new={}, forward_pass_id=1))
    opened.close("stop")
    lines = read_lines(log)
    rows = [line for line in _of_type(lines, "route") if line["layer"] == 1]
    (request,) = _of_type(lines, "request")
    assert request["positions"] == len(rows) == 1


def test_a_layer_that_did_not_fire_is_left_out_counted_and_named(log: Path) -> None:
    opened = _open(log)
    routes = clean_routes(LAYERS, 2)
    routes.topk_ids[:, 1] = 255
    opened.consume(a_step([("a-00000000", 0, 2, 2)], pending=a_pending(routes)))
    opened.close("stop")
    lines = read_lines(log)
    assert [line["layer"] for line in _of_type(lines, "route")] == [1, 1]
    assert lines[-1]["rows"] == 2
    assert lines[-1]["drops"]["not_captured"] == 2
    failed = [c for c in lines[-1]["self_check"]["checks"] if c["verdict"] == "fail"]
    assert failed[0]["detail"] == "2 rows, in layers 3"


def test_steps_that_come_too_late_are_counted(log: Path) -> None:
    opened = _open(log)
    opened.lose(_pass(("a-00000000", 0, 3, 3)))
    opened.lose(a_step(finished=["a-00000000"]))
    assert opened.counters()["drops"]["write_error"] == 3 * len(LAYERS)


def test_giving_up_keeps_what_was_written_and_writes_no_end(log: Path) -> None:
    opened = _open(log)
    opened.consume(_pass(("a-00000000", 0, 3, 3)))
    opened.abandon()
    lines = read_lines(log)
    assert [line["type"] for line in lines] == ["meta"] + ["route"] * 6


def test_rows_are_readable_after_a_flush(log: Path) -> None:
    opened = _open(log)
    opened.consume(_pass(("a-00000000", 0, 3, 3)))
    opened.flush()
    assert len(_of_type(read_lines(log), "route")) == 6


# ---- the file ------------------------------------------------------------------------------


def _refused(path: Path) -> str:
    with pytest.raises(RouteLogError) as caught:
        _open(path)
    message = str(caught.value)
    assert str(path) in message
    assert "VLLM_LOG_MOE" in message
    assert "\n" not in message
    return message


def test_an_existing_file_is_refused_and_left_alone(log: Path) -> None:
    log.write_text("precious")
    assert "exists" in _refused(log)
    assert log.read_text() == "precious"


def test_a_link_is_not_followed(log: Path, tmp_path: Path) -> None:
    log.symlink_to(tmp_path / "elsewhere.jsonl")
    assert "exists" in _refused(log)
    assert not (tmp_path / "elsewhere.jsonl").exists()


def test_a_directory_is_refused(log: Path) -> None:
    log.mkdir()
    assert "exists" in _refused(log)


def test_a_missing_folder_is_refused_and_not_made(tmp_path: Path) -> None:
    assert "No such file or directory" in _refused(tmp_path / "missing" / "x.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder where nobody may write")
def test_an_unwritable_folder_is_refused() -> None:
    assert "can't be created" in _refused(Path("/proc/x.jsonl"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in _refused(tmp_path / "x.jsonl")
    tmp_path.chmod(0o700)


def test_a_header_that_cannot_be_encoded_leaves_no_file(log: Path) -> None:
    with pytest.raises(TypeError):
        TokenLog(log, {"type": "meta", "what": object()}, LAYERS, 255)
    assert not log.exists()


def test_a_child_process_does_not_inherit_the_file(log: Path) -> None:
    opened = _open(log)
    assert not os.get_inheritable(opened._file._file.fileno())
