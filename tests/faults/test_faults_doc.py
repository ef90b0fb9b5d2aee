# SPDX-License-Identifier: Apache-2.0
"""docs/faults.md: its sums fit, its tests exist, and it names every fault that the tests note."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.support.paths import REPO

DOC = (REPO / "docs" / "faults.md").read_text(encoding="utf-8")
FIGURES = ("times", "rows executed", "written", "readable", "reported lost", "left out")
#: Where tests/faults says the name of a fault: the first argument of these.
NOTED_BY = ("Row", "_account")


def rows(first_column: str) -> list[dict[str, str]]:
    """The rows of the table with that first column, by column."""
    lines = iter(DOC.splitlines())
    for line in lines:
        header = cells(line)
        if header[:1] == [first_column] and "rows executed" in header:
            break
    else:
        raise AssertionError(f"no table of {first_column}")
    next(lines)
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        assert len(cells(line)) == len(header), line
        found.append(dict(zip(header, cells(line), strict=True)))
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if "|" in line else []


def figures(row: dict[str, str]) -> list[int]:
    return [int(row[name].replace(",", "")) for name in FIGURES]


def test_the_sum_of_every_row_fits() -> None:
    *faults, total = rows("fault")
    assert len(faults) > 20
    for row in faults:
        times, executed, written, readable, lost, left_out = figures(row)
        assert times > 0 and executed > 0, row
        assert written == readable, row
        assert executed == written + lost + left_out, row
    sums = [sum(column) for column in zip(*map(figures, faults), strict=True)]
    assert figures(total) == sums


def test_every_test_that_the_document_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", DOC)
    assert len(named) > 40
    for file, name in named:
        tree = ast.parse((REPO / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file}::{name}"


def noted() -> Iterator[tuple[str, re.Pattern[str]]]:
    """(file, name) of every fault that a test notes; what a test fills in may be anything."""
    for file in sorted((REPO / "tests" / "faults").glob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id not in NOTED_BY or not node.args:
                continue
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield file.name, re.compile(re.escape(str(name.value)))
            elif isinstance(name, ast.JoinedStr):
                parts = [
                    re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".+"
                    for part in name.values
                ]
                yield file.name, re.compile("".join(parts))
            else:
                assert isinstance(name, ast.Name) and name.id == "fault", ast.dump(name)


def test_the_table_has_the_faults_that_the_tests_note_and_no_others() -> None:
    faults = [row["fault"] for row in rows("fault")[:-1]]
    assert len(set(faults)) == len(faults)
    names = list(noted())
    assert len(names) > 20
    for file, name in names:
        assert any(name.fullmatch(fault) for fault in faults), f"{file}: {name.pattern}"
    for row in rows("fault")[:-1]:
        own = [name for file, name in names if f"/{file}::" in row["test"]]
        assert any(name.fullmatch(row["fault"]) for name in own), row
