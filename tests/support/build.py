# SPDX-License-Identifier: Apache-2.0
"""Small makers of layers, steps and routes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import settings
from vllm.moe_routes.capture.snapshot import Pending, Routes
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.writing.rows import RequestBook, RowTable, Step, StopRule
from vllm.platforms import current_platform

#: Where vLLM's custom ops run on this machine.
DEVICE = torch.device("cuda" if current_platform.is_cuda() else "cpu")

#: The same examples every time: a failure belongs to the change under test.
QUICK = settings(deadline=None, max_examples=60, derandomize=True, database=None)
THOROUGH = settings(QUICK, max_examples=200)


def a_layer(index: int, top_k: int = 2, num_experts: int = 8) -> MoELayer:
    name = f"model.layers.{index}.mlp.experts"
    return MoELayer(index, name, top_k, num_experts, "router", False, "softmax")


class Ready(NamedTuple):
    """A snapshot that is there already."""

    routes: Routes
    nbytes: int

    def resolve(self) -> Routes:
        return self.routes


def clean_routes(
    layers: Sequence[MoELayer],
    n: int,
    seed: int = 0,
    not_an_id: int = 255,
    token_ids: np.ndarray | None = None,
) -> Routes:
    """Valid routes of n tokens; columns past a layer's top_k hold ``not_an_id``."""
    rng = np.random.default_rng(seed)
    width = max(item.top_k for item in layers)
    dtype = np.uint8 if not_an_id == 255 else np.int16
    ids = np.full((n, len(layers), width), not_an_id, dtype=dtype)
    weights = np.zeros((n, len(layers), width), dtype=np.float32)
    for i, item in enumerate(layers):
        for t in range(n):
            ids[t, i, : item.top_k] = rng.permutation(item.num_experts)[: item.top_k]
        weights[:, i, : item.top_k] = rng.random((n, item.top_k), dtype=np.float32)
    return Routes(ids, weights, token_ids)


def a_pending(routes: Routes) -> Ready:
    return Ready(routes, routes.topk_ids.nbytes + routes.topk_weights.nbytes)


def a_step(
    rows: Sequence[tuple[str, int, int, int]] = (),
    *,
    forward_pass_id: int = 0,
    new: Mapping[str, StopRule | None] | None = None,
    joined: Mapping[str, StopRule] | None = None,
    finished: Sequence[str] = (),
    pending: Pending | None = None,
) -> Step:
    """A step from (raw request id, first position, rows, prompt length) of every request.

    Requests whose first position is 0 are new unless ``new`` says otherwise; ``joined`` are those
    that ran before the recording did.
    """
    if new is None:
        new = {raw_id: None for raw_id, first, _, _ in rows if first == 0}
    return Step(
        forward_pass_id=forward_pass_id,
        req_ids=[row[0] for row in rows],
        num_scheduled_tokens=np.array([row[2] for row in rows], dtype=np.int32),
        num_computed_tokens=np.array([row[1] for row in rows], dtype=np.int32),
        num_prompt_tokens=np.array([row[3] for row in rows], dtype=np.int32),
        new_requests=set(new),
        stop_rules={k: rule for k, rule in {**new, **(joined or {})}.items() if rule is not None},
        finished=finished,
        pending=pending,
    )


def a_table(n: int, flags: Sequence[int] | None = None, prompt: int = 1) -> RowTable:
    """The rows of one new request of n tokens, the first ``prompt`` of which are its prompt."""
    table = RequestBook().place(a_step([("r", 0, n, prompt)] if n else []), None)
    return table if flags is None else table._replace(flags=np.array(flags, dtype=np.uint8))


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    data = Path(path).read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]
