# SPDX-License-Identifier: Apache-2.0
"""Measure what recording costs on this machine.

Takes some 15 minutes on two cores; --quick runs every part once, small, in under 2 minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from expert_profiler.errors import parsed, positive


def parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Measure what recording costs on this machine: some 15 minutes on two cores. "
        "Writes overhead.json and overhead.png.",
        epilog="next: look at overhead.png; docs/overhead.md says how to read it",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="every part once and small; its metrics mean nothing")
    add("--model", metavar="PATH", help="checkpoint folder [the tiny one, built where missing]")
    add("--out", type=Path, default=Path(), metavar="DIR", help="folder for the results [.]")
    add("--pairs", type=positive, metavar="N", help="pairs a mode of the headline case [20]")
    add("--force", action="store_true", help="overwrite results in --out")
    add("--keep", action="store_true", help="keep the engines' logs, and say where")
    return parsed(parser, argv)


def main(argv: Sequence[str] | None = None, prog: str = "expert-profiler bench") -> int:
    args = parse(argv, prog)
    from expert_profiler.bench import overhead

    return overhead.bench(args)
