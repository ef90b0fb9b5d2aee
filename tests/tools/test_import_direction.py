# SPDX-License-Identifier: Apache-2.0
"""Imports in the library run one way, from room to room, and never in a circle.

Nothing is imported here: every source file is read, imports inside functions included.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import REPO

LIBRARY = REPO / "expert_profiler"
GROUND = {"artifacts", "errors", "files", "resources"}
#: What each room may import besides itself. A file beside the rooms is a room of its own.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"__init__", "commands", "errors"},
    "commands": {"__init__", "bench", "log", "metrics", "patch", "report", "run"} | GROUND,
    "bench": {"run", "metrics", "patch"} | GROUND,
    "report": {"log", "metrics"} | GROUND,
    "log": {"metrics"} | GROUND,
    "metrics": {"errors"},
    "run": {"patch"} | GROUND,
    "patch": GROUND,
    "resources": {"errors"},
    "files": {"errors"},
    "artifacts": set(),
    "errors": set(),
}
#: Rooms that run where nothing is installed, and so do the commands over them.
STANDARD_LIBRARY_ONLY = {"__init__", "__main__", "patch", *GROUND}
STANDARD_LIBRARY_COMMANDS = {"__init__", "patch", "preflight"}
NOT_THE_LIBRARY = {"tools", "tests", "benchmarks", *(path.stem for path in REPO.glob("*.py"))}

Arrow = tuple[str, str]


def sources() -> list[Path]:
    return [path for path in sorted(LIBRARY.rglob("*.py")) if "bundled" not in path.parts]


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sources()}


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of what a source imports: of "from a import b" both a and a.b.

    Args:
        tree: of the source.
        package: that a relative import counts from.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            start = ".".join([*above, *filter(None, [node.module])])
            yield start
            yield from (f"{start}.{item.name}" for item in node.names)


def for_types_only(tree: ast.AST) -> ast.AST:
    """The tree without what stands under ``if TYPE_CHECKING``: it is never run."""
    for node in ast.walk(tree):
        for field in ("body", "orelse"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                block[:] = [
                    item
                    for item in block
                    if not (isinstance(item, ast.If) and "TYPE_CHECKING" in ast.unparse(item.test))
                ]
    return tree


def arrows(name: str, text: str, *, types: bool = True) -> set[str]:
    """What a module of the library imports; ``types``: for type checkers too."""
    path = MODULES.get(name)
    package = name if path is not None and path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(text)
    return set(imports(tree if types else for_types_only(tree), package))


def room(module: str) -> str:
    """``expert_profiler.log.scan`` is in "log", ``expert_profiler`` in "__init__"."""
    return f"{module}.__init__".split(".")[1]


def wrong_arrows(name: str, text: str) -> list[str]:
    """What is against the table, one line an arrow, in the source ``text`` of module ``name``."""
    found = []
    own = room(name)
    for target in sorted(arrows(name, text)):
        top = target.partition(".")[0]
        if top in NOT_THE_LIBRARY:
            found.append(f"{name} -> {target}: the library imports no {top}")
        if top == "expert_profiler" and target in MODULES:
            there = room(target)
            # "from expert_profiler import x" names the package itself on the way.
            if there not in {own, "__init__"} | MAY_IMPORT[own]:
                found.append(f"{name} -> {target}: {own} must not import {there}")
        light = own in STANDARD_LIBRARY_ONLY or (
            own == "commands" and name.split(".")[-1] in STANDARD_LIBRARY_COMMANDS
        )
        if light and top not in sys.stdlib_module_names | {"expert_profiler", "__future__"}:
            found.append(f"{name} -> {target}: {own} needs the standard library only")
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of modules, first and last the same; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def modules_in(targets: set[str], own: str) -> set[str]:
    """The modules among ``targets``, without packages that are only named on the way to one."""
    found = {target for target in targets if target in MODULES and target != own}
    return {
        target for target in found if not any(other.startswith(f"{target}.") for other in found)
    }


def test_every_room_is_in_the_table() -> None:
    assert {room(name) for name in MODULES} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name: str) -> None:
    assert wrong_arrows(name, MODULES[name].read_text(encoding="utf-8")) == []


def test_there_is_no_circle() -> None:
    graph = {
        name: modules_in(arrows(name, path.read_text(encoding="utf-8"), types=False), name)
        for name, path in MODULES.items()
    }
    assert " -> ".join(circle(graph)) == ""


def test_no_module_name_stands_twice() -> None:
    """Commands aside, which are named as what they do."""
    names = [
        name.rpartition(".")[2]
        for name, path in MODULES.items()
        if path.name != "__init__.py" and room(name) != "commands"
    ]
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize(
    ("name", "line", "told"),
    [
        ("expert_profiler.metrics.usage", "from expert_profiler.log import scan", "log"),
        ("expert_profiler.log.scan", "from expert_profiler.report.charts import x", "report"),
        ("expert_profiler.run.models", "def f():\n    import expert_profiler.bench.cases", "bench"),
        ("expert_profiler.run.models", "from ..commands import patch", "commands"),
        ("expert_profiler.patch.actions", "import numpy", "standard library"),
        ("expert_profiler.commands.preflight", "import tqdm", "standard library"),
        ("expert_profiler.log.scan", "from tools import make_tiny_moe", "no tools"),
        ("expert_profiler.run.pipeline", "import run_profile", "no run_profile"),
    ],
)
def test_an_arrow_back_is_found(name: str, line: str, told: str) -> None:
    assert any(told in found for found in wrong_arrows(name, line)), wrong_arrows(name, line)


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert circle(graph) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
