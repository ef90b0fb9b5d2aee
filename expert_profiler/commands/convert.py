# SPDX-License-Identifier: Apache-2.0
"""Turn a JSONL log into a Parquet one, or back, without loss.

Parquet to Parquet merges small parts.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from expert_profiler import errors, resources


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="expert-profiler convert",
        description=__doc__,
        epilog="next: expert-profiler hist TARGET",
    )
    parser.add_argument("source", type=Path, help="a .jsonl file or a .parquet directory")
    parser.add_argument("target", type=Path, help="the log to write; its suffix says the format")
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    args = errors.parsed(parser, argv)
    from tqdm import tqdm

    from expert_profiler.log import conversion

    with tqdm(desc="converting", unit=" rows", unit_scale=True, delay=2) as bar:
        written = conversion.convert(args.source, args.target, args.force, bar.update)
    before, after = conversion.size(args.source), conversion.size(written[0])
    print(f"written  {', '.join(map(str, written))}")
    print(f"size     {before:,} -> {after:,} bytes")
    print(f"next: {resources.program()} hist {shlex.quote(str(written[0]))}")
    return 0
