# SPDX-License-Identifier: Apache-2.0
"""What the patched vLLM files call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.moe_routes.capture.buffer import allocate
from vllm.moe_routes.capture.taps import Tap
from vllm.moe_routes.hooks import _log_moe_routes, _write_moe_log_header

from tests.support.build import DEVICE, a_layer


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def _layer() -> SimpleNamespace:
    layer = SimpleNamespace()
    _write_moe_log_header(layer)
    return layer


IDS = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32, device=DEVICE)
WEIGHTS = torch.tensor([[0.75, 0.25], [0.5, 0.5]], device=DEVICE)


def test_a_layer_is_born_without_a_tap() -> None:
    assert vars(_layer()) == {"moe_route_tap": None}


def test_while_recording_is_off_a_layer_runs_no_op() -> None:
    with _Counter() as counter:
        _log_moe_routes(_layer(), IDS, WEIGHTS)
    assert counter.seen == []


def test_while_recording_is_off_the_hook_leaves_nothing_in_a_compiled_graph() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def forward(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        _log_moe_routes(layer, ids, weights)
        return weights * 2

    layer = _layer()
    assert "moe_routes" not in make_fx(forward)(IDS, WEIGHTS).code
    buffer = allocate([a_layer(0)], 4, DEVICE)
    layer.moe_route_tap = Tap(buffer.ids, buffer.weights, 0)
    assert "moe_routes" in make_fx(forward)(IDS, WEIGHTS).code


def test_while_recording_is_on_a_layer_runs_the_one_op() -> None:
    buffer = allocate([a_layer(0), a_layer(1)], 4, DEVICE)
    layer = _layer()
    layer.moe_route_tap = Tap(buffer.ids, buffer.weights, 1)
    with _Counter() as counter:
        _log_moe_routes(layer, IDS, WEIGHTS, 2)
    assert counter.seen == [torch.ops.vllm.moe_routes_capture.default]
    assert buffer.ids[2:, 1].tolist() == IDS.tolist()
    assert buffer.weights[2:, 1].tolist() == WEIGHTS.tolist()
    assert (buffer.ids[:, 0] == buffer.not_an_id).all()
    assert (buffer.ids[:2] == buffer.not_an_id).all()


def test_without_a_chunk_the_first_row_is_row_zero() -> None:
    buffer = allocate([a_layer(0)], 4, DEVICE)
    layer = _layer()
    layer.moe_route_tap = Tap(buffer.ids, buffer.weights, 0)
    _log_moe_routes(layer, IDS, WEIGHTS)
    assert buffer.ids[:2, 0].tolist() == IDS.tolist()
