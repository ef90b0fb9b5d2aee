#!/usr/bin/env python3
"""Plot which experts a route log's tokens went to, and print how evenly.

    python3 make_hist.py [moe_routes.jsonl] [--out expert_hist.png] [--layer N] [--report DIR]

Exit code: 0 plotted; 1 plotted, but the log lost rows or its self-check failed; 2 bad input.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from expert_profiler import errors
from expert_profiler.errors import UserError

if TYPE_CHECKING:
    from expert_profiler.log.findings import Counts
    from expert_profiler.log.route_log import RouteLog

# A status line appears only when there is something to wait for.
QUIET_SECONDS = 2.0


def main(argv: list[str] | None = None) -> int:
    args = errors.parsed(_parser(), argv)
    _check_output(args.out, args.log, args.force)
    # Only now: a wrong command line need not wait for these.
    from expert_profiler.log.route_log import open_log
    from expert_profiler.report import histogram

    histogram.load_ahead()
    if args.report is not None:
        from expert_profiler.report import page
        from expert_profiler.report import report_page as reports

        page.prepare(args.report, reports.NAMES, args.force, "--report")
    with open_log(args.log, on_progress=_status(args.log), weights=args.report is not None) as log:
        counts = log.counts(layer=args.layer, include_flagged=args.include_flagged)
        if not counts.values.any():
            raise UserError(
                f"{args.log} has no countable rows in this selection; "
                "add --include-flagged or choose another --layer"
            )
        print(report(log, counts, args.include_flagged))
        figure = histogram.expert_histogram(
            counts,
            model_id=log.meta.model_id,
            requests=log.requests,
            id_space=log.meta.raw.get("expert_ids"),
            cautions=log.lost_rows + log.suspicions,
        )
        histogram.save_png(figure, args.out)
        if args.report is not None:
            _write_report(log, args)
        lost = bool(log.lost_rows)
    print(f"{'plot':<19}{args.out}")
    if args.report is not None:
        print(f"{'report':<19}{args.report / 'report.html'} (and report.json)")
    routes, hist = shlex.quote(str(args.log)), shlex.quote(str(args.out))
    here = Path(__file__).resolve().parent
    where = "" if here == Path.cwd() else f"PYTHONPATH={shlex.quote(str(here))} "
    python = shlex.quote(sys.executable)
    print(f"next: {where}{python} -m expert_profiler.validate --routes {routes} --hist {hist}")
    return 1 if lost else 0


def _write_report(log: RouteLog, args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from expert_profiler.report import report_page as reports
    from expert_profiler.report.report_data import collect

    rows = log.num_rows * (2 if log.contamination.rows else 1)
    tokens = rows // max(1, len(log.layers))
    with tqdm(total=tokens, desc="report", unit="token", delay=QUIET_SECONDS) as progress:
        collected = collect(
            log, outputs=args.outputs, tokenizer=args.tokenizer, on_tokens=progress.update
        )
    reports.write(collected, args.report, args.out.read_bytes())


def report(log: RouteLog, counts: Counts, include_flagged: bool = False) -> str:
    """The figures as aligned text, one fact a line."""
    from expert_profiler.metrics import usage
    from expert_profiler.report import histogram

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
        ("never used", f"{len(idle)} experts" + (f": {histogram.listed(idle)}" if idle else "")),
    ]
    if len(layers) > 1:
        # Adding up layers evens out what single layers do: experts of one id are unrelated.
        single = [usage.normalised_entropy(row) for row in counts.values.sum(axis=1) if row.any()]
        span = f"normalised entropy {min(single):.3f} to {max(single):.3f}"
        lines.append(("single layers", f"{span} (see one with --layer N)"))
    notes = [note for note in log.notes if not (include_flagged and "are not counted" in note)]
    lines += [("note", note) for note in notes]
    return "\n".join(f"{name:<19}{value}" for name, value in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_hist.py", description="Plot which experts a route log's tokens went to."
    )
    parser.add_argument(
        "log", nargs="?", type=Path, default=Path("moe_routes.jsonl"), help="default: %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("expert_hist.png"), help="default: %(default)s"
    )
    parser.add_argument("--layer", type=int, help="one layer instead of all added up")
    parser.add_argument("--force", action="store_true", help="replace an existing plot and report")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="also write report.html and report.json there: every figure, over all layers and "
        "unmarked rows",
    )
    parser.add_argument(
        "--outputs",
        type=Path,
        metavar="FILE",
        help="for the report's token types (default: outputs.jsonl beside the log)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="checkpoint with the tokenizer.json for them (default: the log's model, if local)",
    )
    parser.add_argument(
        "--include-flagged",
        action="store_true",
        help="count recomputed, overrun and rejected rows too",
    )
    return parser


def _check_output(out: Path, log: Path, force: bool) -> None:
    """Refuse before the reading, not after it."""
    if out.is_dir():
        raise UserError(f"{out} is a directory; name a file: --out {out / 'expert_hist.png'}")
    if not out.parent.is_dir():
        raise UserError(f"no directory {out.parent} for the plot; make it: mkdir -p {out.parent}")
    if out.exists() and log.exists() and out.samefile(log):
        raise UserError(f"--out {out} is the log itself; choose another --out")
    if out.exists() and not out.is_file():
        raise UserError(f"--out {out} is no plain file; choose another --out")
    if out.exists() and not force:
        raise UserError(f"{out} exists; replace it with --force, or choose another --out")


def _status(log: Path) -> Callable[[float], None] | None:
    """A line on stderr that rewrites itself, for people only."""
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


if __name__ == "__main__":
    sys.exit(errors.run(main))
