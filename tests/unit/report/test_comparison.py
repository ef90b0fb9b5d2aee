# SPDX-License-Identifier: Apache-2.0
"""compare as its user meets it, and its figures against the functions they come from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expert_profiler import errors
from expert_profiler.commands import compare
from expert_profiler.report import comparison_page
from tests.support.logs import Record, meta, route, run_rows, write_log


def run(*args: object) -> int:
    return errors.run(lambda: compare.main([str(arg) for arg in args]))


def rows(seed: int, bent: float = 0.0, requests: int = 12, experts: int = 8) -> list[Record]:
    """Layer 0 leans to the first experts by ``bent``, layer 1 does not."""
    rng = np.random.default_rng(seed)
    lean = np.outer([bent, 0], np.arange(experts)[::-1] / experts)
    return [
        route(f"{req}", token, layer, np.argsort(-scores[layer])[:2].tolist(),
              phase="prefill" if token < 15 else "decode")
        for req in range(requests)
        for token in range(30)
        for scores in [rng.random((2, experts)) + lean]
        for layer in (0, 1)
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "a.jsonl", rows(0))
    write_log(tmp_path / "bent.jsonl", rows(4, bent=0.5))
    write_log(tmp_path / "alike.jsonl", rows(2, requests=9))
    write_log(tmp_path / "wide.jsonl", rows(3, experts=16), meta(experts=16))
    return tmp_path


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time; the tests of the page draw."""
    monkeypatch.setattr(comparison_page.charts, "png", lambda figure: b"")


def compared(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "out" / "compare.json").read_text())
    return data


def test_a_layer_that_leans_is_found_and_the_other_is_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("a.jsonl", "bent.jsonl", "alike.jsonl", "--out", "out") == 0
    bent, alike = compared(folder)["comparisons"]
    assert bent["p_value"][0] < 0.01 < 0.05 < bent["p_value"][1]
    assert bent["layers_that_differ"] == [0]
    assert bent["paired_by_request"] and not alike["paired_by_request"]
    assert alike["mean_p_value"] > 0.05
    assert bent["js_divergence_bits"][0] > 0.02 > bent["js_divergence_bits"][1]
    assert np.sum(bent["load_difference"], axis=1) == pytest.approx([0, 0], abs=1e-6)
    assert bent["load_difference"][0][0] > 0 > bent["load_difference"][0][7]
    out = capsys.readouterr().out
    assert "bent.jsonl against a.jsonl: Jensen-Shannon divergence" in out
    assert "1 of 2 layers differ at p <= 0.05" in out
    assert "top-k-normalised lack of entropy" in out
    page = (folder / "out" / "compare.html").read_text()
    assert "alike.jsonl against a.jsonl" in page


@pytest.mark.usefixtures("no_charts")
def test_other_shapes_compare_by_normalised_figures_only(folder: Path) -> None:
    assert run("a.jsonl", "wide.jsonl", "--out", "out") == 0
    data = compared(folder)
    [found] = data["comparisons"]
    assert not found["expert_by_expert"]
    assert found["why_not"] == "a.jsonl has 8 experts a layer, wide.jsonl 16"
    narrow, wide = (run["mean_over_layers"] for run in data["runs"])
    assert wide["effective_experts"] > 1.5 * narrow["effective_experts"]
    assert abs(wide["topk_entropy_lack"] - narrow["topk_entropy_lack"]) < 0.02
    assert "not expert by expert" in (folder / "out" / "compare.html").read_text()


@pytest.mark.usefixtures("no_charts")
def test_a_log_against_itself_is_the_same(folder: Path) -> None:
    write_log(folder / "b.jsonl", rows(0))
    assert run("a.jsonl", "b.jsonl", "--out", "out", "--names", "x,y", "--phase", "decode") == 0
    data = compared(folder)
    [found] = data["comparisons"]
    assert (found["a"], found["b"], data["phase"]) == ("x", "y", "decode")
    assert found["mean_js_divergence_bits"] == 0 and found["mean_p_value"] == 1
    assert found["rank_correlation"] == [1, 1] and found["top_overlap"] == [1, 1]
    assert data["runs"][0]["layers"][0]["all"]["choices"] == 12 * 15 * 2


@pytest.mark.usefixtures("no_charts")
def test_identical_runs_are_left_out_and_said(folder: Path) -> None:
    warm_up = [route("w", i, 0, [0, 1], [0.5, 0.25]) for i in range(500)]
    write_log(folder / "warm.jsonl", warm_up + rows(2))
    assert run("a.jsonl", "warm.jsonl", "--out", "out") == 0
    data = compared(folder)
    assert data["runs"][1]["rows_in_identical_runs_left_out"] == 500
    assert data["comparisons"][0]["mean_p_value"] > 0.05
    assert "the 500 rows in runs of identical rows" in (folder / "out/compare.html").read_text()


@pytest.mark.usefixtures("no_charts")
def test_a_log_that_lost_rows_is_compared_but_fails(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(folder / "short.jsonl", run_rows(), finished=False)
    assert run("a.jsonl", "short.jsonl", "--out", "out") == 1
    assert (folder / "out" / "compare.html").exists()
    assert "short.jsonl: short.jsonl has no end record" in capsys.readouterr().out


def test_names_of_logs_in_different_folders_stay_short_and_different() -> None:
    logs = [Path("run/a/moe_routes.jsonl"), Path("run/b/moe_routes.jsonl")]
    assert compare.short_names(logs, None) == ["a/moe_routes.jsonl", "b/moe_routes.jsonl"]
    assert compare.short_names([logs[0], logs[0]], None) == [
        "1: moe_routes.jsonl",
        "2: moe_routes.jsonl",
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a.jsonl", "--out", "new"], "one log can't be compared"),
        (["a.jsonl", "bent.jsonl", "--out", "out"], "compare.json exists in out"),
        (["a.jsonl", "bent.jsonl", "--out", "new", "--names", "x"], "--names needs 2 different"),
        (["a.jsonl", "no.jsonl", "--out", "new"], "no log at no.jsonl"),
        (["a.jsonl", "all.jsonl", "--out", "new", "--phase", "decode"], "has no decode rows"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "compare.json").write_text("mine")
    unknown = [{k: v for k, v in row.items() if k != "phase"} for row in rows(0)]
    write_log(folder / "all.jsonl", unknown)
    assert run(*args) == 2
    assert message in capsys.readouterr().err
    assert (folder / "out" / "compare.json").read_text() == "mine"


# ---- presets ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_charts")
def test_presets_are_profiled_once_and_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def profile(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        write_log(out / "moe_routes.jsonl", rows(len(calls)))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", profile)
    assert run("gptq", "full", "--out", "out") == 0
    assert [command[4:6] for command in calls] == [["--model", "gptq"], ["--model", "full"]]
    assert [r["name"] for r in compared(folder)["runs"]] == ["gptq", "full"]
    assert run("gptq", "granite-3b", "--out", "out", "--force") == 0
    assert len(calls) == 3  # gptq's log was there


def test_a_preset_that_fails_says_how_to_see_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 2)
    )
    assert run("a.jsonl", "full", "--out", "out") == 2
    assert "exit code 2 for full" in capsys.readouterr().err
