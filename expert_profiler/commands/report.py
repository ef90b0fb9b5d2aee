# SPDX-License-Identifier: Apache-2.0
"""Write a log's report: a page with every metric and chart, and the numbers as JSON.

Over all layers and unmarked rows. Exit code: 0 written; 1 written, but the log lost rows or its
self-check failed; 2 bad input.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from expert_profiler import errors, files, resources
from expert_profiler.commands import hist

if TYPE_CHECKING:
    from expert_profiler.log import RouteLog

NAMES = ("report.html", "report.json")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="expert-profiler report",
        description=__doc__,
        epilog="next: open DIR/report.html; expert-profiler compare LOG OTHER --out DIR",
    )
    add = parser.add_argument
    add("log", type=Path, metavar="LOG", help="a route log")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    add("--force", action="store_true", help="replace an existing report")
    add_token_options(parser)
    args = errors.parsed(parser, argv)
    files.prepare(args.out, NAMES, args.force, "--out")
    from expert_profiler.log import open_log
    from expert_profiler.report import charts, histogram

    with open_log(args.log, on_progress=hist.status_line(args.log)) as log:
        plot = charts.png(histogram.of_log(log, log.counts()))
        page = write(log, plot, args.out, args.outputs, args.tokenizer)
        for note in log.notes:
            print(f"{'note':<8}{note}")
        lost = bool(log.lost_rows)
    print(f"{'report':<8}{page} (and {NAMES[1]})")
    print(f"next: {resources.program()} validate --routes {shlex.quote(str(args.log))}")
    return 1 if lost else 0


def add_token_options(parser: argparse.ArgumentParser) -> None:
    """What the report's token types come from."""
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


def write(
    log: RouteLog, histogram_png: bytes, folder: Path, outputs: Path | None, tokenizer: Path | None
) -> Path:
    """Write the report of an opened log into ``folder``; returns the page."""
    from tqdm import tqdm

    from expert_profiler.report import page as pages
    from expert_profiler.report import report_page
    from expert_profiler.report.report_data import collect

    rows = log.num_rows * (2 if log.identical_runs.rows else 1)
    tokens = rows // max(1, len(log.layers))
    with tqdm(total=tokens, desc="report", unit="token", delay=hist.QUIET_SECONDS) as progress:
        report = collect(log, outputs=outputs, tokenizer=tokenizer, on_tokens=progress.update)
    page, numbers = (folder / name for name in NAMES)
    files.write(numbers, pages.as_json(report.data))
    files.write(page, report_page.html(report, histogram_png))
    return page
