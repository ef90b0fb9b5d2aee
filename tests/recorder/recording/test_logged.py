# SPDX-License-Identifier: Apache-2.0
"""Recordings with a log: waiting for it, who may start, what is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.build import read_lines
from tests.support.commands import Arm, begin, do

pytestmark = pytest.mark.timeout(60)


def test_nothing_starts_while_the_recording_before_is_being_written(
    arm: Arm, tmp_path: Path
) -> None:
    runner = arm()
    begin(runner, "per_token", tmp_path)
    runner.execute(("7-0000000a", 3, 3))
    gate = threading.Event()
    sink = runner.moe_routes._recording._log  # type: ignore[union-attr]
    close = sink.close
    sink.close = lambda reason: (gate.wait(30), close(reason))  # a slow disk
    status = do(runner, "stop", timeout=0)
    assert status["ok"] and status["closing"] and not status["recording"]
    refused = do(runner, "start", path=str(tmp_path / "y.jsonl"))
    assert (refused["ok"], refused["conflict"]) == (False, True)
    assert not (tmp_path / "y.jsonl").exists()
    gate.set()
    while do(runner, "status")["closing"]:
        pass
    assert do(runner, "start", path=str(tmp_path / "y.jsonl"))["ok"]


def test_a_reset_that_can_not_open_its_file_leaves_the_recording_as_it_is(
    arm: Arm, tmp_path: Path
) -> None:
    runner = arm()
    begin(runner, "per_token", tmp_path)
    runner.execute(("7-0000000a", 3, 3))
    assert do(runner, "reset", path=str(tmp_path / "per_token.jsonl"))["conflict"]
    runner.execute(("8-0000000b", 2, 2))
    assert do(runner, "stop")["so_far"]["rows"] == 5 * 3


def test_a_narrowed_recording_copies_its_own_layers(arm: Arm, tmp_path: Path) -> None:
    runner = arm()
    do(runner, "configure", mode="per_token", layers="4")
    do(runner, "start", path=str(tmp_path / "x.jsonl"))
    runner.execute(("7-0000000a", 3, 3))
    do(runner, "stop")
    meta, *rows, _, end = read_lines(tmp_path / "x.jsonl")
    assert meta["layers_logged"] == [4] and [item["layer"] for item in meta["layers"]] == [4]
    assert {row["layer"] for row in rows} == {4}
    assert end["rows"] == 3


@pytest.mark.parametrize(
    ("command", "options", "told"),
    [
        ("configure", {"mode": "all"}, "unknown mode 'all'"),
        ("configure", {"mode": "per_pass", "path": "x.parquet"}, "does not end in .jsonl"),
        ("configure", {"layers": "2"}, "layer 2 is no MoE layer"),
        ("start", {}, "writes a file; name it with path="),
        ("dump", {"records": 1}, "unexpected keyword argument"),
    ],
)
def test_a_command_that_can_not_be_done_is_answered(
    arm: Arm, command: str, options: dict[str, Any], told: str
) -> None:
    runner = arm(mode="per_token")
    answer = do(runner, command, **options)
    assert not answer["ok"] and told in answer["error"]
    assert not do(runner, "status")["recording"]
