# SPDX-License-Identifier: Apache-2.0
"""How rows become lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vllm.moe_routes.capture.snapshot import Routes
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.schema import Flag
from vllm.moe_routes.writing.formats.jsonl import CHUNK, JsonlFile, LineMaker, encode_object
from vllm.moe_routes.writing.rows import PassRoutes, RequestBook, RowTable

from tests.support.build import QUICK, a_layer, a_step, a_table, clean_routes

#: A warning a row would cost more than the row.
pytestmark = pytest.mark.filterwarnings("error")

KEYS = [
    "type",
    "req_id",
    "token_idx",
    "layer",
    "topk_ids",
    "topk_weights",
    "phase",
    "forward_pass_id",
]


def _encode(
    layers: list[MoELayer],
    table: RowTable,
    routes: Routes,
    good: np.ndarray | None = None,
    forward_pass_id: int = 4,
) -> bytes:
    if good is None:
        good = np.ones(routes.topk_ids.shape[:2], dtype=bool)
    one = PassRoutes(forward_pass_id, table, routes.topk_ids, routes.topk_weights, good)
    return b"".join(data for data, _ in LineMaker(layers).lines([one]))


def _lines(data: bytes) -> list[dict[str, Any]]:
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def _meant(
    layers: list[MoELayer], table: RowTable, routes: Routes, forward_pass_id: int = 4
) -> list[dict[str, Any]]:
    """The documented lines, spelled out."""
    lines = []
    for t, req_id in enumerate(table.req_ids):
        for i, item in enumerate(layers):
            line: dict[str, Any] = {
                "type": "route",
                "req_id": req_id,
                "token_idx": int(table.positions[t]),
                "layer": item.layer,
                "topk_ids": [int(x) for x in routes.topk_ids[t, i, : item.top_k]],
                "topk_weights": [float(x) for x in routes.topk_weights[t, i, : item.top_k]],
                "phase": "decode" if table.is_decode[t] else "prefill",
                "forward_pass_id": forward_pass_id,
            }
            if table.flags[t]:
                line["flag"] = {1: "recomputed", 2: "overrun"}[int(table.flags[t])]
            lines.append(line)
    return lines


@QUICK
@given(
    n=st.integers(0, 6),
    indices=st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True),
    wide=st.booleans(),
    data=st.data(),
)
def test_a_pass_reads_back_as_the_documented_lines(
    n: int, indices: list[int], wide: bool, data: st.DataObject
) -> None:
    layers = [
        a_layer(i, top_k=data.draw(st.integers(1, 4)), num_experts=300 if wide else 8)
        for i in sorted(indices)
    ]
    routes = clean_routes(layers, n, seed=n, not_an_id=-1 if wide else 255)
    flags = data.draw(st.lists(st.sampled_from([0, 1, 2]), min_size=n, max_size=n))
    table = a_table(n, flags, prompt=2)
    assert _lines(_encode(layers, table, routes, None, 11)) == _meant(layers, table, routes, 11)


def test_a_line_looks_as_the_documentation_shows_it() -> None:
    routes = Routes(
        np.array([[[3, 12]]], dtype=np.uint8), np.array([[[0.75, 0.25]]], dtype=np.float32), None
    )
    assert _encode([a_layer(0)], a_table(1), routes) == (
        b'{"type":"route","req_id":"r","token_idx":0,"layer":0,"topk_ids":[3,12],'
        b'"topk_weights":[0.75,0.25],"phase":"prefill","forward_pass_id":4}\n'
    )


def test_the_keys_stand_in_the_documented_order_and_flag_only_where_set() -> None:
    layers = [a_layer(0)]
    lines = _lines(_encode(layers, a_table(3, [0, 1, 2]), clean_routes(layers, 3)))
    assert [list(line) for line in lines] == [KEYS, [*KEYS, "flag"], [*KEYS, "flag"]]
    assert [line.get("flag") for line in lines] == [None, "recomputed", "overrun"]


def test_every_flag_has_its_name_in_the_file() -> None:
    layers, marked = [a_layer(0)], [flag for flag in Flag if flag]
    lines = _lines(_encode(layers, a_table(len(marked), marked), clean_routes(layers, len(marked))))
    assert [line["flag"] for line in lines] == [flag.name.lower() for flag in marked]


def test_the_first_generated_token_is_the_first_decode_row() -> None:
    layers = [a_layer(0)]
    lines = _lines(_encode(layers, a_table(4, prompt=2), clean_routes(layers, 4)))
    assert [line["phase"] for line in lines] == ["prefill", "prefill", "decode", "decode"]


@QUICK
@given(
    hnp.arrays(
        np.float32, (1, 1, 2), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
def test_weights_are_exactly_the_float32_the_kernel_used(weights: np.ndarray) -> None:
    routes = Routes(np.array([[[0, 1]]], dtype=np.uint8), weights, None)
    (line,) = _lines(_encode([a_layer(0)], a_table(1), routes))
    read = np.array(line["topk_weights"], dtype=np.float64)
    assert np.array_equal(read, weights[0, 0].astype(np.float64))
    assert np.array_equal(read.astype(np.float32), weights[0, 0])


def test_a_layer_with_a_smaller_top_k_has_shorter_lists() -> None:
    layers = [a_layer(0, top_k=1), a_layer(1, top_k=3), a_layer(2, top_k=2)]
    lines = _lines(_encode(layers, a_table(1), clean_routes(layers, 1)))
    assert [len(line["topk_ids"]) for line in lines] == [1, 3, 2]
    assert [len(line["topk_weights"]) for line in lines] == [1, 3, 2]


@QUICK
@given(good=hnp.arrays(bool, (4, 3)))
def test_rows_that_are_not_good_are_left_out_and_the_others_kept(good: np.ndarray) -> None:
    layers = [a_layer(i) for i in (0, 2, 5)]
    table, routes = a_table(4), clean_routes(layers, 4)
    kept = [
        line
        for line, fine in zip(_meant(layers, table, routes), good.reshape(-1), strict=True)
        if fine
    ]
    assert _lines(_encode(layers, table, routes, good)) == kept


@QUICK
@given(
    weights=hnp.arrays(np.float32, (3, 2, 2), elements=st.floats(width=32)),
    ids=hnp.arrays(np.int16, (3, 2, 2), elements=st.integers(0, 299)),
    good=hnp.arrays(bool, (3, 2)),
)
def test_lines_are_those_of_a_plain_encoder_to_the_byte(
    weights: np.ndarray, ids: np.ndarray, good: np.ndarray
) -> None:
    """msgspec over dictionaries: what the lines were first made with."""
    layers = [a_layer(0, num_experts=300), a_layer(7, num_experts=300)]
    table = a_table(3, [0, 1, 2], prompt=2)
    meant = _meant(layers, table, Routes(ids, weights, None))
    kept = [line for line, fine in zip(meant, good.reshape(-1), strict=True) if fine]
    want = b"".join(msgspec.json.encode(line) + b"\n" for line in kept)
    assert _encode(layers, table, Routes(ids, weights, None), good) == want


def test_passes_are_written_in_their_order_whenever_their_lines_are_made(tmp_path: Path) -> None:
    layers, every = [a_layer(0), a_layer(1)], np.ones((4, 2), dtype=bool)
    log = JsonlFile(tmp_path / "x.jsonl", {"type": "meta"}, layers, private=False)
    want = encode_object({"type": "meta"})
    for number in range(2 * CHUNK // every.size + 3):
        table, routes = a_table(4), clean_routes(layers, 4, seed=number)
        log.write_routes(PassRoutes(number, table, routes.topk_ids, routes.topk_weights, every))
        want += _encode(layers, table, routes, every, number)
        if number % 100 == 7:
            log.write_request({"type": "request", "after": number})
            want += encode_object({"type": "request", "after": number})
        if number % 100 == 50:
            log.flush()
            assert (tmp_path / "x.jsonl").read_bytes() == want
    log.close({"type": "end"})
    want += encode_object({"type": "end"})
    assert (tmp_path / "x.jsonl").read_bytes() == want
    assert log.bytes == len(want)


def test_a_pass_without_tokens_has_no_lines() -> None:
    layers = [a_layer(0)]
    table = RequestBook().place(a_step(), None)
    assert _encode(layers, table, clean_routes(layers, 0)) == b""


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "new\nline", "snö🦀", "\u2028"])
def test_whatever_a_request_is_called_it_stays_on_its_line(name: str) -> None:
    layers = [a_layer(0)]
    table = RequestBook().place(a_step([(name, 0, 1, 1)]), None)
    data = _encode(layers, table, clean_routes(layers, 1))
    assert data.count(b"\n") == 1
    assert _lines(data)[0]["req_id"] == name


def test_a_weight_that_is_no_number_keeps_the_line_readable() -> None:
    """JSON has no NaN; the self-check has told of it."""
    routes = clean_routes([a_layer(0)], 1)
    routes.topk_weights[0, 0, 0] = np.nan
    (line,) = _lines(_encode([a_layer(0)], a_table(1), routes))
    assert line["topk_weights"][0] is None


def test_other_records_are_one_line_in_the_order_given() -> None:
    record = {"type": "end", "b": 1, "a": {"x": [1.5, None, True]}, "text": "é\n"}
    data = encode_object(record)
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")
    assert json.loads(data) == record
    assert list(json.loads(data)) == ["type", "b", "a", "text"]
