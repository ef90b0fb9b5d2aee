"""What ./test.sh run does after the installation."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expert_profiler.run import models, pipeline


def timing(low: float = 0.98, high: float = 1.05) -> dict[str, Any]:
    mode = {"tokens_per_sec": 100.0, "median_wall_time_sec": 2.0, "repeats": [1, 2, 3]}
    return {
        "no_log": mode,
        "log": mode,
        "overhead": {"paired_ratio_median": 1.01, "paired_ratio_ci95": [low, high], "pairs": 3},
        "provenance": {
            "model": {"id": "tiny", "kind": "random weights"},
            "prompts": {"count": 25, "set": "shipped-word-problems-25"},
        },
    }


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Runs nothing: the exit code of each step by the name of its program."""
    codes: dict[str, int] = {}
    ran: list[str] = []

    def fake(command: Sequence[str], **_: Any) -> Any:
        assert command[1:3] == ["-m", "expert_profiler"]
        name = command[3]
        ran.append(name)
        codes.setdefault(name, 0)
        return SimpleNamespace(returncode=codes[name])

    monkeypatch.setattr(subprocess, "run", fake)
    codes["ran"] = ran  # type: ignore[assignment]
    return codes


def run(out: Path, *options: str) -> int:
    (out / "timing.json").write_text(json.dumps(timing()))
    return pipeline.main(["--out", str(out), *options])


def test_it_builds_profiles_plots_and_validates(tmp_path: Path, steps: Any) -> None:
    assert run(tmp_path) == 0
    assert steps["ran"] == ["profile", "hist", "validate"]


def test_without_a_log_there_is_nothing_to_plot(tmp_path: Path, steps: Any) -> None:
    assert run(tmp_path, "--mode", "no_log") == 0
    assert steps["ran"] == ["profile"]


def test_a_doubtful_log_is_plotted_and_validated_all_the_same(
    tmp_path: Path, steps: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    steps["profile"] = 1
    assert run(tmp_path) == 1
    assert steps["ran"][-1] == "validate"
    assert "NOT TO BE TRUSTED" in capsys.readouterr().out


def test_a_step_that_leaves_nothing_ends_the_run(tmp_path: Path, steps: Any) -> None:
    steps["profile"] = 2
    assert run(tmp_path) == 2
    assert steps["ran"] == ["profile"]


def test_the_summary_says_what_the_figures_are_worth(tmp_path: Path) -> None:
    (tmp_path / "expert_hist.png").write_bytes(b"12345")
    text = pipeline.summary(timing(), tmp_path, trusted=True)
    assert "random weights" in text
    assert "+1.0% wall time (95% interval -2.0% to +5.0%, 3 pairs; within" in text
    assert "expert_hist.png (5 bytes)" in text
    assert "within" not in pipeline.summary(timing(low=1.002), tmp_path, trusted=True)
    demo = timing()
    demo["provenance"]["model"] = {"id": "demo_model", "kind": models.PRESETS["demo"].kind}
    assert "trained on Python's library" in pipeline.summary(demo, tmp_path, trusted=True)
    one_mode = timing()
    del one_mode["no_log"]
    one_mode["overhead"] = None
    assert "overhead" not in pipeline.summary(one_mode, tmp_path, trusted=True)
