# SPDX-License-Identifier: Apache-2.0
"""Say which full-precision models fit a GPU, with the arithmetic.

Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from expert_profiler import resources
from expert_profiler.errors import parsed
from expert_profiler.run import model_sizes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="expert-profiler models",
        description="Which full-precision presets fit a GPU, with the arithmetic.",
        epilog="next: expert-profiler compare gptq granite-3b --out DIR (runs both)",
    )
    parser.add_argument("--gib", type=float, default=16.0, help="free GPU memory in GiB [16]")
    args = parsed(parser, argv)
    print(model_sizes.table(args.gib))
    print(f"next: {resources.program()} compare gptq granite-3b --out DIR (runs both)")
    return 0
