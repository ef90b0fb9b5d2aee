# SPDX-License-Identifier: Apache-2.0
"""One door to everything: ``expert-profiler COMMAND``, a module here for each command.

A command's module has ``main(argv) -> int``, and the first line of its docstring says what it does.
Only the command that is called is imported.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import expert_profiler
from expert_profiler.errors import UserError

#: In the order in which a newcomer meets them.
NAMES = (
    "preflight",
    "patch",
    "profile",
    "validate",
    "hist",
    "report",
    "compare",
    "sql",
    "export",
    "convert",
    "bench",
    "models",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names.

    Raises:
        UserError: no command has that name.
    """
    name, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"expert-profiler {expert_profiler.__version__}")
        return 0
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown command {name[:80]}; {meant}run: expert-profiler --help")
    command = importlib.import_module(f"{__name__}.{name}")
    code: int = command.main(options)
    return code


def _help() -> str:
    commands = "\n".join(f"  {name:<11}{_first_line(name)}" for name in NAMES)
    return (
        "usage: expert-profiler COMMAND [OPTION...]\n\n"
        f"{expert_profiler.__doc__}\n\n"
        f"commands:\n{commands}\n\n"
        "  --help     this text; expert-profiler COMMAND --help for a command's options\n"
        "  --version  the version of this package\n\n"
        "next: expert-profiler preflight"
    )


def _first_line(name: str) -> str:
    """What a command does, from its source: importing all of them would take a second."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].rstrip(".")
