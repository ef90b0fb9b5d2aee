# SPDX-License-Identifier: Apache-2.0
"""What the three modes add up to: counted twice, on the host and where the buffer lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.moe_routes.capture.buffer import CaptureBuffer, allocate
from vllm.moe_routes.capture.device_counts import Counter
from vllm.moe_routes.counts import (
    PassTokens,
    RunningCounts,
    Shape,
    activation,
    count_choices,
    layer_balance,
    lost_choices,
    max_over_mean,
    pass_tokens,
)
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.schema import FORWARD_MODES
from vllm.moe_routes.writing.verdicts import check_counts, verdict

from tests.support.build import DEVICE, QUICK, a_layer, clean_routes

LAYERS = st.lists(
    st.tuples(st.integers(1, 4), st.sampled_from([4, 8, 255, 300])), min_size=1, max_size=4
).map(lambda items: [a_layer(i, k, experts) for i, (k, experts) in enumerate(items)])


def filled(layers: list[MoELayer], n: int, seed: int) -> CaptureBuffer:
    """A capture buffer whose first ``n`` rows hold routes, and whose others do not."""
    buffer = allocate(layers, n + 3, DEVICE)
    routes = clean_routes(layers, n, seed, not_an_id=buffer.not_an_id)
    buffer.ids[:n] = torch.from_numpy(routes.topk_ids)
    buffer.ids[n:] = 0  # rows of another pass must not count
    return buffer


def naive(buffer: CaptureBuffer, n: int, layers: list[MoELayer]) -> list[list[int]]:
    """[L][experts], one choice at a time."""
    ids = buffer.ids[:n].tolist()
    return [
        [
            sum(row[slot][k] == expert for row in ids for k in range(item.top_k))
            for expert in range(item.num_experts)
        ]
        for slot, item in enumerate(layers)
    ]


def counted(buffer: CaptureBuffer, n: int, shape: Shape) -> torch.Tensor:
    """[L, width] of the first ``n`` rows, counted where they lie."""
    counter = Counter(buffer, shape)
    counts = counter.zeros()
    counter.add(counts, n)
    return counts


@QUICK
@given(layers=LAYERS, n=st.integers(0, 9), seed=st.integers(0, 99))
def test_device_host_and_naive_counts_agree(layers: list[MoELayer], n: int, seed: int) -> None:
    buffer, shape = filled(layers, n, seed), Shape.of(layers)
    on_device = counted(buffer, n, shape)
    on_host = count_choices(buffer.ids[:n].cpu().numpy(), shape)
    assert on_device.cpu().tolist() == on_host.tolist()
    for slot, (item, wanted) in enumerate(zip(layers, naive(buffer, n, layers), strict=True)):
        assert on_host[slot, : item.num_experts].tolist() == wanted
    assert not lost_choices(on_host, n, shape).any()
    assert verdict(check_counts(on_host, n, shape, 0, 0))["verdict"] == "pass"


@pytest.mark.parametrize("wrong", [-1, -(2**32), -(2**63), 2**32 + 3, 8, 2**63 - 1])
def test_what_is_no_expert_is_counted_for_none(wrong: int) -> None:
    shape = Shape.of([a_layer(0, 2, 8)])
    counts = count_choices(np.array([[[3, wrong]]], dtype=np.int64), shape)
    assert counts[0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 1]


def test_counting_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [a_layer(i, 2, 8) for i in range(3)]
    buffer = filled(layers, 50, seed=1)
    whole = counted(buffer, 50, Shape.of(layers))
    monkeypatch.setattr("vllm.moe_routes.capture.device_counts.CHUNK", 13)
    chunked = counted(buffer, 50, Shape.of(layers))
    assert chunked.sum() == 50 * 3 * 2
    assert torch.equal(whole, chunked)


@QUICK
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=6
    )
)
def test_tokens_of_a_pass_are_those_before_and_behind_the_prompt(
    requests: list[tuple[int, int, int]],
) -> None:
    scheduled, computed, prompt = (np.array(column) for column in zip(*requests, strict=True))
    found = pass_tokens(scheduled, computed, prompt)
    before = sum(position < p for s, c, p in requests for position in range(c, c + s))
    assert found == PassTokens(before, int(scheduled.sum()) - before)


@pytest.mark.parametrize(
    ("prefill", "decode", "kind"), [(5, 0, "prefill"), (0, 5, "decode"), (1, 1, "mixed")]
)
def test_a_pass_is_of_one_kind(prefill: int, decode: int, kind: str) -> None:
    assert FORWARD_MODES[PassTokens(prefill, decode).forward_mode] == kind


def test_running_counts_keep_modes_of_passes_apart() -> None:
    total = RunningCounts(Shape.of([a_layer(0, 2, 4)]))
    total.add(PassTokens(3, 0), np.array([[1, 2, 3, 0, 0]]))
    total.add(PassTokens(0, 2), np.array([[4, 0, 0, 0, 0]]))
    total.add(PassTokens(1, 1), np.array([[0, 0, 0, 4, 0]]))
    assert total.counts.tolist() == [[[1, 2, 3, 0, 0]], [[4, 0, 0, 0, 0]], [[0, 0, 0, 4, 0]]]
    assert total.facts() == {
        "passes_by_mode": {"prefill": 1, "decode": 1, "mixed": 1},
        "tokens": {"prefill": 4, "decode": 3},
    }


def test_activation_by_hand() -> None:
    """Two layers of 4 experts; 3 and 1 of them are touched; lost choices are no experts."""
    shape = Shape.of([a_layer(0, 2, 4), a_layer(1, 2, 4)])
    counts = np.array([[5, 1, 0, 2, 0], [8, 0, 0, 0, 9]])
    assert activation(counts, shape) == {
        "total_activated_experts": 4.0,
        "avg_activated_per_layer": 2.0,
        "expert_utilization": 0.5,
    }
    # max/mean: 5 / (8/4) and 8 / (8/4).
    assert layer_balance(counts, shape).tolist() == [2.5, 4.0]
    assert max_over_mean(counts, shape) == 3.25


def test_balance_of_nothing_is_nothing() -> None:
    shape = Shape.of([a_layer(0, 2, 4)])
    assert max_over_mean(np.zeros((1, 5), dtype=np.int64), shape) is None


def test_a_narrowed_buffer_counts_its_own_slots_only() -> None:
    layers = [a_layer(i, 2, 8) for i in range(4)]
    buffer = filled(layers, 5, seed=3)
    chosen = [layers[1], layers[3]]
    counts = counted(buffer.narrowed([1, 3]), 5, Shape.of(chosen))
    wanted = naive(buffer, 5, layers)
    assert counts[:, :8].tolist() == [wanted[1], wanted[3]]
