# SPDX-License-Identifier: Apache-2.0
"""The notebook docs/tour.ipynb runs on the demo log and shows what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import notebook


def test_every_cell_prints_what_the_notebook_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = notebook.code_cells(notebook.read())
    stored = [notebook.stored_text(cell) for cell in cells]
    assert len(cells) == 4
    assert all(stored), "run: python -m tests.support.notebook"
    notebook.write_log(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert notebook.run(cells) == stored


def test_the_notebook_uses_the_documented_api_only() -> None:
    """What analysis.md describes: the log room's door and the pure metrics."""
    text = "\n".join(notebook.source(cell) for cell in notebook.code_cells(notebook.read()))
    imports = {line for line in text.splitlines() if "expert_profiler" in line}
    assert imports == {
        "from expert_profiler.log import open_log",
        "from expert_profiler.metrics import coactivation",
        "from expert_profiler.metrics import divergence, resampling",
        "from expert_profiler.metrics import usage",
    }
