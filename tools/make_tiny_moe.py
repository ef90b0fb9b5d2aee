#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Build a small Qwen2-MoE checkpoint with random weights, in any shape; see run/tiny_model.py.

.venv/bin/python tools/make_tiny_moe.py OUT_DIR [--layers N] [--experts N] [--top-k N] ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from expert_profiler.errors import parsed, run
from expert_profiler.run.tiny_model import TinyMoeSpec, build, holds


def main(argv: Sequence[str] | None = None) -> int:
    default = TinyMoeSpec()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(";")[0] + ".")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    for name, text in (
        ("layers", "decoder layers, each with experts"),
        ("experts", "experts a layer"),
        ("top-k", "experts a token"),
        ("hidden", "hidden size"),
        ("seed", "seed of the weights"),
    ):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} ({value})")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint in OUT_DIR")
    parser.add_argument("--reuse", action="store_true", help="keep it if it has these very options")
    args = parsed(parser, argv)
    spec = TinyMoeSpec(args.layers, args.experts, args.top_k, args.hidden, seed=args.seed)
    spec.check()
    if args.reuse and holds(args.out, spec):
        print(f"{args.out}: already built")
        return 0
    build(args.out, spec, force=args.force or args.reuse)
    size = sum(file.stat().st_size for file in args.out.iterdir()) / 1e6
    print(
        f"{args.out}: {spec.layers} layers, {spec.experts} experts, top-{spec.top_k}, "
        f"{size:.0f} MB, weights are random"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
