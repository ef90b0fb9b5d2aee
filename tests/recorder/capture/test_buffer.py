# SPDX-License-Identifier: Apache-2.0
"""The op in the hot path: what it writes, and what it may not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.forward_context import DPMetadata, ForwardContext, override_forward_context
from vllm.moe_routes.capture import buffer as capture
from vllm.moe_routes.capture.buffer import CaptureBuffer
from vllm.moe_routes.capture.taps import LogicalIds, Tap
from vllm.moe_routes.hooks import _log_moe_routes, _note_logical_ids
from vllm.moe_routes.writing.formats.jsonl import LineMaker
from vllm.moe_routes.writing.rows import PassRoutes
from vllm.moe_routes.writing.self_check import SelfCheck
from vllm.moe_routes.writing.verdicts import verdict

from tests.support.build import DEVICE, QUICK, a_layer, a_table

ROWS = 16


def _buffer(num_layers: int = 3, top_k: int = 2, num_experts: int = 8) -> CaptureBuffer:
    layers = [a_layer(i, top_k, num_experts) for i in range(num_layers)]
    return capture.allocate(layers, ROWS, DEVICE)


def _choices(
    n: int, k: int = 2, seed: int = 0, dtype: torch.dtype = torch.int32, num_experts: int = 8
) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    ids = torch.rand(n, num_experts, generator=made).argsort(dim=1)[:, :k].to(dtype)
    return ids.to(DEVICE), torch.rand(n, k, generator=made).to(DEVICE)


def _write(
    buffer: CaptureBuffer, ids: Tensor, weights: Tensor, row0: int = 0, slot: int = 0
) -> None:
    torch.ops.vllm.moe_routes_capture(buffer.ids, buffer.weights, ids, weights, row0, slot)


# ---- what it writes ------------------------------------------------------------------------


@QUICK
@given(
    n=st.integers(0, ROWS),
    row0=st.integers(0, ROWS),
    slot=st.integers(0, 2),
    columns=st.integers(1, 4),
    dtype=st.sampled_from([torch.int32, torch.int64, torch.int16, torch.uint8]),
    weight_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_only_the_rows_and_the_slot_meant_are_written(
    n: int, row0: int, slot: int, columns: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    n = min(n, ROWS - row0)
    buffer = _buffer(top_k=2)
    ids, weights = _choices(n, columns, dtype=dtype)
    weights = weights.to(weight_dtype)
    want_ids, want_weights = buffer.ids.clone(), buffer.weights.clone()
    for t in range(n):
        for j in range(min(columns, 2)):
            want_ids[row0 + t, slot, j] = int(ids[t, j])
            want_weights[row0 + t, slot, j] = float(weights[t, j])
    _write(buffer, ids, weights, row0, slot)
    assert torch.equal(buffer.ids, want_ids)
    assert torch.equal(buffer.weights, want_weights)


def test_fused_shared_experts_past_top_k_are_left_out() -> None:
    buffer = _buffer(top_k=2)
    _write(buffer, torch.tensor([[1, 2, 7]], device=DEVICE), torch.ones(1, 3, device=DEVICE))
    assert buffer.ids[0, 0].tolist() == [1, 2]


def test_a_layer_with_a_smaller_top_k_leaves_the_other_columns_marked() -> None:
    buffer = _buffer(top_k=4)
    _write(buffer, *_choices(1, 2), slot=1)
    assert (buffer.ids[0, 1] == buffer.not_an_id).tolist() == [False, False, True, True]


def test_a_shared_expert_in_a_narrow_layers_spare_column_reaches_neither_file_nor_check() -> None:
    """The buffer is as wide as the widest layer, so a fused shared expert may land behind."""
    layers = [a_layer(0, top_k=4), a_layer(1, top_k=2)]
    buffer = capture.allocate(layers, 1, DEVICE)
    _write(buffer, *_choices(1, 4), slot=0)
    shared = torch.tensor([[1, 6, 8]], device=DEVICE)  # 8 is no expert: there are 0 to 7
    _write(buffer, shared, torch.tensor([[0.75, 0.25, 1.0]], device=DEVICE), slot=1)
    ids, weights = buffer.ids.cpu().numpy(), buffer.weights.cpu().numpy()
    check = SelfCheck(layers, buffer.not_an_id)
    good = check.step(len(ids), ids, weights)
    assert good.all()
    assert verdict(check.checks())["verdict"] == "pass"
    one = PassRoutes(0, a_table(1), ids, weights, good)
    lines = b"".join(data for data, _ in LineMaker(layers).lines([one])).splitlines()
    assert b'"layer":1,"topk_ids":[1,6],"topk_weights":[0.75,0.25]' in lines[1]


def test_chunks_of_a_pass_stand_one_behind_the_other() -> None:
    whole, chunked = _buffer(), _buffer()
    ids, weights = _choices(10)
    _write(whole, ids, weights)
    for row0 in range(0, 10, 4):
        _write(chunked, ids[row0 : row0 + 4], weights[row0 : row0 + 4], row0)
    assert torch.equal(whole.ids, chunked.ids)
    assert torch.equal(whole.weights, chunked.weights)


def test_weights_are_kept_bit_for_bit() -> None:
    buffer = _buffer()
    weights = torch.tensor([[0.1, 1e-42], [float("inf"), 1.0 + 2**-23]], device=DEVICE)
    _write(buffer, _choices(2)[0], weights)
    assert torch.equal(buffer.weights[:2, 0], weights)


# ---- the buffer ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_experts", "dtype", "not_an_id"),
    [
        (8, torch.uint8, 255),
        (255, torch.uint8, 255),
        (256, torch.int16, -1),
        (512, torch.int16, -1),
    ],
)
def test_every_expert_id_survives_and_differs_from_no_id(
    num_experts: int, dtype: torch.dtype, not_an_id: int
) -> None:
    buffer = capture.allocate([a_layer(0, 1, num_experts)], num_experts, DEVICE)
    assert (buffer.ids.dtype, buffer.not_an_id) == (dtype, not_an_id)
    assert (buffer.ids == not_an_id).all()
    every = torch.arange(num_experts, device=DEVICE)[:, None]
    _write(buffer, every.to(torch.int32), torch.ones(num_experts, 1, device=DEVICE))
    assert buffer.ids[:, 0, 0].tolist() == list(range(num_experts))
    assert not (buffer.ids == not_an_id).any()


def test_the_buffer_fits_the_widest_layer_and_the_most_experts() -> None:
    layers = [a_layer(1, 2, 300), a_layer(3, 6, 8)]
    buffer = capture.allocate(layers, ROWS, DEVICE)
    assert buffer.ids.shape == buffer.weights.shape == (ROWS, 2, 6)
    assert buffer.ids.dtype == torch.int16
    assert buffer.weights.dtype == torch.float32
    assert buffer.nbytes == ROWS * 2 * 6 * (2 + 4)


def test_clearing_marks_the_rows_asked_for_and_no_others() -> None:
    buffer = _buffer()
    for slot in range(3):
        _write(buffer, *_choices(ROWS), slot=slot)
    buffer.clear(5)
    assert (buffer.ids[:5] == buffer.not_an_id).all()
    assert (buffer.ids[5:] != buffer.not_an_id).all()
    buffer.clear()
    assert (buffer.ids == buffer.not_an_id).all()


# ---- what a compiler knows of it -----------------------------------------------------------


def test_the_schema_declares_both_buffers_mutated_and_nothing_else() -> None:
    schema = torch.ops.vllm.moe_routes_capture.default._schema
    mutated = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    assert mutated == {"ids", "weights"}
    assert not schema.returns


def test_the_op_passes_torchs_own_checks() -> None:
    buffer = _buffer()
    args = (buffer.ids, buffer.weights, *_choices(5), 3, 1)
    torch.library.opcheck(torch.ops.vllm.moe_routes_capture.default, args)


def _forward(buffer: CaptureBuffer) -> Callable[[Tensor, Tensor], Tensor]:
    """A layer whose output doesn't depend on what the op wrote, as in the model."""

    def forward(ids: Tensor, weights: Tensor) -> Tensor:
        scaled = weights * 2
        torch.ops.vllm.moe_routes_capture(buffer.ids, buffer.weights, ids, scaled, 0, 1)
        return scaled.sum(dim=1)

    return forward


def test_compiled_code_keeps_the_op_for_every_number_of_tokens_without_recompiling() -> None:
    torch._dynamo.reset()
    buffer, eager = _buffer(), _buffer()
    graphs: list[str] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    compiled = torch.compile(_forward(buffer), backend=count, fullgraph=True, dynamic=True)
    for n in (7, 3, 12, 2):
        buffer.clear()
        eager.clear()
        ids, weights = _choices(n, seed=n)
        assert torch.equal(compiled(ids, weights), _forward(eager)(ids, weights))
        assert torch.equal(buffer.ids, eager.ids)
        assert torch.equal(buffer.weights[:n], eager.weights[:n])
        assert (buffer.ids[:n, 1] != buffer.not_an_id).all()
    assert len(graphs) == 1
    assert "moe_routes_capture" in graphs[0]


def test_a_traced_graph_keeps_the_op_after_dead_code_removal() -> None:
    buffer, inputs = _buffer(), _choices(4)
    graph = make_fx(_forward(buffer))(*inputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    buffer.clear()
    graph(*inputs)
    assert torch.equal(buffer.ids[:4, 1].long(), inputs[0].long())


def test_the_op_outlives_functionalization() -> None:
    """Inductor works on the functional form, where an op without known effects would be dead."""
    torch._dynamo.reset()
    functional: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        graph.graph.eliminate_dead_code()
        graph.recompile()
        functional.append(graph.code)
        return make_boxed_func(graph.forward)

    buffer, inputs = _buffer(), _choices(4)
    torch.compile(_forward(buffer), backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*inputs)
    assert len(functional) == 1
    assert "moe_routes_capture" in functional[0]
    assert torch.equal(buffer.ids[:4, 1].long(), inputs[0].long())


# ---- what a CUDA graph needs: recorded once, replayed without Python -----------------------


class _Recorder(TorchDispatchMode):
    """Keeps every kernel call with the very tensors it ran on, as a CUDA graph keeps addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.vllm.moe_routes_capture.default:
            with self:  # look inside: the op's kernels are what a graph records
                capture.moe_routes_capture(*args)
            return None
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, _ in self.calls:
            func(*args, **kwargs)


def test_a_replay_of_the_recorded_kernels_gives_a_fresh_runs_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer, fresh = _buffer(), _buffer()
    static_ids, static_weights = _choices(9)
    with _Recorder() as graph:
        for slot in range(3):
            _write(buffer, static_ids, static_weights, 0, slot)

    def no_python(*_: Any) -> None:
        raise AssertionError("a replay calls no Python")

    monkeypatch.setattr(capture, "moe_routes_capture", no_python)
    for seed in range(1, 5):
        ids, weights = _choices(9, seed=seed)
        static_ids.copy_(ids)
        static_weights.copy_(weights)
        buffer.clear()
        fresh.clear()
        graph.replay()
        for slot in range(3):
            _write(fresh, ids, weights, 0, slot)
        assert torch.equal(buffer.ids, fresh.ids)
        assert torch.equal(buffer.weights, fresh.weights)


def _kernels(buffer: CaptureBuffer, ids: Tensor, weights: Tensor) -> _Recorder:
    with _Recorder() as graph:
        _write(buffer, ids, weights, 2, 1)
    return graph


def test_the_op_is_two_copies_into_the_buffer_and_nothing_else() -> None:
    """No ``.item()``, no ``.cpu()``, no reduction: nothing that waits for the device."""
    graph = _kernels(_buffer(), *_choices(5))
    work = [func for func, _, _, _ in graph.calls if not func.is_view]
    assert work == [torch.ops.aten.copy_.default] * 2


def test_the_op_allocates_nothing() -> None:
    buffer, (ids, weights) = _buffer(), _choices(5, dtype=torch.int64)
    given_memory = {item.untyped_storage().data_ptr() for item in (*buffer[:2], ids, weights)}
    for _, _, _, result in _kernels(buffer, ids, weights).calls:
        assert result.untyped_storage().data_ptr() in given_memory


@pytest.mark.parametrize("dp_rank", [None, 1], ids=["alone", "data-parallel"])
@pytest.mark.parametrize("eplb", [False, True])
def test_the_armed_hook_is_the_two_copies_and_views_of_what_is_there(
    dp_rank: int | None, eplb: bool
) -> None:
    buffer, (ids, weights) = _buffer(), _choices(9)
    logical_ids = LogicalIds() if eplb else None
    router = SimpleNamespace(enable_eplb=eplb, moe_logical_ids=logical_ids)
    tap = Tap(buffer.ids, buffer.weights, 1, dp_rank, logical_ids)
    across = torch.tensor([4, 5])
    context = ForwardContext({}, {}, {}, 0, DPMetadata(across.max(), across))
    with override_forward_context(context), _Recorder() as graph:
        _note_logical_ids(router, ids)
        _log_moe_routes(SimpleNamespace(moe_route_tap=tap), ids, weights)
    work = [func for func, _, _, _ in graph.calls if not func.is_view]
    assert work == [torch.ops.aten.copy_.default] * 2
    given_memory = {item.untyped_storage().data_ptr() for item in (*buffer[:2], ids, weights)}
    for _, _, _, result in graph.calls:
        assert result.untyped_storage().data_ptr() in given_memory
    assert torch.equal(buffer.ids[: 5 if dp_rank else 9, 1].int(), ids[4 if dp_rank else 0 :])


def test_the_buffer_stays_where_it_is() -> None:
    buffer = _buffer()
    before = (buffer.ids.data_ptr(), buffer.weights.data_ptr())
    _write(buffer, *_choices(5))
    buffer.clear()
    assert (buffer.ids.data_ptr(), buffer.weights.data_ptr()) == before


@contextmanager
def _no_values() -> Iterator[FakeTensorMode]:
    """Tensors without values: whatever branches on one raises."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode


@pytest.mark.parametrize("through", ["op", "kernel"])
def test_the_op_looks_at_no_tensors_value(through: str) -> None:
    with _no_values():
        args = (
            torch.empty(ROWS, 3, 2, dtype=torch.uint8, device=DEVICE),
            torch.empty(ROWS, 3, 2, device=DEVICE),
            torch.empty(5, 2, dtype=torch.int32, device=DEVICE),
            torch.empty(5, 2, device=DEVICE),
            0,
            1,
        )
        if through == "op":
            assert torch.ops.vllm.moe_routes_capture(*args) is None
        else:
            assert capture.moe_routes_capture(*args) is None
