# SPDX-License-Identifier: Apache-2.0
"""Building route logs and whole artifact folders for tests: sound unless a test breaks them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

PUBLIC_META_KEYS = (
    "type", "model_id", "vllm_version", "torch_version", "device", "seed", "layers_logged", "top_k"
)  # fmt: skip


def meta(
    layers: Sequence[int] = (0, 1), experts: int = 8, top_k: int = 2, **changes: Any
) -> Record:
    """The header of a run; ``changes`` replace or add keys."""
    return {
        "type": "meta",
        "model_id": "tiny/moe",
        "vllm_version": "0.15.1+cpu",
        "torch_version": "2.10.0",
        "device": "cpu",
        "seed": 1234,
        "layers_logged": list(layers),
        "top_k": top_k,
        "schema_version": 1,
        "num_experts": experts,
        "num_moe_layers": len(layers),
        "layers": [
            {
                "layer": layer,
                "name": f"model.layers.{layer}.mlp.experts",
                "top_k": top_k,
                "num_experts": experts,
                "source": "router",
            }
            for layer in layers
        ],
        "expert_ids": "logical",
        "files": ["moe_routes.jsonl"],
    } | changes


def public_meta(**changes: Any) -> Record:
    """A public logger's header: it stops at ``top_k``."""
    full = meta()
    return {key: full[key] for key in PUBLIC_META_KEYS} | changes


def route(
    req_id: str,
    token_idx: int,
    layer: int,
    topk_ids: Sequence[int],
    topk_weights: Sequence[float] | None = None,
    phase: str | None = "prefill",
    **changes: Any,
) -> Record:
    """One route line; ``phase=None`` makes it a public logger's."""
    weights = [1 / len(topk_ids)] * len(topk_ids) if topk_weights is None else list(topk_weights)
    record = {
        "type": "route",
        "req_id": req_id,
        "token_idx": token_idx,
        "layer": layer,
        "topk_ids": list(topk_ids),
        "topk_weights": weights,
    }
    if phase is not None:
        record |= {"phase": phase, "forward_pass_id": token_idx}
    return record | changes


def run_rows(
    lengths: Sequence[tuple[int, int]] = ((3, 4), (2, 5)),
    layers: Sequence[int] = (0, 1),
    experts: int = 8,
    top_k: int = 2,
) -> list[Record]:
    """All rows of requests with these (prompt, generated) lengths, routed in a fixed pattern."""
    rows = []
    for req, (prompt, generated) in enumerate(lengths):
        for position in range(prompt + generated - 1):
            for layer in layers:
                first = (req + position * (layer + 1)) % experts
                ids = [(first + k) % experts for k in range(top_k)]
                weights = [0.9 / (k + 1 + position) for k in range(top_k)]
                phase = "prefill" if position < prompt else "decode"
                rows.append(route(str(req), position, layer, ids, weights, phase))
    return rows


def write_log(
    path: Path,
    rows: Iterable[Record],
    header: Record | None = None,
    end: Record | None = None,
    finished: bool = True,
) -> Path:
    """Write header, rows and, if ``finished``, a true end record with the changes in ``end``."""
    rows = list(rows)
    body = b"".join(_line(record) for record in [meta() if header is None else header, *rows])
    routes = [row for row in rows if row.get("type") == "route"]
    if finished:
        body += _line(
            {
                "type": "end",
                "reason": "stop",
                "rows": len(routes),
                "rows_flagged": sum("flag" in row for row in routes),
                "passes": 1,
                "requests": len({row["req_id"] for row in routes}),
                "bytes": len(body),
                "drops": {"queue_full": 0},
                "self_check": {"verdict": "pass", "checks": []},
            }
            | (end or {})
        )
    path.write_bytes(body)
    return path


def write_public_log(path: Path, rows: Iterable[Record]) -> Path:
    stripped = [
        {key: value for key, value in row.items() if key not in ("phase", "forward_pass_id")}
        for row in rows
    ]
    return write_log(path, stripped, public_meta(), finished=False)


def write_outputs(path: Path, lengths: Sequence[tuple[int, int]] = ((3, 4), (2, 5))) -> Path:
    path.write_bytes(
        b"".join(
            _line(
                {
                    "req_id": str(req),
                    "prompt": "p",
                    "prompt_token_ids": [1] * prompt,
                    "token_ids": [2] * generated,
                    "text": "t",
                    "finish_reason": "length",
                }
            )
            for req, (prompt, generated) in enumerate(lengths)
        )
    )
    return path


def timing() -> Record:
    run = {"wall_time_sec": 2.0, "tokens_generated": 9, "tokens_per_sec": 4.5}
    return {"no_log": run | {"repeats": [run, run]}, "log": run | {"repeats": [run]}}


# The smallest PNG: one grey pixel.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a49444154789c6360000000020001e221bc330000000049454e44ae426082"
)


def write_run(folder: Path) -> Path:
    """A folder with all five artifacts of one sound run."""
    folder.mkdir(parents=True, exist_ok=True)
    write_log(folder / "moe_routes.jsonl", run_rows())
    write_outputs(folder / "outputs.jsonl")
    (folder / "timing.json").write_text(json.dumps(timing()))
    (folder / "prompts.txt").write_text("one\n\n---\n\ntwo")
    (folder / "expert_hist.png").write_bytes(PNG)
    return folder


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"
