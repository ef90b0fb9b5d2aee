# SPDX-License-Identifier: Apache-2.0
"""What ``./test.sh run`` does once the environment stands: profile, plot, validate, sum up.

python -m expert_profiler.run.pipeline [options of expert-profiler profile]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expert_profiler import errors
from expert_profiler.artifacts import NAMES
from expert_profiler.run import profile_options, run_summary


def main(argv: Sequence[str] | None = None) -> int:
    options = list(sys.argv[1:] if argv is None else argv)
    # Refuses bad options before anything is loaded.
    args = profile_options.parse(options, "./test.sh run")

    log, plot = str(args.out / NAMES["routes"]), str(args.out / NAMES["hist"])
    commands = [["profile", "--force", *options]]
    if args.mode != "no_log":
        commands += [["hist", log, "--out", plot, "--force"], ["validate", str(args.out)]]
    start = time.monotonic()
    worst = 0
    for command in commands:
        print(f"==> {command[0]}", flush=True)
        # Exit code 1: the artifacts are there but something in them must not be trusted. The
        # later steps still say what; anything else left nothing to go on with.
        line = [sys.executable, "-m", "expert_profiler", *command]
        code = subprocess.run(line, check=False).returncode
        if code not in (0, 1):
            return code
        worst = max(worst, code)
    print(f"==> summary ({time.monotonic() - start:.0f} s)")
    timing = json.loads((args.out / NAMES["timing"]).read_text(encoding="utf-8"))
    print(summary(timing, args.out, trusted=worst == 0))
    return worst


def summary(timing: dict[str, Any], out: Path, trusted: bool) -> str:
    """The run in a few lines: what ran, what recording cost, what was written, what is next."""
    lines = run_summary.lines(timing)
    for path in (out / name for name in NAMES.values()):
        if path.is_file():
            lines.append(f"wrote      {path} ({path.stat().st_size:,} bytes)")
    plot = out / NAMES["hist"]
    if trusted:
        lines.append(f"next       look at {plot}, or check again: ./test.sh validate {out}")
    else:
        lines.append("NOT TO BE TRUSTED: something above failed; mend it and run ./test.sh again")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(errors.run(main))
