# SPDX-License-Identifier: Apache-2.0
"""Turn a log's counts into the bytes of a file that another tool reads.

Each export is ``(log, options) -> (content, one line that says what is in it)``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from expert_profiler.errors import UserError
from expert_profiler.log.route_log import RouteLog
from expert_profiler.log.schema import PHASES


class Options(NamedTuple):
    """What the command line says: of a format that takes a choice, the file's suffix says which.

    Attributes:
        suffix: of the file.
        steps: most steps of "sglang".
        num_layers: layers of the model; None: up to the last logged one.
        top: experts a layer of "hot"; None: all.
    """

    suffix: str
    steps: int
    num_layers: int | None = None
    top: int | None = None


def weight_mass(log: RouteLog) -> npt.NDArray[np.float64]:
    """[layers, phases, experts] float64: the sum of the weights with which an expert was chosen."""
    mass = np.zeros((len(log.layers), len(log.phases), log.num_experts))
    for layer, phase, expert, weight in log.query(
        "SELECT layer, phase, expert, sum(weight) FROM (SELECT layer, phase, "  # noqa: S608
        "unnest(topk_ids) AS expert, unnest(topk_weights) AS weight FROM routes "
        f"WHERE {log.usable_rows().condition}) GROUP BY ALL"
    ):
        mass[log.layers.index(layer), log.phases.index(PHASES[phase]), expert] = weight
    return mass


def logical_count(
    log: RouteLog, most_steps: int, num_layers: int | None = None
) -> npt.NDArray[np.int64]:
    """[steps, layers, experts] int64: choices a forward pass, or a window of passes.

    At most ``most_steps`` steps; steps without a row (a pass of flagged rows only) stay as zeros.
    num_layers: the model's, dense ones as zeros; default, up to the last logged layer. A log
    without forward passes is one step.
    """
    layers = num_layers or max(log.layers) + 1
    if layers <= max(log.layers):
        raise UserError(f"--num-layers {layers} is too few: the log has layer {max(log.layers)}")
    rows = f"FROM routes WHERE {log.usable_rows().condition}"
    [(first, last)] = log.query(f"SELECT min(forward_pass_id), max(forward_pass_id) {rows}")
    span = 1 if first is None else last - first + 1
    steps = min(span, most_steps)
    choices = log.query(
        "SELECT (coalesce(forward_pass_id - ?, 0) * ? // ?)::BIGINT, layer, expert, count(*) "  # noqa: S608
        f"FROM (SELECT forward_pass_id, layer, unnest(topk_ids) AS expert {rows}) GROUP BY ALL",
        [first or 0, steps, span],
    )
    found = np.zeros((steps, layers, log.num_experts), dtype=np.int64)
    if choices:
        step, layer, expert, count = np.array(choices, dtype=np.int64).T
        found[step, layer, expert] = count
    return found


def _sglang(log: RouteLog, options: Options) -> tuple[bytes, str]:
    import torch

    counts = logical_count(log, options.steps, options.num_layers)
    summary = f"logical_count {list(counts.shape)} (steps, layers, experts)"
    return _saved(torch.save, {"logical_count": torch.from_numpy(counts)}), summary


def _eplb(log: RouteLog, options: Options) -> tuple[bytes, str]:
    weight = log.counts(include_identical=False).values.sum(axis=1).astype(np.float32)
    layers = log.layers
    told = ", ".join(map(str, layers))
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        told = f"{layers[0]} to {layers[-1]}"
    summary = f"weight {list(weight.shape)} (MoE layers, experts), layers {told}"
    if options.suffix == ".npy":
        return _saved(lambda data, file: np.save(file, data), weight), summary
    import torch

    return _saved(torch.save, torch.from_numpy(weight)), summary


def _hot(log: RouteLog, options: Options) -> tuple[bytes, str]:
    records = []
    for layer, row in zip(
        log.layers, log.counts(include_identical=False).values.sum(axis=1), strict=True
    ):
        total = max(1, int(row.sum()))
        for expert in np.argsort(-row, kind="stable")[: options.top].tolist():
            count = int(row[expert])
            records.append(
                {"layer": layer, "expert": expert, "count": count, "share": count / total}
            )
    summary = f"{len(records):,} rows (layer, expert, count, share)"
    if options.suffix == ".csv":
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


def _npz(log: RouteLog, _: Options) -> tuple[bytes, str]:
    counts = log.counts(include_identical=False)
    arrays = {
        "counts": counts.values,
        "weight_mass": weight_mass(log),
        "rows": counts.rows,
        "layers": np.array(log.layers),
        "phases": np.array(log.phases),
        "model_id": np.array(log.meta.model_id),
    }
    content = _saved(lambda data, file: np.savez_compressed(file, **data), arrays)
    shape = list(counts.values.shape)
    return content, f"counts and weight_mass {shape} (layers, phases, experts)"


FORMATS: dict[str, Callable[[RouteLog, Options], tuple[bytes, str]]] = {
    "sglang": _sglang,
    "eplb": _eplb,
    "hot": _hot,
    "npz": _npz,
}


def _saved(save: Callable[[Any, io.BytesIO], Any], data: Any) -> bytes:
    file = io.BytesIO()
    save(data, file)
    return file.getvalue()
