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
from expert_profiler.run import profile_options
from expert_profiler.run.run_folder import MODES

#: What a model's text and routing are worth, by its kind.
WORTH = {
    "random weights": "; its text and its routing mean nothing",
    "small demo model": (
        " of this repository, trained on Python's library and word problems; "
        "its experts have specialised, its answers are guesses"
    ),
}


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
    facts = timing["provenance"]
    model, prompts = facts["model"], facts["prompts"]
    lines = [
        f"model     {model['id']} ({model['kind']}{WORTH.get(model['kind'], '')})",
        f"prompts   {prompts['count']} ({prompts['set']})",
    ]
    for mode in MODES:
        if mode in timing:
            metrics = timing[mode]
            lines.append(
                f"{mode:<9} {metrics['tokens_per_sec']:.1f} tokens/s, "
                f"{metrics['median_wall_time_sec']:.2f} s, median of {len(metrics['repeats'])}"
            )
    if timing.get("overhead"):
        ratio = timing["overhead"]["paired_ratio_median"]
        low, high = timing["overhead"]["paired_ratio_ci95"]
        told = "" if low > 1 or high < 1 else "; within this machine's noise"
        lines.append(
            f"overhead  {ratio - 1:+.1%} wall time (95% interval {low - 1:+.1%} to "
            f"{high - 1:+.1%}, {timing['overhead']['pairs']} pairs{told})"
        )
    for path in (out / name for name in NAMES.values()):
        if path.is_file():
            lines.append(f"wrote     {path} ({path.stat().st_size:,} bytes)")
    plot = out / NAMES["hist"]
    if trusted:
        lines.append(f"next      look at {plot}, or check again: ./test.sh validate {out}")
    else:
        lines.append("NOT TO BE TRUSTED: something above failed; mend it and run ./test.sh again")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(errors.run(main))
