# SPDX-License-Identifier: Apache-2.0
"""Tokens of a log: every row once, in the order of the text, in batches of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_profiler.errors import UserError
from expert_profiler.log import open_log, tokens
from tests.support.logs import Record, meta, route, run_rows, write_log

ROWS = st.lists(
    st.builds(
        lambda req, idx, layer, ids, phase, seed, flag: route(
            req, idx, layer, ids, [seed + i for i in range(len(ids))], phase, **flag
        ),
        req=st.sampled_from(["b", "a", "\u2713"]),
        idx=st.integers(0, 5),
        layer=st.sampled_from([0, 1, 7]),
        ids=st.permutations(range(8)).map(lambda ids: ids[:2]),
        phase=st.sampled_from(["prefill", "decode"]),
        seed=st.integers(0, 9),
        flag=st.sampled_from([{}, {}, {"flag": "overrun"}]),
    ),
    min_size=1,
    max_size=40,
)


def read(path: Path) -> list[tuple[object, ...]]:
    """Every (request, position, layer, ids, weights) in the order of the batches."""
    found: list[tuple[object, ...]] = []
    with open_log(path) as log:
        names = tokens.request_names(log)
        for batch in tokens.batches(log):
            for t in range(len(batch)):
                for at, layer in enumerate(log.layers):
                    if batch.ids[t, at, 0] >= 0:
                        found.append(
                            (
                                names[batch.request[t]],
                                int(batch.position[t]),
                                layer,
                                batch.ids[t, at].tolist(),
                                batch.weights[t, at].tolist(),
                            )
                        )
    return found


def plain(rows: list[Record]) -> list[tuple[object, ...]]:
    """The same from a plain sort."""
    order = list(dict.fromkeys(row["req_id"] for row in rows))
    seen: dict[object, int] = {}
    keyed = []
    for row in rows:
        if "flag" in row:
            continue
        key = row["req_id"], row["token_idx"], row["layer"]
        seen[key] = repeat = seen.get(key, -1) + 1
        keyed.append((order.index(row["req_id"]), repeat, row["token_idx"], row["layer"], row))
    keyed.sort(key=lambda item: item[:4])
    return [
        (
            row["req_id"],
            row["token_idx"],
            row["layer"],
            row["topk_ids"],
            np.float32(row["topk_weights"]).tolist(),
        )
        for *_, row in keyed
    ]


@settings(derandomize=True, deadline=None, max_examples=15)
@given(ROWS, st.sampled_from([1000, 1, 2, 5]))
def test_every_row_comes_once_in_order(tmp_path_factory, rows, size) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    write_log(path, rows, meta(layers=(0, 1, 7)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_BATCH_CHOICES", size * 3 * 2)  # layers, top-k
        assert read(path) == plain(rows)


def test_a_batch_has_no_more_tokens_than_its_bound_and_phases_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_BATCH_CHOICES", 4 * 2 * 2)  # tokens, layers, top-k
    path = write_log(tmp_path / "log.jsonl", run_rows())
    with open_log(path) as log:
        found = list(tokens.batches(log))
    assert max(map(len, found)) <= 4
    phases = np.concatenate([batch.phase for batch in found])
    assert phases.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]


def test_layers_may_have_different_top_k(tmp_path: Path) -> None:
    rows = [route("0", 0, 0, [3]), route("0", 0, 1, [1, 2])]
    path = write_log(tmp_path / "log.jsonl", rows)
    with open_log(path) as log:
        assert tokens.top_ks(log) == [1, 2]
        [batch] = tokens.batches(log)
    assert batch.ids.tolist() == [[[3, -1], [1, 2]]]
    assert np.isnan(batch.weights[0, 0, 1])


def test_rows_of_one_layer_must_have_one_top_k(tmp_path: Path) -> None:
    rows = [route("0", 0, 0, [3]), route("0", 1, 0, [1, 2])]
    path = write_log(tmp_path / "log.jsonl", rows)
    with (
        open_log(path) as log,
        pytest.raises(UserError, match="layer 0 have 1 to 2 expert ids"),
    ):
        next(tokens.batches(log))
