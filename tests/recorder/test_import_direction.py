# SPDX-License-Identifier: Apache-2.0
"""Imports in the recorder run one way, and no two modules of a room import each other.

Read from the source, so that an import inside a function counts too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.overlay import OVERLAY

RECORDER, SERVER = "vllm.moe_routes", "vllm.entrypoints.serve.expert_distribution"
GROUND = {"errors", "schema", "layers", "counts", "config"}
#: Room -> the rooms it may import. A module at the top is a room of its own.
ALLOWED: dict[str, set[str]] = {
    "ground": set(),
    "capture": {"ground"},
    "writing": {"capture", "ground"},
    "recording": {"writing", "capture", "ground"},
    "hooks": {"capture", "ground"},
    "recorder": {"recording", "writing", "capture", "ground"},
    "server": {"ground"},
}


def sources(root: Path = OVERLAY) -> dict[str, str]:
    """Module name -> source, of the recorder and of the server's routes."""
    found = {}
    for package in (RECORDER, SERVER):
        folder = root.joinpath(*package.split(".")[1:])
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(("vllm", *parts)).removesuffix(".__init__")] = path.read_text()
    return found


def imports(name: str, source: str, modules: Mapping[str, str]) -> set[str]:
    """The modules of ours that the source of module ``name`` imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".")[: -node.level]
                base = ".".join([*package, *(base.split(".") if base else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in modules else base)
    return {module for module in found if module in modules}


def room(module: str) -> str:
    if module.startswith(SERVER):
        return "server"
    top = module.removeprefix(RECORDER).lstrip(".").partition(".")[0]
    return "ground" if top in GROUND or not top else top


def faults(modules: Mapping[str, str]) -> Iterator[str]:
    """Every arrow that goes back, and a circle if there is one."""
    arrows = {name: imports(name, source, modules) - {name} for name, source in modules.items()}
    for name, targets in arrows.items():
        own = room(name)
        for target in sorted(targets):
            if room(target) != own and room(target) not in ALLOWED[own]:
                yield f"{own} imports {room(target)}: {name} -> {target}"
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        yield f"a circle: {' -> '.join(reversed(error.args[1]))}"


def test_imports_run_one_way_and_in_no_circle() -> None:
    modules = sources()
    assert {room(name) for name in modules} == set(ALLOWED)
    assert list(faults(modules)) == []


def test_no_two_modules_of_the_recorder_have_one_name() -> None:
    names = [name.rpartition(".")[2] for name in sources() if name.startswith(RECORDER)]
    assert len(names) == len(set(names)), sorted(names)


@pytest.mark.parametrize(
    ("module", "line", "told"),
    [
        ("capture.buffer", "from vllm.moe_routes.writing import rows", "capture imports writing"),
        ("writing.rows", "import vllm.moe_routes.recording.base", "writing imports recording"),
        ("counts", "from vllm.moe_routes.capture.buffer import allocate", "ground imports capture"),
        ("hooks", "from vllm.moe_routes.recorder import attach", "hooks imports recorder"),
        ("writing.rows", "def f():\n    from . import token_log", "a circle: "),
        ("writing.formats.dataset", "from ...recording import base", "writing imports recording"),
        ("layers", "from vllm.moe_routes import counts", "a circle: "),
    ],
)
def test_a_wrong_import_is_told(module: str, line: str, told: str) -> None:
    modules = sources()
    modules[f"{RECORDER}.{module}"] += f"\n{line}\n"
    assert any(fault.startswith(told) for fault in faults(modules)), list(faults(modules))


def test_a_wrong_import_of_the_servers_is_told() -> None:
    modules = sources()
    modules[f"{SERVER}.guard"] += f"\nfrom {SERVER} import api_router\n"
    modules[f"{SERVER}.names"] += f"\nfrom {RECORDER}.recording import base\n"
    told = "\n".join(faults(modules))
    assert "server imports recording" in told and "a circle: " in told
