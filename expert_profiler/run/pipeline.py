"""What ``./test.sh run`` does once the environment stands: profile, plot, validate, sum up.

python -m expert_profiler.run.pipeline [options of run_profile.py]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import run_profile
from expert_profiler import errors
from expert_profiler.run import models
from tools import make_tiny_moe

REPO = Path(__file__).resolve().parents[2]
PLOT = "expert_hist.png"
#: What a model's text and routing are worth, by its kind.
WORTH = {
    "random weights": "; its text and its routing mean nothing",
    "small demo model": (
        " of this repository, trained on Python's library and word problems; "
        "its experts have specialised, its answers are guesses"
    ),
}
ARTIFACTS = ("prompts.txt", "moe_routes.jsonl", "outputs.jsonl", PLOT, "timing.json")


def main(argv: Sequence[str] | None = None) -> int:
    options = list(sys.argv[1:] if argv is None else argv)
    args = run_profile.parse(options)  # refuses bad options before anything is built
    tiny = models.PRESETS["tiny"]
    if models.resolve(args.model, has_gpu=bool(models.gpus())) is tiny:
        make_tiny_moe.main([tiny.model, "--reuse"])

    python, out = sys.executable, str(args.out)
    log, plot = str(args.out / "moe_routes.jsonl"), str(args.out / PLOT)
    commands = [("profile", [python, "run_profile.py", "--force", *options])]
    if args.mode != "no_log":
        commands += [
            ("plot", [python, "make_hist.py", log, "--out", plot, "--force"]),
            ("validate", [python, "-m", "expert_profiler.validate", "--dir", out]),
        ]
    start = time.monotonic()
    worst = 0
    for name, command in commands:
        print(f"==> {name}", flush=True)
        # Exit code 1: the artifacts are there but something in them must not be trusted. The
        # later steps still say what; anything else left nothing to go on with.
        code = subprocess.run(command, cwd=REPO, check=False).returncode
        if code not in (0, 1):
            return code
        worst = max(worst, code)
    print(f"==> summary ({time.monotonic() - start:.0f} s)")
    timing = json.loads((args.out / "timing.json").read_text(encoding="utf-8"))
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
    for mode in ("no_log", "log"):
        if mode in timing:
            figures = timing[mode]
            lines.append(
                f"{mode:<9} {figures['tokens_per_sec']:.1f} tokens/s, "
                f"{figures['median_wall_time_sec']:.2f} s, median of {len(figures['repeats'])}"
            )
    if timing.get("overhead"):
        ratio = timing["overhead"]["paired_ratio_median"]
        low, high = timing["overhead"]["paired_ratio_ci95"]
        told = "" if low > 1 or high < 1 else "; within this machine's noise"
        lines.append(
            f"overhead  {ratio - 1:+.1%} wall time (95% interval {low - 1:+.1%} to "
            f"{high - 1:+.1%}, {timing['overhead']['pairs']} pairs{told})"
        )
    for name in ARTIFACTS:
        if (out / name).is_file():
            lines.append(f"wrote     {out / name} ({(out / name).stat().st_size:,} bytes)")
    if trusted:
        lines.append(f"next      look at {out / PLOT}, or check again: ./test.sh validate {out}")
    else:
        lines.append("NOT TO BE TRUSTED: something above failed; mend it and run ./test.sh again")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(errors.run(main))
