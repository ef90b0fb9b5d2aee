"""Every real row lands at its own place, however vLLM spreads a pass over ranks and calls.

The spreading is vLLM's own code: ``FusedMoE.forward_impl`` and ``forward_impl_chunked`` on a
stand-in for the layer, the all-gather dispatch, the sequence-parallel chunk, the micro-batch
slices and the data-parallel sizes. Only the collectives are simulated: ranks run one after another
and a gather is handed the rows of all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.distributed.device_communicators import all2all
from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
from vllm.forward_context import (
    BatchDescriptor,
    DPMetadata,
    ForwardContext,
    override_forward_context,
)
from vllm.model_executor.layers.fused_moe import layer as layer_module
from vllm.model_executor.layers.fused_moe.fused_moe_modular_method import FusedMoEModularMethod
from vllm.model_executor.layers.fused_moe.layer import FusedMoE
from vllm.model_executor.models import utils as model_utils
from vllm.moe_routes.capture.buffer import CaptureBuffer, allocate
from vllm.moe_routes.capture.row_layout import Batch, Layout, Rows, locate, ubatch_row0
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.hooks import Tap
from vllm.v1.worker import ubatching
from vllm.v1.worker.ubatch_utils import is_last_ubatch_empty, maybe_create_ubatch_slices

from tests.support.build import DEVICE, THOROUGH, a_layer

#: Ids of padding start here; a real row's id says its data-parallel rank and its row.
PADDING = 20_000


class World(NamedTuple):
    """How one pass is spread.

    Attributes:
        real: [dp] scheduled tokens of every data-parallel rank; none where it runs a dummy batch.
        padded: [dp] the same, padded.
        tp: tensor-parallel ranks of each.
        sequence_parallel: whether they split their tokens.
        kernel: "naive" (dispatched), "modular" (dispatches later) or "chunked" (so does it).
        chunk: tokens of a chunk.
        num_ubatches: micro-batches.
    """

    real: list[int]
    padded: list[int]
    tp: int
    sequence_parallel: bool
    kernel: str
    chunk: int
    num_ubatches: int

    def tokens(self, dp: int) -> Tensor:
        """[padded, 1] the rows of a data-parallel rank."""
        row = torch.arange(self.padded[dp], device=DEVICE)
        ids = row + 1000 * dp
        return torch.where(row < self.real[dp], ids, ids + PADDING).float()[:, None]

    def ubatches(self, dp: int) -> list[slice]:
        """Token slices that vLLM makes of a pass."""
        _, slices = maybe_create_ubatch_slices(
            self.num_ubatches > 1,
            np.array([self.real[dp]], dtype=np.int32),
            self.padded[dp],
            1,
            self.num_ubatches,
        )
        if slices is None:
            return [slice(0, self.padded[dp])]
        return [item.token_slice for item in slices]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    dp, tp = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    real = draw(st.lists(st.integers(0, 40), min_size=dp, max_size=dp))
    # CUDA graphs pad to one of some sizes, data-parallel ranks and micro-batches all to the same.
    num_ubatches = draw(st.sampled_from([1, 1, 2, 3]))
    multiple = draw(st.sampled_from([1, 1, 8]))
    padded = [max(-(-n // multiple) * multiple, 1) for n in real]
    if num_ubatches > 1 or draw(st.booleans()):
        padded = [max(padded)] * dp
    if num_ubatches > 1:
        assume(not is_last_ubatch_empty(min(real), padded[0], num_ubatches))
        assume(padded[0] >= num_ubatches)
    kernel = draw(st.sampled_from(["naive", "modular", "chunked"]))
    chunk = draw(st.integers(1, 50))
    return World(real, padded, tp, tp > 1 and draw(st.booleans()), kernel, chunk, num_ubatches)


class _Router:
    def select_experts(self, hidden_states: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        assert hidden_states.shape == router_logits.shape
        return router_logits / 2, router_logits.int()


class _Method:
    is_monolithic = False

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        assert len(x) == len(topk_ids) == len(topk_weights)
        return x


class _ModularMethod(FusedMoEModularMethod):
    is_monolithic = False
    apply = _Method.apply

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)


def _moe(world: World, dp: int, tp: int) -> tuple[SimpleNamespace, CaptureBuffer]:
    """A recorded layer of this rank, in place of a ``FusedMoE``, and its buffer."""
    most = -(-max(world.padded) // world.tp) * world.tp
    buffer = allocate([a_layer(0, 1, 1 << 15)], most, DEVICE)
    sp_size = world.tp if world.sequence_parallel else 1
    layout = Layout(dp, sp_size, tp if world.sequence_parallel else 0, world.num_ubatches)
    staged = (world.chunk, 1) if world.num_ubatches == 1 else (world.num_ubatches, world.chunk, 1)
    moe = SimpleNamespace(
        ensure_moe_quant_config_init=lambda: None,
        ensure_dp_chunking_init=lambda: None,
        _maybe_setup_shared_experts_stream=lambda *_: (False, None),
        use_dp_chunking=world.kernel == "chunked",
        moe_config=SimpleNamespace(max_num_tokens=world.chunk),
        batched_hidden_states=torch.zeros(staged, device=DEVICE),
        batched_router_logits=torch.zeros(staged, device=DEVICE),
        quant_method=_Method() if world.kernel == "naive" else _ModularMethod(),
        router=_Router(),
        shared_experts=None,
        gate=None,
        capture=None,
        use_ep=True,
        dp_size=len(world.real),
        pcp_size=1,
        is_sequence_parallel=world.sequence_parallel,
        sp_size=sp_size,
        moe_route_tap=Tap(buffer.ids, buffer.weights, 0, layout),
    )
    moe.forward_impl_chunked = partial(FusedMoE.forward_impl_chunked, moe)
    return moe, buffer


def _rows(world: World, dp: int, tp: int, ubatch: int) -> Tensor:
    """What a rank's MoE layer is given."""
    rows = world.tokens(dp)[world.ubatches(dp)[ubatch]]
    if not world.sequence_parallel:
        return rows
    patch = mock.patch.object
    with (
        patch(model_utils, "get_tensor_model_parallel_world_size", lambda: world.tp),
        patch(model_utils, "get_tensor_model_parallel_rank", lambda: tp),
    ):
        shard: Tensor = model_utils.sequence_parallel_chunk_impl(rows)
        return shard


@contextmanager
def _rank(world: World, dp: int, tp: int, ubatch: int) -> Iterator[None]:
    """The groups, the context and the micro-batch thread that a rank finds itself in."""

    every_tp = range(world.tp) if world.sequence_parallel else range(1)
    parts = [_rows(world, of, rank, ubatch) for of in range(len(world.real)) for rank in every_tp]

    def all_gatherv(tensors: list[Tensor], dim: int, sizes: list[int]) -> list[Tensor]:
        assert (dim, sizes) == (0, [len(part) for part in parts])
        return [torch.cat(parts)] * len(tensors)

    def group(rank: int) -> SimpleNamespace:
        dispatch = partial(AgRsAll2AllManager.dispatch, None)
        return SimpleNamespace(
            rank_in_group=rank,
            all_gatherv=all_gatherv,
            dispatch=dispatch,
            combine=lambda states, _: states,
        )

    cuts = [world.ubatches(of)[ubatch] for of in range(len(world.real))]
    tokens = torch.tensor([cut.stop - cut.start for cut in cuts])
    context = ForwardContext(
        {},
        {},
        {},
        0,
        DPMetadata(tokens.max(), tokens),
        CUDAGraphMode.NONE,
        BatchDescriptor(world.padded[dp]),
    )
    patch = mock.patch.object
    ep_group, dp_group = group(dp * world.tp + tp), group(dp)
    threads = {threading.get_ident(): ubatch} if world.num_ubatches > 1 else {}
    with ExitStack() as stack:
        for change in (
            patch(layer_module, "get_ep_group", lambda: ep_group),
            patch(all2all, "get_ep_group", lambda: ep_group),
            patch(all2all, "get_dp_group", lambda: dp_group),
            patch(ubatching, "_THREAD_ID_TO_CONTEXT", threads),
            override_forward_context(context),
        ):
            stack.enter_context(change)
        yield


def _run(world: World, dp: int, tp: int) -> CaptureBuffer:
    """One pass of one layer on one rank."""
    moe, buffer = _moe(world, dp, tp)
    for ubatch in range(len(world.ubatches(dp))):
        rows = _rows(world, dp, tp, ubatch)
        with _rank(world, dp, tp, ubatch):
            FusedMoE.forward_impl(moe, rows, rows)
    return buffer


def _check(world: World) -> None:
    for dp, (real, padded) in enumerate(zip(world.real, world.padded, strict=True)):
        buffers = [_run(world, dp, tp) for tp in range(world.tp)]
        ids = torch.stack([buffer.ids[:, 0, 0] for buffer in buffers]).long()
        weights = torch.stack([buffer.weights[:, 0, 0] for buffer in buffers])
        written = ids != buffers[0].not_an_id
        want = torch.arange(padded, device=DEVICE) + 1000 * dp
        want[real:] += PADDING
        own = torch.where(written[:, :padded], ids[:, :padded], want)
        assert torch.equal(own, want.expand(world.tp, -1)), "a row stands in another row's place"
        assert torch.equal(torch.where(written, ids / 2, 0).float(), weights)
        times = written[:, :padded].sum(dim=0)
        assert (times == (1 if world.sequence_parallel else world.tp)).all()
        assert not written[:, padded:].any(), "something was written past the pass's rows"


@THOROUGH
@given(worlds())
def test_every_row_lands_once_at_its_own_place_and_nothing_else_does(world: World) -> None:
    _check(world)


@pytest.mark.parametrize("kernel", ["naive", "modular", "chunked"])
@pytest.mark.parametrize("num_ubatches", [1, 2, 3])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_odd_sizes_in_every_combination(
    kernel: str, num_ubatches: int, sequence_parallel: bool
) -> None:
    """Shards, chunks and micro-batches that all leave a remainder."""
    _check(World([29, 31], [31, 31], 4, sequence_parallel, kernel, 3, num_ubatches))


def test_an_idle_ranks_dummy_batch_takes_no_place() -> None:
    _check(World([5, 0, 3], [5, 1, 3], 1, False, "naive", 1, 1))


def test_chunks_past_the_last_token_rewrite_its_row_and_no_other() -> None:
    """A rank goes on in lockstep with the longest one; vLLM clamps the chunk to the last row."""
    _check(World([2, 40], [2, 40], 1, False, "chunked", 4, 1))
    layout, batch = Layout(0), Batch([2, 40])
    assert locate(1, 1, layout, batch) == Rows(0, 1, 1)


def test_a_shards_padding_does_not_reach_the_next_micro_batch() -> None:
    """6 tokens on 4 ranks are shards of 2: the last one is padding and lies on the next batch."""
    assert locate(2, 0, Layout(0, 4, 3), Batch([6, 6])).size == 0
    assert locate(2, 0, Layout(0, 4, 2), Batch([6, 6], row0=6)) == Rows(0, 2, 10)


@pytest.mark.parametrize(
    ("num_tokens", "num_ubatches", "rows"), [(8, 2, [0, 4]), (9, 2, [0, 4]), (11, 3, [0, 3, 6])]
)
def test_micro_batches_begin_where_vllm_cuts(
    num_tokens: int, num_ubatches: int, rows: list[int]
) -> None:
    assert [ubatch_row0(i, num_tokens, num_ubatches) for i in range(num_ubatches)] == rows
    world = World([num_tokens], [num_tokens], 1, False, "naive", 1, num_ubatches)
    assert [cut.start for cut in world.ubatches(0)] == rows


@pytest.mark.parametrize(("num_rows", "chunk_start"), [(6, 0), (8, 0), (10, 0), (3, 3), (9, 1)])
def test_a_number_of_rows_that_fits_no_layout_is_refused(num_rows: int, chunk_start: int) -> None:
    with pytest.raises(RouteLogError, match=r"saw \d+ rows where this rank has 5 and all ranks"):
        locate(num_rows, chunk_start, Layout(1), Batch([4, 5]))


def test_both_of_vllms_naive_dispatches_put_the_ranks_in_the_same_order() -> None:
    tokens = torch.tensor([5, 3, 8])
    metadata = DPMetadata(tokens.max(), tokens)
    for sp_size in (1, 2, 4):
        with metadata.sp_local_sizes(sp_size) as sizes:
            assert np.cumsum(sizes).tolist() == metadata.cu_tokens_across_sp(sp_size).tolist()
