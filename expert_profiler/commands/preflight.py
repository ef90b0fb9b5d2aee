# SPDX-License-Identifier: Apache-2.0
"""Look at this machine before installing or running anything, and change nothing.

Standard library only: it runs where nothing is installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from expert_profiler.run import preflight


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="expert-profiler preflight",
        description="Check this machine before installing or running anything.",
        epilog=f"Exit code: 0 when nothing FAILs, 1 otherwise. next: {preflight.RUN}",
        allow_abbrev=False,  # --mode, which is for profile, is no short form of --model
    )
    parser.add_argument("--model", default="auto", help="as for expert-profiler profile [auto]")
    parser.add_argument("--brief", action="store_true", help="leave out what is ok")
    # test.sh hands over options that are for profile.
    args, _ = parser.parse_known_args(argv)
    checks = preflight.look(args.model)
    shown = [check for check in checks if check.status != "ok"] if args.brief else checks
    if shown:
        print(preflight.table(shown))
    failed = sum(check.status == "FAIL" for check in checks)
    if failed:
        print(f"preflight: {failed} of {len(checks)} checks FAILED; next: mend what FAILED above")
    elif not args.brief:
        print(f"preflight: {len(checks)} checks, none failed; next: {preflight.RUN}")
    return 1 if failed else 0
