# SPDX-License-Identifier: Apache-2.0
"""A .parquet log holds what the .jsonl log of the same passes holds, and any reader can open it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.layers import MoELayer
from vllm.moe_routes.schema import FOOTER_END, FOOTER_META, FOOTER_REQUESTS
from vllm.moe_routes.writing import formats
from vllm.moe_routes.writing.formats import parquet, route_file
from vllm.moe_routes.writing.formats.jsonl import LineMaker
from vllm.moe_routes.writing.rows import PassRoutes
from vllm.moe_routes.writing.token_log import TokenLog

from tests.support.build import QUICK, a_layer, a_pending, a_step, a_table, clean_routes

HEADER = {"type": "meta", "model_id": "m", "top_k": 2}
LAYERS = [a_layer(1), a_layer(3)]
Record = dict[str, Any]


def records(table: pa.Table) -> list[Record]:
    """Rows as the JSON lines of the other format."""
    found = [{"type": "route", **row} for row in table.to_pylist()]
    for row in found:
        if row["flag"] is None:
            del row["flag"]
    return found


def footers(log: Path) -> list[dict[bytes, bytes]]:
    return [pq.read_metadata(part).metadata for part in sorted(log.iterdir())]


def requests_of(log: Path) -> list[Record]:
    lines = [line for footer in footers(log) for line in footer.get(FOOTER_REQUESTS, b"").split()]
    return [json.loads(line) for line in lines]


def end_of(log: Path) -> Record:
    end: Record = json.loads(footers(log)[-1][FOOTER_END])
    return end


def a_log(log: Path, layers: list[MoELayer] = LAYERS, weights: str = "float32") -> TokenLog:
    return TokenLog(log, HEADER, layers, 255, weights)


def a_pass(opened: TokenLog, n: int, number: int = 0, layers: list[MoELayer] = LAYERS) -> None:
    rows = [(f"{number}-{number:08x}", 0, n, n)]
    pending = a_pending(clean_routes(layers, n, seed=number))
    opened.consume(a_step(rows, pending=pending, forward_pass_id=number))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "x.parquet"


# ---- rows ----------------------------------------------------------------------------------


@QUICK
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    top_ks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    wide=st.booleans(),
    data=st.data(),
)
def test_the_rows_are_those_of_the_jsonl_log(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    top_ks: list[int],
    wide: bool,
    data: st.DataObject,
) -> None:
    layers = [a_layer(3 * i, k, num_experts=300 if wide else 8) for i, k in enumerate(top_ks)]
    path = tmp_path_factory.mktemp("log") / "x.parquet"
    file = route_file.create(path, HEADER, layers, "float32", private=False)
    lines, lines_of = b"", LineMaker(layers)
    for number, n in enumerate(sizes):
        flags = data.draw(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=n, max_size=n))
        table = a_table(n, flags, prompt=2)
        routes = clean_routes(layers, n, seed=number, not_an_id=-1 if wide else 255)
        good = data.draw(
            hnp.arrays(bool, (n, len(layers))) | st.just(np.ones((n, len(layers)), bool))
        )
        one = PassRoutes(number, table, routes.topk_ids, routes.topk_weights, good)
        file.write_routes(one)
        lines += b"".join(data for data, _ in lines_of.lines([one]))
        if data.draw(st.booleans()):
            file.flush()
    file.flush()
    assert records(pq.read_table(path)) == [json.loads(line) for line in lines.splitlines()]


def test_what_the_engine_overwrites_later_stays_as_it_was(log: Path) -> None:
    routes = clean_routes(LAYERS, 3)
    meant = routes.topk_ids.copy(), routes.topk_weights.copy()
    file = route_file.create(log, HEADER, LAYERS, "float32", private=False)
    file.write_routes(PassRoutes(0, a_table(3), *routes[:2], np.ones((3, 2), dtype=bool)))
    routes.topk_ids[:], routes.topk_weights[:] = 0, 0
    file.flush()
    table = pq.read_table(log)
    assert table["topk_ids"].to_pylist() == meant[0].reshape(-1, 2).tolist()
    assert table["topk_weights"].to_pylist() == meant[1].reshape(-1, 2).tolist()


@pytest.mark.parametrize(("experts", "kind"), [(8, "uint8"), (256, "uint8"), (257, "int16")])
def test_lists_have_a_fixed_size_and_ids_are_as_small_as_they_can_be(
    log: Path, experts: int, kind: str
) -> None:
    route_file.create(log, HEADER, [a_layer(0, 4, experts)], "float32", private=False)
    columns = pq.read_schema(log / "part-000000.parquet")
    assert columns.field("topk_ids").type.list_size == 4
    assert str(columns.field("topk_ids").type.value_type) == kind
    assert columns.field("topk_weights").type == pa.list_(pa.field("element", pa.float32()), 4)


def test_float16_weights_are_the_nearest_and_the_header_says_so(log: Path) -> None:
    opened = a_log(log, weights="float16")
    a_pass(opened, 50)
    opened.close("stop")
    assert json.loads(footers(log)[0][FOOTER_META])["weights_dtype"] == "float16"
    weights = pq.read_table(log)["topk_weights"].combine_chunks().flatten().to_numpy()
    exact = clean_routes(LAYERS, 50).topk_weights.reshape(-1)
    assert weights.dtype == np.float16
    assert np.array_equal(weights, exact.astype(np.float16))
    assert not np.array_equal(weights.astype(np.float32), exact)


def test_float16_is_refused_for_jsonl(tmp_path: Path) -> None:
    with pytest.raises(RouteLogError, match=r"VLLM_LOG_MOE_WEIGHTS=float16 is for \.parquet logs"):
        a_log(tmp_path / "x.jsonl", weights="float16")
    assert list(tmp_path.iterdir()) == []


# ---- other readers -------------------------------------------------------------------------


def _with_duckdb(log: Path) -> list[Record]:
    import duckdb

    rows = duckdb.sql("SELECT * FROM read_parquet($1)", params=[f"{log}/*.parquet"])
    return [dict(zip(rows.columns, row, strict=True)) for row in rows.fetchall()]


def _with_polars(log: Path) -> list[Record]:
    import polars

    return polars.scan_parquet(log).collect().to_dicts()


def _with_pyarrow(log: Path) -> list[Record]:
    return list(pq.read_table(log).to_pylist())


def _with_a_dataset(log: Path) -> list[Record]:
    return list(pyarrow.dataset.dataset(log).to_table().to_pylist())


@pytest.mark.parametrize("read", [_with_duckdb, _with_polars, _with_pyarrow, _with_a_dataset])
@pytest.mark.parametrize("weights", ["float32", "float16"])
def test_other_readers_open_the_directory_as_it_stands(
    log: Path, read: Callable[[Path], list[Record]], weights: str
) -> None:
    opened = a_log(log, weights=weights)
    for number in range(3):
        a_pass(opened, 4, number)
        opened.flush()
    opened.close("stop")
    rows = read(log)
    assert len(rows) == 3 * 4 * len(LAYERS)
    assert [row["req_id"] for row in rows] == ["0"] * 8 + ["1"] * 8 + ["2"] * 8
    assert {row["phase"] for row in rows} == {"prefill"}
    exact = np.concatenate([clean_routes(LAYERS, 4, seed=i).topk_weights for i in range(3)])
    read_weights = np.array([list(row["topk_weights"]) for row in rows])
    assert np.array_equal(read_weights, exact.reshape(-1, 2).astype(weights))
    ids = np.concatenate([clean_routes(LAYERS, 4, seed=i).topk_ids for i in range(3)])
    assert [list(row["topk_ids"]) for row in rows] == ids.reshape(-1, 2).tolist()


# ---- parts ---------------------------------------------------------------------------------


def test_the_header_is_on_disk_before_the_first_pass(log: Path) -> None:
    a_log(log)
    assert [part.name for part in log.iterdir()] == ["part-000000.parquet"]
    header = json.loads(footers(log)[0][FOOTER_META])
    assert {key: header[key] for key in HEADER} == HEADER
    assert pq.read_table(log).num_rows == 0


def test_a_flush_makes_rows_and_requests_readable(log: Path) -> None:
    opened = a_log(log)
    a_pass(opened, 3)
    assert pq.read_table(log).num_rows == 0
    opened.flush()
    assert pq.read_table(log).num_rows == 6
    opened.flush()
    assert len(list(log.iterdir())) == 2, "nothing new, no part"
    opened.consume(a_step(finished=["0-00000000"]))
    opened.flush()
    assert [item["req_id"] for item in requests_of(log)] == ["0"]


def test_a_part_is_closed_at_its_size(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "PART_ROWS", 10)
    opened = a_log(log)
    for number in range(5):
        a_pass(opened, 3, number)
    assert [pq.read_metadata(part).num_rows for part in sorted(log.iterdir())] == [0, 12, 12]
    opened.close("stop")
    assert [pq.read_metadata(part).num_rows for part in sorted(log.iterdir())] == [0, 12, 12, 6, 0]


def test_the_end_record_stands_in_the_last_part_and_knows_the_others(log: Path) -> None:
    opened = a_log(log)
    a_pass(opened, 3)
    opened.flush()
    assert all(FOOTER_END not in footer for footer in footers(log))
    opened.close("stop")
    *others, _ = sorted(log.iterdir())
    end = end_of(log)
    assert end["rows"] == 6
    assert end["bytes"] == sum(part.stat().st_size for part in others)
    assert [FOOTER_END in footer for footer in footers(log)] == [False] * len(others) + [True]
    assert opened.end == end


def test_requests_know_where_they_stand_among_the_rows(log: Path) -> None:
    opened = a_log(log)
    a_pass(opened, 3)
    rows, done = [("b-0000000b", 0, 2, 2)], ["0-00000000"]
    opened.consume(a_step(rows, pending=a_pending(clean_routes(LAYERS, 2)), finished=done))
    opened.close("stop")
    assert [(r["req_id"], r["after_rows"]) for r in requests_of(log)] == [("0", 6), ("b", 10)]


def test_only_parts_are_ever_in_the_directory_and_nothing_beside_it(log: Path) -> None:
    opened = a_log(log)
    a_pass(opened, 3)
    opened.close("stop")
    assert all(part.name.startswith("part-") for part in log.iterdir())
    assert list(log.parent.iterdir()) == [log]


def test_a_part_that_cannot_be_written_leaves_the_others(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = a_log(log)
    a_pass(opened, 3)
    opened.flush()
    a_pass(opened, 3, 1)

    def full(table: Any, where: Path, **_: Any) -> None:
        where.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        opened.flush()
    opened.abandon()
    assert pq.read_table(log).num_rows == 6
    assert list(log.parent.iterdir()) == [log]
    assert FOOTER_END not in footers(log)[-1]


def test_rows_reach_parquet_later_than_jsonl_so_that_parts_are_not_tiny(log: Path) -> None:
    assert route_file.shortest_flush(log) == 30
    assert route_file.shortest_flush(log.with_suffix(".jsonl")) == 0


# ---- what is refused -----------------------------------------------------------------------


def test_an_existing_directory_is_refused_and_left_alone(log: Path) -> None:
    log.mkdir()
    with pytest.raises(RouteLogError, match="exists; move it away"):
        a_log(log)
    assert list(log.iterdir()) == []


def test_a_missing_folder_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(RouteLogError, match=r"can't be created \(No such file"):
        a_log(tmp_path / "missing" / "x.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_header_that_cannot_be_encoded_leaves_no_directory(log: Path) -> None:
    with pytest.raises(TypeError):
        TokenLog(log, {"type": "meta", "what": object()}, LAYERS, 255)
    assert list(log.parent.iterdir()) == []


def test_without_pyarrow_the_error_says_how_to_get_it(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(formats, "dataset", raising=False)
    monkeypatch.delitem(sys.modules, "vllm.moe_routes.writing.formats.dataset")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RouteLogError, match="pip install pyarrow"):
        a_log(log)
    assert not log.exists()
