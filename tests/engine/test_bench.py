"""The bench runs to its end on a real engine. Whatever it times, nothing here looks at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from expert_profiler.bench.cases import HEADLINE_MODES, QUICK
from expert_profiler.run.tiny_model import TinyMoeSpec, build
from tests.support.cores import own_core
from tests.support.paths import REPO

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

LAYERS = 4


def test_the_quick_form_runs_to_its_end_and_every_row_is_there(tmp_path: Path) -> None:
    build(tmp_path / "model", TinyMoeSpec(layers=LAYERS))
    command = ["-m", "benchmarks.overhead", "--quick", "--model", str(tmp_path / "model")]
    done = subprocess.run(
        [sys.executable, *command, "--out", str(tmp_path / "out")],
        cwd=REPO,
        env={**os.environ, **own_core()},
        capture_output=True,
        text=True,
        timeout=380,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "overhead.json").read_text(encoding="utf-8"))
    assert (tmp_path / "out" / "overhead.png").read_bytes().startswith(b"\x89PNG")
    assert record["problems"] == [], "same tokens, nothing dropped, every recording complete"
    modes = record["headline"]["modes"]
    assert list(modes) == list(HEADLINE_MODES)
    rows = QUICK.headline.routed_tokens * LAYERS
    for name in ("stat", "per_pass", "parquet", "jsonl", "yardstick"):
        assert modes[name]["rows"] == rows, name
    assert record["profile"]["modes"]["jsonl"]["accounted"]["least"] > 1
    assert "next       look at overhead.png" in done.stdout
