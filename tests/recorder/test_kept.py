"""Choices that an eager pass keeps are those that the op would have written."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vllm.moe_routes import capture
from vllm.moe_routes.kept import Kept, put_together

from tests.recorder.build import DEVICE, QUICK, a_layer

LAYERS, TOP_K, EXPERTS = 4, 2, 8


def _buffer() -> capture.CaptureBuffer:
    layers = [a_layer(i, top_k=TOP_K, num_experts=EXPERTS) for i in range(LAYERS)]
    return capture.allocate(layers, 32, DEVICE)


def _choices(n: int, seed: int, k: int = TOP_K, dtype: torch.dtype = torch.int32) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    ids = torch.rand(n, EXPERTS, generator=made).topk(k).indices.to(dtype)
    return [ids, torch.rand(n, k, generator=made)]


@QUICK
@given(
    slots=st.sets(st.integers(0, LAYERS - 1), min_size=1),
    calls=st.lists(
        st.tuples(
            st.integers(0, LAYERS - 1),
            st.sampled_from([0, 0, 0, 3]),
            st.integers(1, 9),
            st.integers(1, 3),
        ),
        max_size=6,
    ),
    whole=st.booleans(),
    num_rows=st.integers(0, 9),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    weights=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_what_an_eager_pass_keeps_is_what_the_op_would_have_written(
    slots: set[int],
    calls: list[tuple[int, int, int, int]],
    whole: bool,
    num_rows: int,
    dtype: torch.dtype,
    weights: torch.dtype,
) -> None:
    """Layers that did not fire, fired for some rows or in chunks, or with a column too many."""
    chosen = sorted(slots)
    if whole:  # as it nearly always is
        calls = [(slot, 0, 9, TOP_K) for slot in chosen]
    calls = [call for call in calls if call[0] in slots]
    one, other = _buffer(), _buffer()
    kept: Kept = {}
    for slot, row0, n, k in calls:
        ids, given = _choices(n, seed=slot, k=k, dtype=dtype)
        given = given.to(weights)
        kept[slot, row0] = (ids, given)
    for (slot, row0), (ids, given) in kept.items():
        capture.moe_routes_capture(one.ids, one.weights, ids, given, row0, slot)
    found = put_together(kept, chosen, other, num_rows)
    wanted = one.narrowed(chosen)
    assert torch.equal(found.copy_ids(num_rows), wanted.copy_ids(num_rows))
    fired = wanted.copy_ids(num_rows) != wanted.not_an_id  # else there is no weight to speak of
    assert torch.equal(found.copy_weights(num_rows)[fired], wanted.copy_weights(num_rows)[fired])
    assert found.weights.dtype == torch.float32
    assert not kept
    assert found.own or not whole, "the usual pass goes the quick way"


def test_an_id_that_no_expert_has_keeps_its_value() -> None:
    """Cast to the buffer's dtype, 256 would be expert 0."""
    ids, weights = _choices(3, 1)
    ids[1, 0] = 256
    found = put_together({(0, 0): (ids, weights)}, [0], _buffer(), 3)
    assert found.ids[1, 0, 0] == 256


def test_passes_that_nobody_takes_do_not_pile_up() -> None:
    kept: Kept = {}
    for seed in range(50):
        for slot in range(LAYERS):
            kept[slot, 0] = tuple(_choices(2, seed))  # type: ignore[assignment]
    assert len(kept) == LAYERS


def test_nobody_writes_to_what_is_handed_over() -> None:
    choices = {(slot, 0): tuple(_choices(3, slot)) for slot in range(LAYERS)}
    routers = {place: ids for place, (ids, _) in choices.items()}
    found = put_together(dict(choices), list(range(LAYERS)), _buffer(), 3)  # type: ignore[arg-type]
    before = found.copy_ids(3).clone()
    for ids in routers.values():
        ids.zero_()
    assert torch.equal(found.copy_ids(3), before)
