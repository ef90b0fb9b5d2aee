#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Plot which experts a route log's tokens went to, and print how evenly.

    python3 make_hist.py [moe_routes.jsonl] [--out expert_hist.png] [--layer N] [--report DIR]

Exit code: 0 plotted; 1 plotted, but the log lost rows or its self-check failed; 2 bad input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from expert_profiler import errors, files
from expert_profiler.commands import hist, report

if TYPE_CHECKING:
    from expert_profiler.log import RouteLog


def main(argv: Sequence[str] | None = None) -> int:
    parser = hist.make_parser("make_hist.py")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="also write report.html and report.json there: every metric, over all layers and "
        "unmarked rows",
    )
    report.add_token_options(parser)
    args = errors.parsed(parser, argv)
    if args.report is None:
        return hist.run(args)

    def write_report(log: RouteLog, plot: bytes) -> Path:
        return report.write(log, plot, args.report, args.outputs, args.tokenizer)

    files.check_free(args.out, args.force, "--out", args.log)
    files.prepare(args.report, report.NAMES, args.force, "--report")
    return hist.run(args, write_report)


if __name__ == "__main__":
    sys.exit(errors.run(main))
