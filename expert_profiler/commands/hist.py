# SPDX-License-Identifier: Apache-2.0
"""Plot which experts a log's tokens went to, and print how evenly.

Exit code: 0 plotted; 1 plotted, but the log lost rows or its self-check failed; 2 bad input.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from expert_profiler import errors, files, resources
from expert_profiler.artifacts import NAMES
from expert_profiler.errors import UserError

if TYPE_CHECKING:
    from expert_profiler.log import RouteLog
    from expert_profiler.log.expert_counts import Counts

# A status line appears only when there is something to wait for.
QUIET_SECONDS = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    return run(errors.parsed(make_parser("expert-profiler hist"), argv))


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The options of a histogram."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Plot which experts a log's tokens went to.",
        epilog="next: expert-profiler report LOG --out DIR, for every layer and metric",
    )
    add = parser.add_argument
    add("log", nargs="?", type=Path, default=Path(NAMES["routes"]), help="default: %(default)s")
    add("--out", type=Path, default=Path(NAMES["hist"]), help="default: %(default)s")
    add("--layer", type=int, help="one layer instead of all added up")
    add("--force", action="store_true", help="replace an existing plot and report")
    add("--include-flagged", action="store_true",
        help="count recomputed, overrun and rejected rows too")  # fmt: skip
    return parser


def run(
    args: argparse.Namespace, write_more: Callable[[RouteLog, bytes], Path | None] | None = None
) -> int:
    """Plot and print.

    Args:
        args: what ``make_parser`` parsed.
        write_more: writes a report from the opened log and the plot's PNG, and returns its page.
    """
    files.check_free(args.out, args.force, "--out", args.log)
    # Only now: a wrong command line need not wait for these.
    from expert_profiler.log import open_log
    from expert_profiler.report import histogram

    histogram.load_ahead()
    with open_log(args.log, on_progress=status_line(args.log)) as log:
        counts = log.counts(args.layer, include_flagged=args.include_flagged)
        if not counts.values.any():
            raise UserError(
                f"{args.log} has no countable rows in this selection; "
                "add --include-flagged or choose another --layer"
            )
        print(summary(log, counts, args.include_flagged))
        histogram.save_png(histogram.of_log(log, counts), args.out)
        page = write_more(log, args.out.read_bytes()) if write_more else None
        lost = bool(log.lost_rows)
    print(f"{'plot':<19}{args.out}")
    if page is not None:
        print(f"{'report':<19}{page} (and {page.with_suffix('.json').name})")
    words = shlex.join(["--routes", str(args.log), "--hist", str(args.out)])
    print(f"next: {resources.program()} validate {words}")
    return 1 if lost else 0


def summary(log: RouteLog, counts: Counts, include_flagged: bool = False) -> str:
    """The metrics as aligned text, one fact a line."""
    from expert_profiler.log.findings import listed
    from expert_profiler.metrics import usage

    total = counts.per_expert
    experts, choices = counts.num_experts, int(total.sum())
    by_phase = ", ".join(f"{phase} {n:,}" for phase, n in counts.phase_rows().items())
    layers = counts.layers
    idle = usage.never_used(total)
    lines = [
        ("model", log.meta.model_id),
        ("layers", f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} added up"),
        ("rows", f"{counts.rows.sum():,} ({by_phase})"),
        ("requests", f"{log.requests:,}"),
        *(
            (f"top {place}", f"expert {expert}: {total[expert]:,} ({total[expert] / choices:.2%})")
            for place, expert in enumerate(usage.top(total, 3), start=1)
        ),
        (
            "entropy",
            f"{usage.entropy_bits(total):.3f} bits of at most "
            f"{usage.max_entropy_bits(experts):.3f} "
            f"(normalised {usage.normalised_entropy(total):.3f})",
        ),
        ("effective experts", f"{usage.effective_experts(total):.1f} of {experts}"),
        ("max/mean", f"{usage.max_over_mean(total):.2f}"),
        ("never used", f"{len(idle)} experts" + (f": {listed(idle, 12)}" if idle else "")),
    ]
    if len(layers) > 1:
        # Adding up layers evens out what single layers do: experts of one id are unrelated.
        single = [usage.normalised_entropy(row) for row in counts.values.sum(axis=1) if row.any()]
        span = f"normalised entropy {min(single):.3f} to {max(single):.3f}"
        lines.append(("single layers", f"{span} (see one with --layer N)"))
    notes = [note for note in log.notes if not (include_flagged and "are not counted" in note)]
    lines += [("note", note) for note in notes]
    return "\n".join(f"{name:<19}{value}" for name, value in lines)


def status_line(log: Path) -> Callable[[float], None] | None:
    """Shows the percentage on a line of stderr that rewrites itself; None if it is no terminal."""
    if not sys.stderr.isatty():
        return None
    started = time.monotonic()

    def show(percent: float) -> None:
        waited = time.monotonic() - started
        if percent >= 100:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        elif waited >= QUIET_SECONDS:
            line = f"\rreading {log.name}: {percent:.0f}% after {waited:.0f} s"
            print(line, end="", file=sys.stderr, flush=True)

    return show
