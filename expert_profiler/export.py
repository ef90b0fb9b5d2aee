"""Hand a log's statistics to the tools that consume them.

    python -m expert_profiler.export moe_routes.jsonl --format sglang --out logical_count.pt

sglang    .pt   {"logical_count": int64 [steps, layers, experts]}, for SGLang's
                --init-expert-location. One step a forward pass, neighbouring passes added up where
                there are more than --steps. Row l is the model's layer l, zeros for a dense one.
eplb      .pt, .npy   float32 [MoE layers, experts], the ``weight`` of DeepSeek EPLB's
                rebalance_experts. Dense layers have no row; the layers are printed.
hot       .json, .csv   layer, expert, count, share (of the layer's choices), the hottest of each
                layer first, for offloading and pruning. All experts, or --top of each layer.
npz       .npz  counts int64 and weight_mass float64 [layers, phases, experts], rows int64
                [layers, phases], layers, phases, model_id.

Unmarked rows only. Rows in long runs of identical rows (warm-up logged as tokens) are left out.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_profiler import errors
from expert_profiler.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from expert_profiler.log.route_log import RouteLog

SUFFIXES = {
    "sglang": (".pt",),
    "eplb": (".pt", ".npy"),
    "hot": (".json", ".csv"),
    "npz": (".npz",),
}
_TABLE = """
SELECT layer, phase, expert, count(*), sum(weight)
FROM (SELECT layer, phase, unnest(topk_ids) AS expert, unnest(topk_weights) AS weight
      FROM routes WHERE {where})
GROUP BY ALL
"""


def main(argv: list[str] | None = None) -> int:
    args = errors.parsed(_parser(), argv)
    _check_output(args)
    from expert_profiler.log import tokens
    from expert_profiler.log.route_log import open_log

    with open_log(args.log, weights=True) as log:
        where = tokens.UNFLAGGED
        if runs := log.contamination.rows:
            tokens.find_identical_runs(log)
            where = tokens.CLEAN
            print(f"{'note':<8}{runs:,} rows in long runs of identical rows are left out")
        for note in log.lost_rows:
            print(f"{'note':<8}{note}")
        log.counts()  # refuses ids that the header does not allow
        content, summary = _FORMATS[args.format](log, where, args)
        lost = bool(log.lost_rows)
    _write(args.out, content)
    print(f"{'written':<8}{args.out}: {summary}")
    print(f"next: python3 make_hist.py {shlex.quote(str(args.log))} --report DIR")
    return 1 if lost else 0


# ---- the counts --------------------------------------------------------------------------------


def count_table(
    log: RouteLog, where: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """(counts, weight mass) [layers, phases, experts] and rows [layers, phases]."""
    import numpy as np

    from expert_profiler.log.findings import PHASES

    phases = log.counts().phases
    shape = len(log.layers), len(phases), log.num_experts
    counts = np.zeros(shape, dtype=np.int64)
    mass, rows = np.zeros(shape), np.zeros(shape[:2], dtype=np.int64)
    layer_at = {layer: place for place, layer in enumerate(log.layers)}
    phase_at = {PHASES.index(phase): place for place, phase in enumerate(phases)}
    for layer, phase, expert, count, weight in log.query(_TABLE.format(where=where)):
        cell = layer_at[layer], phase_at[phase], expert
        counts[cell], mass[cell] = count, weight
    for layer, phase, number in log.query(
        f"SELECT layer, phase, count(*) FROM routes WHERE {where} GROUP BY ALL"  # noqa: S608
    ):
        rows[layer_at[layer], phase_at[phase]] = number
    return counts, mass, rows


def logical_count(
    log: RouteLog, where: str, most_steps: int, num_layers: int | None = None
) -> npt.NDArray[np.int64]:
    """[steps, layers, experts] int64: choices a forward pass, or a window of passes.

    At most ``most_steps`` steps; steps without a row (a pass of flagged rows only) stay as zeros.
    layers: the model's, dense ones as zeros; default, up to the last logged layer. A log without
    forward passes is one step.
    """
    import numpy as np

    layers = num_layers or max(log.layers) + 1
    if layers <= max(log.layers):
        raise UserError(f"--num-layers {layers} is too few: the log has layer {max(log.layers)}")
    [(first, last)] = log.query(
        f"SELECT min(forward_pass_id), max(forward_pass_id) FROM routes WHERE {where}"  # noqa: S608
    )
    span = 1 if first is None else last - first + 1
    steps = min(span, most_steps)
    found = np.zeros((steps, layers, log.num_experts), dtype=np.int64)
    sql = f"""
        SELECT (coalesce(forward_pass_id - ?, 0) * ? // ?)::BIGINT AS step, layer, expert, count(*)
        FROM (SELECT forward_pass_id, layer, unnest(topk_ids) AS expert FROM routes WHERE {where})
        GROUP BY ALL"""  # noqa: S608
    rows = log.query(sql, [first or 0, steps, span])
    if rows:
        step, layer, expert, count = np.array(rows, dtype=np.int64).T
        found[step, layer, expert] = count
    return found


# ---- the formats: each gives (bytes, what is in them) ------------------------------------------


def _sglang(log: RouteLog, where: str, args: argparse.Namespace) -> tuple[bytes, str]:
    import torch

    counts = logical_count(log, where, args.steps, args.num_layers)
    summary = f"logical_count {list(counts.shape)} (steps, layers, experts)"
    return _saved(torch.save, {"logical_count": torch.from_numpy(counts)}), summary


def _eplb(log: RouteLog, where: str, args: argparse.Namespace) -> tuple[bytes, str]:
    import numpy as np

    counts, _, _ = count_table(log, where)
    weight = counts.sum(axis=1).astype(np.float32)
    summary = f"weight {list(weight.shape)} (MoE layers, experts), layers {_listed(log.layers)}"
    if args.out.suffix == ".npy":
        return _saved(lambda data, file: np.save(file, data), weight), summary
    import torch

    return _saved(torch.save, torch.from_numpy(weight)), summary


def _hot(log: RouteLog, where: str, args: argparse.Namespace) -> tuple[bytes, str]:
    import numpy as np

    counts, _, _ = count_table(log, where)
    records = []
    for layer, row in zip(log.layers, counts.sum(axis=1), strict=True):
        total = max(1, int(row.sum()))
        for expert in np.argsort(-row, kind="stable")[: args.top]:
            count = int(row[expert])
            records.append(
                {"layer": layer, "expert": int(expert), "count": count, "share": count / total}
            )
    summary = f"{len(records):,} rows (layer, expert, count, share)"
    if args.out.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue().encode(), summary
    data = {
        "model_id": log.meta.model_id,
        "num_experts": log.num_experts,
        "top_k": log.meta.top_k,
        "experts": records,
    }
    return json.dumps(data, indent=1).encode() + b"\n", summary


def _npz(log: RouteLog, where: str, args: argparse.Namespace) -> tuple[bytes, str]:
    import numpy as np

    del args
    counts, mass, rows = count_table(log, where)
    arrays = {
        "counts": counts,
        "weight_mass": mass,
        "rows": rows,
        "layers": np.array(log.layers),
        "phases": np.array(log.counts().phases),
        "model_id": np.array(log.meta.model_id),
    }
    content = _saved(lambda data, file: np.savez_compressed(file, **data), arrays)
    return content, f"counts and weight_mass {list(counts.shape)} (layers, phases, experts)"


_FORMATS: dict[str, Callable[[RouteLog, str, argparse.Namespace], tuple[bytes, str]]] = {
    "sglang": _sglang,
    "eplb": _eplb,
    "hot": _hot,
    "npz": _npz,
}


def _saved(save: Callable[[Any, io.BytesIO], Any], data: Any) -> bytes:
    file = io.BytesIO()
    save(data, file)
    return file.getvalue()


# ---- the command line --------------------------------------------------------------------------


def _check_output(args: argparse.Namespace) -> None:
    suffixes = SUFFIXES[args.format]
    if args.out.suffix not in suffixes:
        raise UserError(
            f"--out {args.out} must end in {' or '.join(suffixes)} for --format {args.format}"
        )
    if not args.out.parent.is_dir():
        raise UserError(f"no directory {args.out.parent}; make it: mkdir -p {args.out.parent}")
    if args.out.exists() and not args.out.is_file():
        raise UserError(f"--out {args.out} is no plain file; choose another --out")
    if args.out.exists() and not args.force:
        raise UserError(f"{args.out} exists; replace it with --force, or choose another --out")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from None
    finally:
        scratch.unlink(missing_ok=True)


def _listed(layers: tuple[int, ...]) -> str:
    if layers == tuple(range(layers[0], layers[-1] + 1)) and len(layers) > 1:
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m expert_profiler.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("log", type=Path, metavar="LOG", help="a route log")
    add("--format", choices=tuple(SUFFIXES), required=True)
    add("--out", type=Path, required=True, metavar="FILE", help="file to write")
    add("--steps", type=_positive, default=1000, help="sglang: most steps [1000]")
    add("--num-layers", type=_positive, help="sglang: layers of the model [the last logged + 1]")
    add("--top", type=_positive, help="hot: this many experts of each layer [all]")
    add("--force", action="store_true", help="replace an existing file")
    return parser


if __name__ == "__main__":
    sys.exit(errors.run(main))
