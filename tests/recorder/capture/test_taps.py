# SPDX-License-Identifier: Apache-2.0
"""Under EPLB the log holds logical ids, whatever replicas a router sends its tokens to."""

from __future__ import annotations

import ast
import gc
import inspect
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vllm.distributed.eplb.eplb_state import EplbLayerState
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router import base_router
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.moe_routes.capture.buffer import CaptureBuffer, allocate
from vllm.moe_routes.capture.taps import LogicalIds, Tap
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.hooks import _log_moe_routes, _write_moe_log_header

from tests.support.build import DEVICE, QUICK, a_layer

LOGICAL, REDUNDANT, TOP_K, ROWS = 8, 4, 2, 16


def _vllms_mapping() -> Callable[..., Tensor]:
    """``eplb_map_to_physical_and_record`` as CUDA runs it; on CPU vLLM defines a no-op."""
    tree = ast.parse(inspect.getsource(base_router))
    (branch,) = (node for node in tree.body if isinstance(node, ast.If))
    (function,) = (node for node in branch.body if isinstance(node, ast.FunctionDef))
    function.decorator_list = []
    names: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([function], []), base_router.__file__, "exec"), names)  # noqa: S102
    mapping: Callable[..., Tensor] = names["eplb_map_to_physical_and_record"]
    return mapping


@pytest.fixture(autouse=True)
def _map_as_cuda_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", _vllms_mapping())


class StubRouter(BaseRouter):
    """vLLM's router, except that the choices are given."""

    def __init__(self, eplb: bool = True, indices_type: torch.dtype | None = None) -> None:
        super().__init__(TOP_K, LOGICAL, EplbLayerState(), eplb, lambda: indices_type)
        self.choices = torch.empty(0)

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.Default

    def _compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        del hidden_states, router_logits, indices_type
        return torch.rand(self.choices.shape, device=DEVICE), self.choices.clone()

    def rebalance(self, seed: int) -> Tensor:
        """Shuffle the experts and choose others to replicate; return [physical] logical ids."""
        made = torch.Generator().manual_seed(seed)
        extra = torch.randint(0, LOGICAL, (REDUNDANT,), generator=made)
        physical = torch.cat([torch.arange(LOGICAL), extra])
        physical = physical[torch.randperm(len(physical), generator=made)]
        replicas = [(physical == i).nonzero().flatten() for i in range(LOGICAL)]
        width = REDUNDANT + 1
        table = torch.full((LOGICAL, width), -1)
        for i, places in enumerate(replicas):
            table[i, : len(places)] = places
        state = self.eplb_state
        state.expert_load_view = torch.zeros(len(physical), dtype=torch.int32, device=DEVICE)
        state.logical_to_physical_map = table.to(DEVICE)
        state.logical_replica_count = torch.tensor([len(r) for r in replicas], device=DEVICE)
        return physical.to(DEVICE)


def _tapped(router: StubRouter) -> tuple[SimpleNamespace, CaptureBuffer]:
    """A recorded layer with this router, as ``recorder.attach`` leaves it."""
    buffer = allocate([a_layer(0, TOP_K, LOGICAL)], ROWS, DEVICE)
    layer = SimpleNamespace(router=router)
    _write_moe_log_header(layer)
    logical_ids = LogicalIds() if router.enable_eplb else None
    if logical_ids is not None:
        router.moe_logical_ids = logical_ids  # type: ignore[attr-defined]
    layer.moe_route_tap = Tap(buffer.ids, buffer.weights, 0, logical_ids=logical_ids)
    return layer, buffer


def _forward(layer: SimpleNamespace, n: int) -> tuple[Tensor, Tensor]:
    """The lines of ``FusedMoE.forward_impl`` around the hook."""
    weights, ids = layer.router.select_experts(torch.empty(n, 1), torch.empty(n, 1))
    _log_moe_routes(layer, ids, weights)
    return weights, ids


def _choices(n: int, seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.rand(n, LOGICAL, generator=made).argsort(dim=1)[:, :TOP_K].int().to(DEVICE)


@QUICK
@given(
    passes=st.lists(
        st.tuples(st.integers(0, ROWS), st.booleans(), st.integers(0, 999)), min_size=2, max_size=6
    ),
    indices_type=st.sampled_from([None, torch.int32, torch.int64, torch.uint32]),
)
def test_ids_are_logical_with_replicas_and_through_every_rebalance(
    passes: list[tuple[int, bool, int]], indices_type: torch.dtype | None
) -> None:
    router = StubRouter(indices_type=indices_type)
    layer, buffer = _tapped(router)
    owner = router.rebalance(0)
    for n, rebalanced, seed in passes:
        if rebalanced:
            owner = router.rebalance(seed)
        router.choices = _choices(n, seed)
        buffer.clear()
        weights, physical = _forward(layer, n)
        # What the kernel gets are physical ids of exactly these logical experts.
        assert torch.equal(owner[physical.long()], router.choices.long())
        assert torch.equal(buffer.ids[:n, 0].int(), router.choices)
        assert torch.equal(buffer.weights[:n, 0], weights)
        assert (buffer.ids[n:] == buffer.not_an_id).all()


def test_physical_ids_would_differ() -> None:
    """Else the test above would pass without the hook in the router."""
    router = StubRouter()
    layer, _ = _tapped(router)
    router.rebalance(3)
    router.choices = _choices(ROWS, 3)
    _, physical = _forward(layer, ROWS)
    assert int((physical.int() != router.choices).sum()) > ROWS
    assert int(physical.max()) >= LOGICAL


def test_the_layers_own_gathered_rows_are_cut_from_the_logical_ids_too() -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import DPMetadata, ForwardContext, override_forward_context

    router = StubRouter()
    layer, buffer = _tapped(router)
    layer.moe_route_tap = layer.moe_route_tap._replace(dp_rank=1)
    router.rebalance(1)
    router.choices = _choices(9, 1)
    tokens = torch.tensor([4, 5])
    context = ForwardContext({}, {}, {}, 0, DPMetadata(tokens.max(), tokens), CUDAGraphMode.NONE)
    with override_forward_context(context):
        _forward(layer, 9)
    assert torch.equal(buffer.ids[:5, 0].int(), router.choices[4:])
    assert (buffer.ids[5:] == buffer.not_an_id).all()


def test_without_eplb_the_ids_are_those_that_the_router_returns() -> None:
    router = StubRouter(eplb=False)
    layer, buffer = _tapped(router)
    router.choices = _choices(5, 0)
    _, ids = _forward(layer, 5)
    assert torch.equal(ids, router.choices)
    assert torch.equal(buffer.ids[:5, 0].int(), ids)
    assert not hasattr(router, "moe_logical_ids")


@pytest.mark.parametrize("eplb", [True, False])
def test_while_recording_is_off_the_router_keeps_nothing(eplb: bool) -> None:
    router = StubRouter(eplb)
    layer = SimpleNamespace(router=router)
    _write_moe_log_header(layer)
    router.rebalance(0)
    router.choices = _choices(5, 0)
    before = set(vars(router))
    _forward(layer, 5)
    assert set(vars(router)) == before


def test_a_pass_leaves_no_tensor_behind() -> None:
    """A CUDA graph's memory would be kept, and the next pass could be given old ids."""
    kept: list[weakref.ref[Tensor]] = []

    class Watched(StubRouter):
        def _compute_routing(self, *args: Any) -> tuple[Tensor, Tensor]:
            weights, ids = super()._compute_routing(*args)
            kept.append(weakref.ref(ids))
            return weights, ids

    router = Watched()
    layer, _ = _tapped(router)
    router.rebalance(0)
    router.choices = _choices(5, 0)
    _forward(layer, 5)
    gc.collect()
    assert [item() for item in kept] == [None]
    with pytest.raises(RouteLogError, match="without noting their logical ids"):
        _log_moe_routes(layer, router.choices, torch.ones(5, TOP_K))


@pytest.mark.parametrize("armed", [False, True])
def test_a_traced_router_without_eplb_has_no_op_and_no_graph_break(armed: bool) -> None:
    torch._dynamo.reset()
    router = StubRouter(eplb=False)
    layer, buffer = _tapped(router)
    if not armed:
        layer.moe_route_tap = None
    router.choices = _choices(5, 0)
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch.compile(lambda: _forward(layer, 5), backend=keep, fullgraph=True)()
    assert len(graphs) == 1
    assert ("moe_routes_capture" in graphs[0]) == armed
    assert (buffer.ids[:5] != buffer.not_an_id).all() == armed
