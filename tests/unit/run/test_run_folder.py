# SPDX-License-Identifier: Apache-2.0
"""A run's files come into place together."""

from __future__ import annotations

from pathlib import Path

from expert_profiler.run import run_folder


def test_an_older_runs_rank_files_go_when_the_new_run_folder_come(tmp_path: Path) -> None:
    stage, out = tmp_path / "stage", tmp_path / "out"
    stage.mkdir()
    out.mkdir()
    (stage / "moe_routes.jsonl").write_text("new")
    (stage / "timing.json").write_text("new")
    (stage / "engine.log").write_text("chatter")
    (out / "moe_routes.jsonl").write_text("old")
    (out / "moe_routes.pp1.jsonl").write_text("old")
    written = run_folder.move(stage, out)
    assert [path.name for path in written] == ["timing.json", "moe_routes.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == ["moe_routes.jsonl", "timing.json"]
    assert (out / "moe_routes.jsonl").read_text() == "new"
