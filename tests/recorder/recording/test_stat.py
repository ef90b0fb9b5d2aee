# SPDX-License-Identifier: Apache-2.0
"""The mode that only adds counts up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Arm, begin, do

pytestmark = pytest.mark.timeout(60)


def test_a_pass_that_can_not_be_counted_stops_nothing_and_is_told(arm: Arm, tmp_path: Path) -> None:
    runner = arm()
    begin(runner, "stat", tmp_path)
    recording = runner.moe_routes._recording  # type: ignore[union-attr]
    add = recording._accumulator.add  # type: ignore[union-attr]

    def exhausted(*_: Any) -> None:
        raise MemoryError("no memory for indices")

    recording._accumulator.add = exhausted  # type: ignore[union-attr]
    runner.execute(("7-0000000a", 3, 3))
    recording._accumulator.add = add  # type: ignore[union-attr]
    runner.execute(("8-0000000b", 2, 2))
    status = do(runner, "stop")
    assert "no memory for indices" in status["error"]
    assert status["so_far"]["tokens"]["prefill"] == 2
    assert status["self_check"]["verdict"] == "fail"


def test_stat_takes_no_file(arm: Arm, tmp_path: Path) -> None:
    answer = do(arm(mode="stat"), "start", path=str(tmp_path / "x.jsonl"))
    assert "writes no file" in answer["error"]
