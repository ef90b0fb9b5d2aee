# SPDX-License-Identifier: Apache-2.0
"""Choices that an eager pass keeps are those that the op would have written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vllm.moe_routes import hooks, recorder
from vllm.moe_routes.capture import references
from vllm.moe_routes.capture.buffer import allocate, moe_routes_capture
from vllm.moe_routes.capture.references import ReferenceChoices, References
from vllm.moe_routes.capture.snapshot import HostSnapshotter
from vllm.moe_routes.capture.taps import Tap
from vllm.moe_routes.counts import PassTokens, Shape
from vllm.moe_routes.recording import provenance
from vllm.moe_routes.recording.choices import BufferChoices, Choices

from tests.faults.load import arm, group
from tests.support.build import QUICK, a_layer
from tests.support.fake_runner import INDICES

LAYERS, TOP_K, EXPERTS, ROWS = 4, 2, 8, 9
HOST = torch.device("cpu")
MODEL = [a_layer(i, top_k=TOP_K, num_experts=EXPERTS) for i in range(LAYERS)]
Call = tuple[int, int, int, int]


def _router(n: int, seed: int, k: int = TOP_K) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    ids = torch.rand(n, EXPERTS, generator=made).topk(k).indices
    return ids, torch.rand(n, k, generator=made)


class Pass:
    """The same calls of the hook, on both ways to a recording.

    Args:
        calls: layer, first row, rows, columns of each.
        slots: layers that are recorded.
        convert: of what the router returns.
    """

    def __init__(
        self,
        calls: list[Call],
        slots: list[int],
        num_rows: int = ROWS,
        convert: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda ids, w: (ids, w),
    ) -> None:
        layers, self.references = [MODEL[i] for i in slots], References()
        shape, buffer = Shape.of(layers), allocate(MODEL, 32, HOST)
        empty = allocate(MODEL, 0, HOST)
        self.written: Choices = BufferChoices(buffer, slots, shape, HostSnapshotter())
        self.handed: Choices = ReferenceChoices(self.references, slots, shape, empty)
        for choices in (self.written, self.handed):
            choices.begin(num_rows)
        for slot, row0, n, k in calls:
            if slot in slots:
                self.references[slot, row0] = convert(*_router(n, seed=slot, k=k))
        for (slot, row0), (ids, weights) in self.references.items():
            moe_routes_capture(buffer.ids, buffer.weights, ids, weights, row0, slot)


WHOLE = [(slot, 0, ROWS, TOP_K) for slot in range(LAYERS)]
calls_of_a_pass = st.one_of(
    st.just(WHOLE),  # as it nearly always is
    st.lists(
        st.tuples(
            st.integers(0, LAYERS - 1),
            st.sampled_from([0, 0, 0, 3]),
            st.integers(1, ROWS),
            st.integers(1, 3),
        ),
        max_size=6,
    ),
)
some_slots = st.sets(st.integers(0, LAYERS - 1), min_size=1).map(sorted)


@QUICK
@given(
    slots=some_slots,
    calls=calls_of_a_pass,
    num_rows=st.integers(0, ROWS),
    ids=st.sampled_from([torch.int32, torch.int64]),
    weights=st.sampled_from([torch.float32, torch.bfloat16]),
    picked=st.none() | st.sets(st.integers(0, ROWS - 1)).map(sorted),
)
def test_what_an_eager_pass_keeps_is_what_the_op_would_have_written(
    slots: list[int],
    calls: list[Call],
    num_rows: int,
    ids: torch.dtype,
    weights: torch.dtype,
    picked: list[int] | None,
) -> None:
    """Layers that did not fire, fired for some rows, in chunks, or with a column too many."""
    run = Pass(calls, slots, num_rows, lambda i, w: (i.to(ids), w.to(weights)))
    rows = None if picked is None else np.array([i for i in picked if i < num_rows], dtype=np.int64)
    tokens = torch.arange(100, 100 + ROWS)
    wanted = run.written.routes(num_rows, tokens, rows).resolve()
    found = run.handed.routes(num_rows, tokens, rows).resolve()
    not_an_id = 255
    assert found.topk_ids.tolist() == wanted.topk_ids.tolist()
    fired = wanted.topk_ids != not_an_id  # else there is no weight to speak of
    assert found.topk_weights[fired].tolist() == wanted.topk_weights[fired].tolist()
    assert found.topk_weights.dtype == np.float32
    assert found.token_ids.tolist() == wanted.token_ids.tolist()
    assert not run.references, "the next pass starts from nothing"


@QUICK
@given(slots=some_slots, calls=calls_of_a_pass, num_rows=st.integers(0, ROWS))
def test_both_ways_count_a_pass_alike(slots: list[int], calls: list[Call], num_rows: int) -> None:
    wanted = Pass(calls, slots, num_rows).written.counts(num_rows).resolve()
    found = Pass(calls, slots, num_rows).handed.counts(num_rows).resolve()
    assert found.tolist() == wanted.tolist()


def _no_loss(tokens: PassTokens, error: Exception) -> None:
    raise AssertionError(f"{tokens} lost: {error}")


@pytest.mark.parametrize("waiting_bytes", [1, 10_000, 1 << 30])
def test_passes_that_wait_to_be_counted_are_in_every_total(
    monkeypatch: pytest.MonkeyPatch, waiting_bytes: int
) -> None:
    monkeypatch.setattr(references, "WAITING_BYTES", waiting_bytes)
    run = Pass(WHOLE, [1, 3])
    written, handed = run.written.accumulator(_no_loss), run.handed.accumulator(_no_loss)
    taken = dict(run.references)
    kinds = [PassTokens(ROWS, 0), PassTokens(0, ROWS), PassTokens(4, ROWS - 4)]
    for i in range(12):
        run.references.update(taken)
        written.add(kinds[i % 3])
        handed.add(kinds[i % 3])
        if i in (4, 5, 11):
            assert handed.read().tolist() == written.read().tolist()
    assert handed.read().sum() == 12 * ROWS * 2 * TOP_K


def test_a_pass_that_can_not_be_counted_is_told_and_the_others_count() -> None:
    run, told = Pass(WHOLE, [0]), []
    counts = run.handed.accumulator(lambda tokens, error: told.append((tokens, str(error))))
    taken = dict(run.references)
    for i in range(3):
        broken = {(0, 0): (torch.zeros(1, dtype=torch.int32),) * 2}
        run.references.update(broken if i == 1 else taken)
        counts.add(PassTokens(ROWS - i, i))
    assert counts.read().sum() == 2 * ROWS * TOP_K
    assert [tokens for tokens, _ in told] == [PassTokens(ROWS - 1, 1)]


def test_an_id_that_no_expert_has_keeps_its_value() -> None:
    """Cast to the buffer's dtype, 256 would be expert 0."""

    def broken(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ids[1, 0] = 256
        return ids, weights

    run = Pass(WHOLE, [0], convert=broken)
    assert run.handed.counts(ROWS).resolve()[0, -1] == 1
    run = Pass(WHOLE, [0], convert=broken)
    assert run.handed.routes(ROWS, None).resolve().topk_ids[1, 0, 0] == 256


def test_passes_that_nobody_takes_do_not_pile_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle data-parallel rank runs such while the others work."""
    monkeypatch.setattr(recorder, "get_pp_group", group)
    monkeypatch.setattr(recorder, "get_tp_group", group)
    monkeypatch.setattr(provenance, "patch_id", lambda: "0123abcd")
    runner = arm(tmp_path / "x.jsonl")
    for _ in range(50):
        runner.dummy_run()
    assert len(runner.moe_routes._source.references) == len(INDICES)  # type: ignore[union-attr, arg-type]
    runner.moe_routes.control("stop")  # type: ignore[union-attr]


def test_a_pass_that_waits_is_charged_for_all_that_it_keeps() -> None:
    """Small batches: the tensors take more than their numbers."""
    pending = Pass([(slot, 0, 1, TOP_K) for slot in range(LAYERS)], [0, 1, 2, 3], 1).handed
    numbers = LAYERS * TOP_K * (8 + 4)
    assert pending.routes(1, None).nbytes == numbers + 2 * LAYERS * references.TENSOR_BYTES


def test_rows_of_other_data_parallel_ranks_are_not_kept_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank's layer is called with all ranks' rows; a slice would keep them all."""
    monkeypatch.setattr(hooks, "_tokens_across_dp", lambda: [100, 5])
    nothing, references = torch.zeros(0), References()
    layer = SimpleNamespace(moe_route_tap=Tap(nothing, nothing, 0, 1, None, references))
    ids, weights = _router(105, seed=0)
    hooks._log_moe_routes(layer, ids, weights)
    (kept_ids, kept_weights) = references[0, 0]
    assert torch.equal(kept_ids, ids[100:]) and torch.equal(kept_weights, weights[100:])
    for item in references[0, 0]:
        assert item.untyped_storage().nbytes() == item.nbytes, "what the queue is charged"
