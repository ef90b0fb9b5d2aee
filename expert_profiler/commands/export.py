# SPDX-License-Identifier: Apache-2.0
"""Write a log's counts for the tools that consume them.

sglang    .pt   {"logical_count": int64 [steps, layers, experts]}, for SGLang's
                --init-expert-location. One step a forward pass, neighbouring passes added up where
                there are more than --steps. Row l is the model's layer l, zeros for a dense one.
eplb      .pt, .npy   float32 [MoE layers, experts], the ``weight`` of DeepSeek EPLB's
                rebalance_experts. Dense layers have no row; the layers are printed.
hot       .json, .csv   layer, expert, count, share (of the layer's choices), the hottest of each
                layer first, for offloading and pruning. All experts, or --top of each layer.
npz       .npz  counts int64 and weight_mass float64 [layers, phases, experts], rows int64
                [layers, phases], layers, phases, model_id.

Unmarked rows only. Rows in long runs of identical rows (warm-up logged as tokens) are left out
where others remain.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from expert_profiler import errors, files, resources
from expert_profiler.errors import UserError, positive

SUFFIXES = {
    "sglang": (".pt",),
    "eplb": (".pt", ".npy"),
    "hot": (".json", ".csv"),
    "npz": (".npz",),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="expert-profiler export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="next: expert-profiler report LOG --out DIR, to see what was exported",
    )
    add = parser.add_argument
    add("log", type=Path, metavar="LOG", help="a route log")
    add("--format", choices=tuple(SUFFIXES), required=True)
    add("--out", type=Path, required=True, metavar="FILE", help="file to write")
    add("--steps", type=positive, default=1000, help="sglang: most steps [1000]")
    add("--num-layers", type=positive, help="sglang: layers of the model [the last logged + 1]")
    add("--top", type=positive, help="hot: this many experts of each layer [all]")
    add("--force", action="store_true", help="replace an existing file")
    args = errors.parsed(parser, argv)
    suffixes = SUFFIXES[args.format]
    if args.out.suffix not in suffixes:
        raise UserError(
            f"--out {args.out} must end in {' or '.join(suffixes)} for --format {args.format}"
        )
    files.check_free(args.out, args.force, "--out")
    from expert_profiler.log import open_log
    from expert_profiler.report import exports

    options = exports.Options(args.out.suffix, args.steps, args.num_layers, args.top)
    with open_log(args.log) as log:
        if left_out := log.usable_rows().identical:
            print(f"{'note':<8}{left_out:,} rows in long runs of identical rows are left out")
        for note in log.lost_rows:
            print(f"{'note':<8}{note}")
        log.counts()  # refuses ids that the header does not allow
        content, summary = exports.FORMATS[args.format](log, options)
        lost = bool(log.lost_rows)
    files.write(args.out, content)
    print(f"{'written':<8}{args.out}: {summary}")
    print(f"next: {resources.program()} report {shlex.quote(str(args.log))} --out DIR")
    return 1 if lost else 0
