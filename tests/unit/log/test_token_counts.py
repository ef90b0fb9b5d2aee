# SPDX-License-Identifier: Apache-2.0
"""What one pass counts, against plain loops over the rows; and not by how batches fall."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_profiler.log import open_log, token_counts, tokens
from expert_profiler.log.token_counts import TokenCounts, count_tokens
from tests.support.logs import meta, route, run_rows, write_log
from tests.unit.metrics.test_lru import kept_cache


def counted(path: Path, **options: Any) -> TokenCounts:
    with open_log(path) as log:
        return count_tokens(log, **options)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_BATCH_CHOICES", 9)


def random_rows(seed: int, gaps: bool) -> list[dict[str, Any]]:
    """Requests of up to 9 tokens, 3 layers, 5 experts, top 2; with gaps, some rows are missing."""
    rng = np.random.default_rng(seed)
    rows = []
    for req in range(rng.integers(1, 5)):
        prompt = rng.integers(1, 5)
        for position in range(rng.integers(prompt, 10)):
            for layer in (0, 1, 4):
                if gaps and rng.random() < 0.2:
                    continue
                phase = "prefill" if position < prompt else "decode"
                ids = rng.permutation(5)[:2].tolist()
                rows.append(route(f"r{req}", position, layer, ids, rng.random(2).tolist(), phase))
    return rows or [route("r", 0, 0, [0, 1])]


def check(found: TokenCounts, rows: list[dict[str, Any]]) -> None:
    at = {(r["req_id"], r["token_idx"], r["layer"]): r for r in rows}
    order = list(dict.fromkeys(r["req_id"] for r in rows))
    assert found.requests == len(order) == len(found.by_group)
    assert found.tokens == len({key[:2] for key in at})
    for number, layer in enumerate(found.layers):
        mine = sorted(
            (r for r in rows if r["layer"] == layer),
            key=lambda r: (order.index(r["req_id"]), r["token_idx"]),
        )
        for p, phase in enumerate(found.phases):
            here = [r for r in mine if r["phase"] == phase]
            assert found.rows[number, p] == len(here)
            for g, req in enumerate(order):
                ids = Counter(e for r in here if r["req_id"] == req for e in r["topk_ids"])
                assert found.by_group[g, number, p].tolist() == [ids[e] for e in range(8)]
            mass = [
                sum(
                    w
                    for r in here
                    for e, w in zip(r["topk_ids"], r["topk_weights"], strict=True)
                    if e == expert
                )
                for expert in range(8)
            ]
            assert found.mass[number, p] == pytest.approx(mass, rel=1e-5)
            shared = [
                len(set(r["topk_ids"]) & set(before["topk_ids"]))
                for r in here
                if (before := at.get((r["req_id"], r["token_idx"] - 1, layer)))
            ]
            assert (found.shared[number, p], found.neighbours[number, p]) == (
                sum(shared), len(shared)
            )  # fmt: skip
        together = Counter((a, b) for r in mine for a in r["topk_ids"] for b in r["topk_ids"])
        assert found.pairs[number].tolist() == [
            [together[a, b] for b in range(8)] for a in range(8)
        ]
        if number + 1 < len(found.layers):
            later = found.layers[number + 1]
            moves = Counter(
                (a, b)
                for r in mine
                if (after := at.get((r["req_id"], r["token_idx"], later)))
                for a in r["topk_ids"]
                for b in after["topk_ids"]
            )
            assert found.transitions[number].tolist() == [
                [moves[a, b] for b in range(8)] for a in range(8)
            ]
        stream = [e for r in mine if r["phase"] == "decode" for e in r["topk_ids"]]
        assert found.cache_accesses[number] == len(stream)
        assert found.cache_hits[number].tolist() == [
            kept_cache(stream, size) for size in range(1, 9)
        ]


@settings(derandomize=True, deadline=None, max_examples=9)
@given(st.integers(0, 99), st.booleans(), st.sampled_from([1, 9, 10**6]))
def test_one_pass_equals_plain_loops(tmp_path_factory, seed, gaps, choices) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    rows = random_rows(seed, gaps)
    write_log(path, rows, meta(layers=(0, 1, 4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_BATCH_CHOICES", choices)
        check(counted(path), rows)


def test_the_sums_are_those_of_the_reader(tmp_path: Path) -> None:
    rows = [*run_rows(), *run_rows(lengths=((2, 1),)), route("0", 0, 0, [1, 2], flag="recomputed")]
    path = write_log(tmp_path / "log.jsonl", rows)  # with repeated and marked rows
    with open_log(path) as log:
        counts = log.counts()
        found = count_tokens(log)
    assert (found.counts == counts.values).all() and (found.rows == counts.rows).all()


@pytest.mark.usefixtures("small_batches")
def test_many_requests_share_groups_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_log(tmp_path / "log.jsonl", run_rows(lengths=((2, 2),) * 10))
    whole = counted(path)
    monkeypatch.setattr(token_counts, "MAX_GROUPS", 3)
    grouped = counted(path)
    assert len(whole.by_group) == 10 and len(grouped.by_group) == 3
    assert grouped.requests == 10
    assert (whole.counts == grouped.counts).all()
    assert (grouped.by_group[1] == whole.by_group[1::3].sum(axis=0)).all()


@pytest.mark.usefixtures("small_batches")
def test_the_cache_curve_stops_at_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_log(tmp_path / "log.jsonl", run_rows(lengths=((1, 8),)))
    monkeypatch.setattr(token_counts, "CACHE_TOKENS", 5)
    assert counted(path).cache_accesses.tolist() == [10, 10]


@pytest.mark.usefixtures("small_batches")
def test_labelled_tokens_are_counted_by_class(tmp_path: Path) -> None:
    rows = random_rows(3, gaps=True)
    path = write_log(tmp_path / "log.jsonl", rows, meta(layers=(0, 1, 4)))

    def labels(batch: tokens.TokenBatch) -> Any:
        return (batch.position % 3 - 1).astype(np.int8)  # -1, 0, 1: a third has no class

    found = counted(path, classes=2, labels=labels)
    assert found.joint is not None
    for number, layer in enumerate(found.layers):
        choices = Counter(
            (r["token_idx"] % 3 - 1, e) for r in rows if r["layer"] == layer for e in r["topk_ids"]
        )
        assert found.joint[number].tolist() == [[choices[c, e] for e in range(8)] for c in (0, 1)]
    tokens_of = {(r["req_id"], r["token_idx"]) for r in rows}
    assert found.labelled == sum(p % 3 > 0 for _, p in tokens_of)
