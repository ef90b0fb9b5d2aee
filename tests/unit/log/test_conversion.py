# SPDX-License-Identifier: Apache-2.0
"""JSONL and Parquet hold the same log: converting loses nothing, and every reader agrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_profiler import resources
from expert_profiler.commands import convert, validate
from expert_profiler.errors import UserError
from expert_profiler.log import conversion, open_log, part_files, row_identity, validation
from expert_profiler.log import records as log_records
from expert_profiler.log.run_files import open_file
from tests.support.logs import (
    Record,
    meta,
    public_meta,
    route,
    run_rows,
    write_log,
    write_outputs,
    write_public_log,
    write_run,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "moe_routes.jsonl"


def parquet_of(path: Path) -> Path:
    target = path.with_suffix(".parquet")
    conversion.convert(path, target, force=True)
    return target


def there_and_back(path: Path) -> list[Record]:
    back = path.parent / "back" / path.name
    back.parent.mkdir(exist_ok=True)
    conversion.convert(parquet_of(path), back, force=True)
    return lines_of(back)


def lines_of(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def request(req_id: str, **facts: Any) -> Record:
    return {"type": "request", "req_id": req_id, "cached_tokens": 0, **facts}


FLOAT32 = st.floats(0, 1, width=32)


@st.composite
def records(draw: st.DrawFn) -> list[Record]:
    top_ks = draw(st.sampled_from([(2, 2), (2, 2), (1, 3)]))
    experts = draw(st.sampled_from([8, 256, 300]))
    public = draw(st.booleans())
    weights = draw(st.sampled_from([FLOAT32, FLOAT32, st.floats(0, 1)]))
    found = []
    for i in range(draw(st.integers(1, 12))):
        layer = draw(st.integers(0, 1))
        size = st.just(top_ks[layer])
        ids = draw(
            size.flatmap(lambda n: st.lists(st.integers(0, experts - 1), min_size=n, max_size=n))
        )
        row = route(draw(st.sampled_from(["0", 'a,"b', "\u2713"])), i, layer, ids)
        row["topk_weights"] = [draw(weights | st.none()) for _ in ids]
        if public:
            del row["phase"], row["forward_pass_id"]
        elif draw(st.booleans()):
            row["flag"] = draw(st.sampled_from(["recomputed", "overrun", "rejected"]))
        found.append(row)
        if draw(st.booleans()):
            found.append(request(str(i), raw_id=f"{i}-x", finished=True))
    layers = [dict(entry, top_k=k) for entry, k in zip(meta()["layers"], top_ks, strict=True)]
    header = public_meta() if public else meta(experts=experts) | {"layers": layers}
    return [header, *found]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(log=records(), finished=st.booleans())
def test_there_and_back_gives_the_same_records(
    log: list[Record], finished: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    header, *rows = log
    path = tmp_path_factory.mktemp("log") / "moe_routes.jsonl"
    write_log(path, rows, header, finished=finished)
    before, after = lines_of(path), there_and_back(path)
    if finished:
        # "bytes" says how large the file is that the end record stands in.
        lines = (path.parent / "back" / path.name).read_bytes().splitlines(keepends=True)
        assert after[-1].pop("bytes") == sum(map(len, lines[:-1]))
        del before[-1]["bytes"]
    assert after == before


def test_a_log_in_the_recorders_own_words_comes_back_byte_by_byte(path: Path) -> None:
    rows = [row | {"type": "route"} for row in run_rows()]
    for row in rows:
        row["topk_weights"] = [float(np.float32(x)) for x in row["topk_weights"]]
    header = meta()
    data = b"".join(
        json.dumps(line, separators=(",", ":")).encode() + b"\n"
        for line in [header, *rows[:5], request("0"), *rows[5:]]
    )
    end = {
        "type": "end",
        "reason": "stop",
        "rows": len(rows),
        "rows_flagged": 0,
        "bytes": len(data),
    }
    data += json.dumps(end, separators=(",", ":")).encode() + b"\n"
    path.write_bytes(data)
    there_and_back(path)
    assert (path.parent / "back" / path.name).read_bytes() == data


def test_weights_are_kept_as_small_as_they_are_exact(path: Path) -> None:
    for weights, kind in (([0.5, 0.25], "float"), ([0.1, 0.2], "double")):
        write_log(path, [route("0", 0, 0, [1, 2], weights)], meta(layers=(0,)))
        column = pq.read_schema(parquet_of(path) / "part-000000.parquet").field("topk_weights")
        assert str(column.type.value_type) == kind
        assert column.type.list_size == 2
    write_log(path, [route("0", 0, 0, [1, 2], [0.5, 0.25])], meta(weights_dtype="float16"))
    column = pq.read_schema(parquet_of(path) / "part-000000.parquet").field("topk_weights")
    assert str(column.type.value_type) == "halffloat"


def test_numbered_requests_stay_numbers(path: Path) -> None:
    rows = [route("0", i, 0, [1, 2]) | {"req_id": 7} for i in range(3)]
    write_log(path, rows, meta(layers=(0,)))
    assert there_and_back(path)[1:-1] == rows
    with open_log(path.with_suffix(".parquet")) as log:
        assert log.requests == 1
        assert log.query("SELECT DISTINCT req_id FROM routes") == [("7",)]


def test_all_ranks_are_converted_and_named_in_the_header(tmp_path: Path) -> None:
    names = ["x.jsonl", "x.pp1.jsonl"]
    for layer, name in enumerate(names):
        header = meta(layers=(layer,), files=names)
        write_log(tmp_path / name, run_rows(layers=(layer,)), header)
    written = conversion.convert(tmp_path / "x.jsonl", tmp_path / "y.parquet")
    assert [log.name for log in written] == ["y.parquet", "y.pp1.parquet"]
    with open_log(written[0]) as log:
        assert log.meta.files == ("y.parquet", "y.pp1.parquet")
        assert (log.num_rows, log.layers, log.notes) == (24, (0, 1), [])


def test_small_parts_are_merged(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_log(path, run_rows())
    monkeypatch.setattr(log_records, "_CHUNK_BYTES", 400)
    monkeypatch.setattr(log_records, "PART_ROWS", 4)
    many = parquet_of(path)
    assert len(list(many.iterdir())) > 5
    monkeypatch.undo()
    conversion.convert(many, tmp_path / "merged.parquet")
    assert len(list((tmp_path / "merged.parquet").iterdir())) == 3
    conversion.convert(tmp_path / "merged.parquet", tmp_path / "back.jsonl")
    strip = [
        {k: v for k, v in line.items() if k not in ("bytes", "files")} for line in lines_of(path)
    ]
    assert strip == [
        {k: v for k, v in line.items() if k not in ("bytes", "files")}
        for line in lines_of(tmp_path / "back.jsonl")
    ]


# ---- what the readers say ------------------------------------------------------------------


def facts(path: Path) -> dict[str, Any]:
    with open_log(path) as log:
        counts = log.counts(include_flagged=True)
        return {
            "values": counts.values.tolist(),
            "rows": counts.phase_rows(),
            "requests": log.requests,
            "duplicates": log.duplicates,
            "contamination": log.identical_runs,
            "notes": [note.replace(path.suffix, "") for note in log.notes],
            "cached": row_identity.cached_tokens(log),
            "faults": validation.weight_faults(log),
            "routes": log.query(
                "SELECT req_id, token_idx, layer, phase, flagged, topk_ids, topk_weights, "
                "forward_pass_id FROM routes ORDER BY rowid"
            ),
        }


ROWS = run_rows()
LOGS = {
    "sound": ROWS,
    "flagged": [*ROWS, ROWS[3] | {"flag": "recomputed"}],
    "duplicates": [*ROWS, *ROWS[:3]],
    "a gap": ROWS[:5] + ROWS[7:],
    "contaminated": [*[route("w", i, 1, [3, 4], [0.5, 0.25]) for i in range(80)], *ROWS],
    "cached": [*ROWS, request("1", cached_tokens=2)],
    "mixed top_k": [*ROWS, route("9", 0, 1, [1, 2, 3])],
    "a bad weight": [*ROWS, route("9", 0, 1, [1, 2], [-1.0, 0.5])],
}


@pytest.mark.parametrize("kind", LOGS)
def test_both_formats_say_the_same(path: Path, kind: str) -> None:
    write_log(path, LOGS[kind])
    ours, theirs = facts(path), facts(parquet_of(path))
    assert ours == theirs


def test_a_public_loggers_log_says_the_same_as_parquet(path: Path) -> None:
    write_public_log(path, run_rows())
    ours, theirs = facts(path), facts(parquet_of(path))
    assert ours == theirs
    assert set(ours["rows"]) == {"unknown"}


def test_a_run_with_a_parquet_log_is_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run")
    parquet_of(folder / "moe_routes.jsonl")
    (folder / "moe_routes.jsonl").unlink()
    assert validate.main(["--dir", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "24 rows of 3 parts, every column" in printed
    assert "bytes as found" in printed
    assert "skip" not in printed


def test_the_row_identity_holds_for_parquet(path: Path, tmp_path: Path) -> None:
    outputs = write_outputs(tmp_path / "outputs.jsonl")
    with open_log(parquet_of(write_log(path, run_rows()))) as log:
        assert row_identity.identity_of(log, outputs).holds


# ---- broken datasets -----------------------------------------------------------------------


@pytest.fixture
def broken(path: Path) -> Path:
    return parquet_of(write_log(path, run_rows()))


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught, open_log(path):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_part_is_named(broken: Path) -> None:
    (broken / "part-000001.parquet").unlink()
    assert "part-000001.parquet is missing" in error_of(broken)


def test_without_its_last_part_a_log_was_cut_short(broken: Path) -> None:
    (broken / "part-000002.parquet").unlink()
    with open_log(broken) as log:
        assert log.lost_rows == ["moe_routes.parquet has no end record: the run was cut short"]
        assert log.num_rows == 24


def test_a_part_that_is_cut_off_is_named(broken: Path) -> None:
    part = broken / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-10])
    assert f"cannot read {part}" in error_of(broken)


def test_damage_inside_a_part_is_named(broken: Path) -> None:
    part = broken / "part-000001.parquet"
    data = bytearray(part.read_bytes())
    data[4:200] = b"\xff" * 196
    part.write_bytes(bytes(data))
    assert "copy the directory again" in error_of(broken)


def test_a_part_of_another_recording_is_named(broken: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    conversion.convert(write_log(other, run_rows(), meta(seed=7)), tmp_path / "other.parquet")
    (tmp_path / "other.parquet" / "part-000002.parquet").replace(broken / "part-000002.parquet")
    assert "belongs to another recording" in error_of(broken)


def test_parts_after_the_end_are_named(broken: Path) -> None:
    data = (broken / "part-000002.parquet").read_bytes()
    (broken / "part-000003.parquet").write_bytes(data)
    assert "goes on after its end record in part-000002.parquet" in error_of(broken)


def test_a_dataset_that_another_program_wrote_has_no_header(tmp_path: Path, broken: Path) -> None:
    table = pq.read_table(broken)
    pq.write_table(table.replace_schema_metadata(None), broken / "part-000000.parquet")
    assert "no route log's header" in error_of(broken)


def test_a_foreign_file_in_the_directory_is_named(broken: Path) -> None:
    (broken / "more.parquet").write_bytes(b"PAR1")
    assert "more.parquet is no part of a route log" in error_of(broken)


def test_one_part_alone_points_to_its_directory(broken: Path) -> None:
    assert f"name its directory: {broken}" in error_of(broken / "part-000001.parquet")


# ---- the command ---------------------------------------------------------------------------


def test_the_command_converts_and_names_the_next(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(path, run_rows())
    target = tmp_path / "x.parquet"
    assert convert.main([str(path), str(target)]) == 0
    assert f"next: {resources.program()} hist {target}" in capsys.readouterr().out
    assert list(tmp_path.glob(".*")) == []
    with pytest.raises(UserError, match="--force"):
        convert.main([str(path), str(target)])
    assert convert.main([str(path), str(target), "--force"]) == 0


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        (b'{"type":"route","req_id":"0","token_idx":0,"layer":0,"topk_ids":[1,2],'
         b'"topk_weights":[1,2],"extra":1}', "line 3: cannot be kept without loss"),
        (b'{"type":"note"}', "line 3: cannot be kept without loss"),
        (b"{", "line 3: not valid JSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(path: Path, line: bytes, fact: str) -> None:
    lines = write_log(path, run_rows()).read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]) + b"\n")
    with pytest.raises(UserError, match=fact):
        parquet_of(path)
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("target", ["x.csv", "missing/x.parquet", "moe_routes.jsonl"])
def test_a_target_that_makes_no_sense_is_refused(path: Path, target: str) -> None:
    before = write_log(path, run_rows()).read_bytes()
    with pytest.raises(UserError):
        conversion.convert(path, path.parent / target, force=True)
    assert path.read_bytes() == before


def test_a_folder_of_other_things_is_never_replaced(path: Path) -> None:
    write_log(path, run_rows())
    folder = path.parent / "precious.parquet"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no route log"):
        conversion.convert(path, folder, force=True)
    assert (folder / "notes.txt").exists()


def test_requests_keep_their_place(path: Path) -> None:
    rows = run_rows()
    write_log(path, [*rows[:3], request("a"), *rows[3:9], request("b"), *rows[9:], request("c")])
    found = part_files.requests(open_file(parquet_of(path)))
    assert [(at, record["req_id"]) for at, record in found] == [(3, "a"), (9, "b"), (24, "c")]
