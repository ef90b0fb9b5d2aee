# SPDX-License-Identifier: Apache-2.0
"""What every mode does beside the pass that works."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.moe_routes.config import MODES

from tests.support.commands import Arm, begin, do

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("mode", MODES)
def test_warm_up_never_counts(arm: Arm, tmp_path: Path, mode: str) -> None:
    runner = arm()
    runner.dummy_run()
    begin(runner, mode, tmp_path)
    runner.dummy_run()
    runner.execute(("7-0000000a", 3, 3))
    runner.dummy_run()
    status = do(runner, "stop")
    assert status["so_far"]["rows"] == 3 * 3
    assert status["self_check"]["verdict"] == "pass"


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_falls_silent_is_lost_rows_in_every_mode(
    arm: Arm, tmp_path: Path, mode: str
) -> None:
    runner = arm()
    begin(runner, mode, tmp_path)
    runner.execute(("7-0000000a", 3, 3))
    runner.layers["model.layers.3.mlp.experts"].moe_route_tap = None
    runner.execute(("8-0000000b", 2, 2))
    status = do(runner, "stop")
    assert status["so_far"]["rows"] == 3 * 3 + 2 * 2
    assert status["so_far"]["drops"]["not_captured"] == 2
    assert status["self_check"]["verdict"] == "fail"


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_that_raised_fails_the_check_in_every_mode(
    arm: Arm, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = arm()
    begin(runner, mode, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "forward", lambda n: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.execute(("7-0000000a", 3, 3))
    runner.execute(("8-0000000b", 2, 2))
    status = do(runner, "stop")
    assert status["so_far"]["passes_unfinished"] == 1
    assert status["self_check"]["verdict"] == "fail"
