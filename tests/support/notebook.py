# SPDX-License-Identifier: Apache-2.0
"""Run the code cells of docs/tour.ipynb without Jupyter.

python -m tests.support.notebook    run them and store what they print in the notebook
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from expert_profiler.commands import convert
from tests.support.paths import REPO

TOUR = REPO / "docs" / "tour.ipynb"
DEMO_LOG = REPO / "docs" / "demo_run" / "moe_routes.parquet"

Cell = dict[str, Any]


def read() -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(TOUR.read_text(encoding="utf-8"))
    return notebook


def code_cells(notebook: dict[str, Any]) -> list[Cell]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: Cell) -> str:
    return "".join(cell["source"])


def stored_text(cell: Cell) -> str:
    """What the cell printed when its outputs were stored."""
    return "".join(line for output in cell["outputs"] for line in output["text"])


def write_log(folder: Path) -> None:
    """The demo log as the file that the notebook opens."""
    assert convert.main([str(DEMO_LOG), str(folder / "moe_routes.jsonl")]) == 0


def run(cells: list[Cell]) -> list[str]:
    """Run the cells in order, in one namespace and the current folder; what each one prints."""
    namespace: dict[str, Any] = {}
    texts = []
    for number, cell in enumerate(cells, start=1):
        code = compile(source(cell), f"<code cell {number}>", "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, namespace)  # noqa: S102 - the repository's own notebook
        texts.append(out.getvalue())
    return texts


def main() -> int:
    notebook = read()
    cells = code_cells(notebook)
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder))
        os.chdir(folder)
        texts = run(cells)
        os.chdir(REPO)
    for number, (cell, text) in enumerate(zip(cells, texts, strict=True), start=1):
        cell["execution_count"] = number
        lines = text.splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}]
    TOUR.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
