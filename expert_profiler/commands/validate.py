# SPDX-License-Identifier: Apache-2.0
"""Check a run's artifacts, ours or anyone's.

Exit code: 0 every check passed or had nothing to look at; 1 a check failed; 2 unusable input.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from expert_profiler import errors
from expert_profiler.artifacts import NAMES
from expert_profiler.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="expert-profiler validate",
        description="Check a run's artifacts. Without options: those in the current folder.",
        epilog="next: expert-profiler report LOG --out DIR, on a log that passed",
    )
    help_of_dir = "look here for whatever is not named below"
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help=help_of_dir)
    parser.add_argument("--dir", type=Path, help="the same")
    for key, name in NAMES.items():
        parser.add_argument(f"--{key}", type=Path, metavar="FILE", help=f"default: DIR/{name}")
    args = errors.parsed(parser, argv)
    from expert_profiler.log import validation

    checks = validation.validate(_paths(args))
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.verdict:<5} {check.name:<{width}}  {check.detail}")
    verdicts = Counter(check.verdict for check in checks)
    print(", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common()))
    return 1 if verdicts["FAIL"] else 0


def _paths(args: argparse.Namespace) -> dict[str, Path]:
    """The artifacts to look at: those named, and those that exist in the folder."""
    from expert_profiler.log import part_files

    named = {key: getattr(args, key) for key in NAMES if getattr(args, key) is not None}
    for key, path in named.items():
        if not (path.is_file() or (key == "routes" and path.is_dir())):
            raise UserError(f"no file {path}; make the artifacts with: ./test.sh")
    folder = args.folder or args.dir
    if folder is None and not named:
        folder = Path()
    found = {}
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"no directory {folder}; name the one with the artifacts")
        found = {key: folder / name for key, name in NAMES.items() if (folder / name).is_file()}
        parquet = (folder / NAMES["routes"]).with_suffix(".parquet")
        if "routes" not in found and part_files.is_dataset(parquet):
            found["routes"] = parquet
        if not found | named:
            raise UserError(f"no artifacts in {folder.absolute()}; make them with: ./test.sh")
    return found | named
