# SPDX-License-Identifier: Apache-2.0
"""Every real row lands at its own place, however vLLM spreads a pass over ranks and calls.

The spreading is vLLM's own code: ``FusedMoE.forward_impl`` and ``forward_impl_chunked`` on a
stand-in for the layer, the all-gather dispatch and the data-parallel sizes. Only the collectives
are simulated: ranks run one after another and a gather is handed the rows of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.distributed.device_communicators import all2all
from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
from vllm.forward_context import DPMetadata, ForwardContext, override_forward_context
from vllm.model_executor.layers.fused_moe import layer as layer_module
from vllm.model_executor.layers.fused_moe.fused_moe_modular_method import FusedMoEModularMethod
from vllm.model_executor.layers.fused_moe.layer import FusedMoE
from vllm.moe_routes.capture.buffer import CaptureBuffer, allocate
from vllm.moe_routes.capture.row_layout import Rows, locate
from vllm.moe_routes.capture.taps import Tap
from vllm.moe_routes.errors import RouteLogError

from tests.support.build import DEVICE, THOROUGH, a_layer

#: Ids of padding start here; a real row's id says its data-parallel rank and its row.
PADDING = 20_000


class World(NamedTuple):
    """How one pass is spread.

    Attributes:
        real: [dp] scheduled tokens of every data-parallel rank; none where it runs a dummy batch.
        padded: [dp] the same, padded.
        kernel: "naive" (dispatched), "modular" (dispatches later) or "chunked" (so does it).
        chunk: tokens of a chunk.
    """

    real: list[int]
    padded: list[int]
    kernel: str
    chunk: int

    def tokens(self, dp: int) -> Tensor:
        """[padded, 1] the rows of a data-parallel rank."""
        row = torch.arange(self.padded[dp], device=DEVICE)
        ids = row + 1000 * dp
        return torch.where(row < self.real[dp], ids, ids + PADDING).float()[:, None]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    dp = draw(st.integers(2, 4))
    real = draw(st.lists(st.integers(0, 40), min_size=dp, max_size=dp))
    # CUDA graphs pad to one of some sizes, data-parallel ranks all to the same.
    multiple = draw(st.sampled_from([1, 1, 8]))
    padded = [max(-(-n // multiple) * multiple, 1) for n in real]
    if draw(st.booleans()):
        padded = [max(padded)] * dp
    kernel = draw(st.sampled_from(["naive", "modular", "chunked"]))
    return World(real, padded, kernel, draw(st.integers(1, 50)))


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


def _moe(world: World, dp: int) -> tuple[SimpleNamespace, CaptureBuffer]:
    """A recorded layer of this rank, in place of a ``FusedMoE``, and its buffer."""
    buffer = allocate([a_layer(0, 1, 1 << 15)], max(world.padded), DEVICE)
    staged = (world.chunk, 1)
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
        is_sequence_parallel=False,
        sp_size=1,
        moe_route_tap=Tap(buffer.ids, buffer.weights, 0, dp),
    )
    moe.forward_impl_chunked = partial(FusedMoE.forward_impl_chunked, moe)
    return moe, buffer


@contextmanager
def _rank(world: World, dp: int) -> Iterator[None]:
    """The groups and the context that a rank finds itself in."""
    parts = [world.tokens(of) for of in range(len(world.real))]

    def all_gatherv(tensors: list[Tensor], dim: int, sizes: list[int]) -> list[Tensor]:
        assert (dim, sizes) == (0, [len(part) for part in parts])
        return [torch.cat(parts)] * len(tensors)

    group = SimpleNamespace(
        rank_in_group=dp,
        all_gatherv=all_gatherv,
        dispatch=partial(AgRsAll2AllManager.dispatch, None),
        combine=lambda states, _: states,
    )
    tokens = torch.tensor(world.padded)
    metadata = DPMetadata(tokens.max(), tokens)
    patch = mock.patch.object
    with (
        patch(layer_module, "get_ep_group", lambda: group),
        patch(all2all, "get_ep_group", lambda: group),
        patch(all2all, "get_dp_group", lambda: group),
        override_forward_context(ForwardContext({}, {}, {}, 0, metadata, CUDAGraphMode.NONE)),
    ):
        yield


def _check(world: World) -> None:
    for dp, (real, padded) in enumerate(zip(world.real, world.padded, strict=True)):
        moe, buffer = _moe(world, dp)
        with _rank(world, dp):
            FusedMoE.forward_impl(moe, world.tokens(dp), world.tokens(dp))
        ids, weights = buffer.ids[:, 0, 0].long(), buffer.weights[:, 0, 0]
        written = ids != buffer.not_an_id
        want = torch.arange(padded, device=DEVICE) + 1000 * dp
        want[real:] += PADDING
        assert torch.equal(ids[:padded], want), "a row stands in another row's place"
        assert torch.equal(torch.where(written, ids / 2, 0).float(), weights)
        assert not written[padded:].any(), "something was written past the pass's rows"


@THOROUGH
@given(worlds())
def test_every_row_lands_once_at_its_own_place_and_nothing_else_does(world: World) -> None:
    _check(world)


@pytest.mark.parametrize("kernel", ["naive", "modular", "chunked"])
def test_odd_sizes_with_every_kernel(kernel: str) -> None:
    """Chunks that leave a remainder."""
    _check(World([29, 31], [31, 31], kernel, 3))


def test_an_idle_ranks_dummy_batch_takes_no_place() -> None:
    _check(World([5, 0, 3], [5, 1, 3], "naive", 1))


def test_chunks_past_the_last_token_rewrite_its_row_and_no_other() -> None:
    """A rank goes on in lockstep with the longest one; vLLM clamps the chunk to the last row."""
    _check(World([2, 40], [2, 40], "chunked", 4))
    assert locate(1, 1, 0, [2, 40]) == Rows(0, 1, 1)


@pytest.mark.parametrize(("num_rows", "chunk_start"), [(6, 0), (8, 0), (10, 0), (3, 3), (9, 1)])
def test_a_number_of_rows_that_fits_no_layout_is_refused(num_rows: int, chunk_start: int) -> None:
    with pytest.raises(RouteLogError, match=r"saw \d+ rows where this rank has 5 and all ranks"):
        locate(num_rows, chunk_start, 1, [4, 5])


def test_both_of_vllms_naive_dispatches_put_the_ranks_in_the_same_order() -> None:
    tokens = torch.tensor([5, 3, 8])
    metadata = DPMetadata(tokens.max(), tokens)
    with metadata.sp_local_sizes(1) as sizes:
        assert np.cumsum(sizes).tolist() == metadata.cu_tokens_across_sp(1).tolist()
