# SPDX-License-Identifier: Apache-2.0
"""The snapshot of a pass survives the passes after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vllm.moe_routes.capture.buffer import CaptureBuffer, allocate, moe_routes_capture
from vllm.moe_routes.capture.snapshot import (
    SNAPSHOTTERS,
    CudaStreams,
    HostSnapshotter,
    Pending,
    Routes,
    StreamSnapshotter,
    _StreamCopy,
)

from tests.support.build import QUICK, a_layer, clean_routes
from tests.support.streams import GARBAGE, FakeDevice, FakeStream, Order

LAYERS = [a_layer(0), a_layer(1)]
ROWS = 8
CPU = torch.device("cpu")


def _buffer() -> CaptureBuffer:
    return allocate(LAYERS, ROWS, CPU)


def _run_pass(buffer: CaptureBuffer, routes: Routes) -> None:
    """What the layers do in a forward pass; on tensors, so that a fake device can defer it."""
    for slot in range(len(LAYERS)):
        moe_routes_capture(
            buffer.ids,
            buffer.weights,
            torch.from_numpy(routes.topk_ids)[:, slot],
            torch.from_numpy(routes.topk_weights)[:, slot],
            0,
            slot,
        )


def _copy_of(pending: Pending) -> _StreamCopy:
    """What a snapshot under way keeps."""
    copy = pending.resolve.__self__  # type: ignore[attr-defined]
    assert isinstance(copy, _StreamCopy)
    return copy


def _same(found: Routes, meant: Routes) -> bool:
    return (
        np.array_equal(found.topk_ids, meant.topk_ids)
        and np.array_equal(found.topk_weights, meant.topk_weights)
        and np.array_equal(found.token_ids, meant.token_ids)  # type: ignore[arg-type]
    )


# ---- in host memory ------------------------------------------------------------------------


def test_a_host_snapshot_is_independent_of_later_passes() -> None:
    buffer, tokens = _buffer(), torch.arange(10, 10 + ROWS, dtype=torch.int32)
    first, second = (clean_routes(LAYERS, n, seed=n) for n in (5, 8))
    _run_pass(buffer, first)
    pending = HostSnapshotter().take(buffer, 5, tokens)
    _run_pass(buffer, second)
    tokens.fill_(0)
    buffer.clear()
    assert _same(pending.resolve(), first._replace(token_ids=np.arange(10, 15)))


@pytest.mark.parametrize("rows", [0, 5, ROWS])
def test_a_host_snapshot_takes_the_passs_rows_and_leaves_the_buffer_alone(rows: int) -> None:
    buffer = _buffer()
    _run_pass(buffer, clean_routes(LAYERS, ROWS))
    kept = buffer.ids.clone()
    pending = HostSnapshotter().take(buffer, rows, None)
    routes = pending.resolve()
    assert routes.topk_ids.shape == routes.topk_weights.shape == (rows, 2, 2)
    assert routes.token_ids is None
    assert pending.nbytes == routes.topk_ids.nbytes + routes.topk_weights.nbytes
    assert torch.equal(buffer.ids, kept)


# ---- in device memory ----------------------------------------------------------------------


def _compute_first(ready: Sequence[FakeStream]) -> FakeStream:
    return ready[0]


def _side_first(ready: Sequence[FakeStream]) -> FakeStream:
    return ready[-1]


def _passes_as_snapshotted(
    order: Order, make: Callable[[FakeDevice], StreamSnapshotter], passes: int = 3
) -> bool:
    """Run ``passes`` passes without waiting, then resolve: does each show its own rows?"""
    device = FakeDevice(order)
    buffer, tokens = _buffer(), torch.zeros(ROWS, dtype=torch.int32)
    snapshotter = make(device)
    meant: list[Routes] = []
    pending: list[Pending] = []
    for i in range(passes):
        n = ROWS - i
        ids = np.arange(100 * i, 100 * i + n, dtype=np.int32)
        routes = clean_routes(LAYERS, n, seed=i, token_ids=ids)
        new_tokens = torch.from_numpy(ids)
        with device:
            tokens[:n].copy_(new_tokens)
            _run_pass(buffer, routes)
            pending.append(snapshotter.take(buffer, n, tokens))
        meant.append(routes)
    return all(_same(item.resolve(), routes) for item, routes in zip(pending, meant, strict=True))


ORDERS = pytest.mark.parametrize("order", [_compute_first, _side_first])


@ORDERS
def test_a_device_snapshot_survives_the_passes_after_it(order: Order) -> None:
    assert _passes_as_snapshotted(order, StreamSnapshotter)


@QUICK
@given(st.randoms(use_true_random=False), st.integers(1, 5))
def test_a_device_snapshot_survives_in_any_order_of_the_streams(rnd: object, passes: int) -> None:
    choice: Order = rnd.choice  # type: ignore[attr-defined]
    assert _passes_as_snapshotted(choice, StreamSnapshotter, passes)


class _NoWait(StreamSnapshotter):
    """As ``StreamSnapshotter``, but the side stream doesn't wait for the clones."""

    def __init__(self, api: FakeDevice) -> None:
        super().__init__(api)
        self._side.wait_stream = lambda _: None


class _NoClone(StreamSnapshotter):
    """As ``StreamSnapshotter``, but it copies the buffer itself."""

    def take(self, buffer: CaptureBuffer, num_rows: int, token_ids: Tensor | None) -> Pending:
        clone = Tensor.clone
        Tensor.clone = lambda item: item  # type: ignore[method-assign]
        try:
            return super().take(buffer, num_rows, token_ids)
        finally:
            Tensor.clone = clone  # type: ignore[method-assign]


class _Forgetful(StreamSnapshotter):
    """As ``StreamSnapshotter``, but the clones are freed before the side stream read them."""

    def take(self, buffer: CaptureBuffer, num_rows: int, token_ids: Tensor | None) -> Pending:
        pending = super().take(buffer, num_rows, token_ids)
        _copy_of(pending)._clones.clear()
        return pending


@pytest.mark.parametrize(
    ("broken", "order"),
    [(_NoWait, _side_first), (_NoClone, _compute_first), (_Forgetful, _side_first)],
)
def test_the_fake_device_notices(
    broken: Callable[[FakeDevice], StreamSnapshotter], order: Order
) -> None:
    """What the tests above prove is worth something: each missing safeguard shows."""
    assert not _passes_as_snapshotted(order, broken)


def test_taking_a_device_snapshot_waits_for_nothing() -> None:
    device = FakeDevice(_compute_first)
    buffer = _buffer()
    with device:
        pending = StreamSnapshotter(device).take(buffer, ROWS, None)
    assert device.compute.done == 0
    assert all((item == GARBAGE).all() for item in _copy_of(pending)._copies)


@ORDERS
def test_a_device_snapshot_without_tokens_has_none(order: Order) -> None:
    device = FakeDevice(order)
    buffer = _buffer()
    routes = clean_routes(LAYERS, 3)
    with device:
        _run_pass(buffer, routes)
        pending = StreamSnapshotter(device).take(buffer, 3, None)
    assert _same(pending.resolve(), routes)
    assert pending.nbytes == routes.topk_ids.nbytes + routes.topk_weights.nbytes


@ORDERS
def test_clearing_the_buffer_for_the_next_pass_leaves_the_snapshot_whole(order: Order) -> None:
    device = FakeDevice(order)
    buffer, routes = _buffer(), clean_routes(LAYERS, 4)
    with device:
        _run_pass(buffer, routes)
        snapshotter = StreamSnapshotter(device)
        first = snapshotter.take(buffer, 4, None)
        buffer.clear(4)
        silent = snapshotter.take(buffer, 4, None)
    assert _same(first.resolve(), routes)
    assert (silent.resolve().topk_ids == buffer.not_an_id).all()


def test_host_and_device_snapshots_agree() -> None:
    host, device = _buffer(), FakeDevice(_side_first)
    routes, tokens = clean_routes(LAYERS, 6), torch.arange(ROWS, dtype=torch.int32)
    _run_pass(host, routes)
    on_device = _buffer()
    with device:
        _run_pass(on_device, routes)
        pending = StreamSnapshotter(device).take(on_device, 6, tokens)
    assert _same(pending.resolve(), HostSnapshotter().take(host, 6, tokens).resolve())


def test_the_device_types_with_a_snapshot_are_cpu_and_cuda() -> None:
    assert set(SNAPSHOTTERS) == {"cpu", "cuda"}
    assert isinstance(SNAPSHOTTERS["cpu"](), HostSnapshotter)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_snapshot_on_a_real_gpu_survives_the_passes_after_it() -> None:
    gpu = torch.device("cuda")
    buffer = allocate(LAYERS, ROWS, gpu)
    tokens = torch.zeros(ROWS, dtype=torch.int32, device=gpu)
    snapshotter = StreamSnapshotter(CudaStreams())
    meant, pending = [], []
    for i in range(50):
        ids = np.arange(100 * i, 100 * i + ROWS, dtype=np.int32)
        routes = clean_routes(LAYERS, ROWS, seed=i, token_ids=ids)
        tokens.copy_(torch.from_numpy(ids))
        for slot in range(len(LAYERS)):
            moe_routes_capture(
                buffer.ids,
                buffer.weights,
                torch.from_numpy(routes.topk_ids)[:, slot].to(gpu),
                torch.from_numpy(routes.topk_weights)[:, slot].to(gpu),
                0,
                slot,
            )
        pending.append(snapshotter.take(buffer, ROWS, tokens))
        meant.append(routes)
    for item, routes in zip(pending, meant, strict=True):
        assert _same(item.resolve(), routes)
