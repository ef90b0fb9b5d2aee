# SPDX-License-Identifier: Apache-2.0
"""Synthetic logs are sound logs of the asked size, and the same ones every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expert_profiler.errors import UserError
from expert_profiler.log import conversion, open_log
from tools import bench_reading, make_synthetic_log


def make(path: Path, *options: str) -> Path:
    assert make_synthetic_log.main([str(path), "--rows", "60000", *options]) == 0
    return path


def test_a_synthetic_log_is_sound(tmp_path: Path) -> None:
    with open_log(make(tmp_path / "x.jsonl", "--layers", "7", "--experts", "300")) as log:
        assert log.num_rows == 60_000 // 7 * 7
        assert log.notes == []
        assert (log.num_experts, log.layers) == (300, tuple(range(7)))
        assert log.end is not None
        assert log.end.raw["requests"] == log.requests
        counts = log.counts()
        assert set(counts.phase_rows()) == {"prefill", "decode"}
        assert counts.values.sum() == 4 * log.num_rows
        [(passes,)] = log.query("SELECT count(DISTINCT forward_pass_id) FROM routes")
        assert passes == log.end.raw["passes"]
        [(repeats,)] = log.query(
            "SELECT count(*) FROM routes WHERE len(list_distinct(topk_ids)) < len(topk_ids)"
        )
        assert repeats == 0


def test_both_formats_hold_the_same_rows_and_a_seed_other_ones(tmp_path: Path) -> None:
    path = make(tmp_path / "x.jsonl")
    [converted] = conversion.convert(make(tmp_path / "x.parquet"), tmp_path / "y.jsonl")
    ours, theirs = path.read_bytes().splitlines(), converted.read_bytes().splitlines()
    assert ours[1:-1] == theirs[1:-1]
    assert json.loads(ours[0])["files"] == ["x.jsonl"]
    other = make(tmp_path / "z.jsonl", "--seed", "1").read_bytes().splitlines()
    assert ours[1] != other[1]


@pytest.mark.parametrize("options", [["--top-k", "60"], ["--rows", "3"], ["--layers", "0"]])
def test_a_log_that_cannot_be_is_refused(tmp_path: Path, options: list[str]) -> None:
    with pytest.raises(UserError):
        make_synthetic_log.main([str(tmp_path / "x.jsonl"), *options])
    assert list(tmp_path.iterdir()) == []


def test_the_yardstick_counts_what_the_reader_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path / "x.jsonl")
    capsys.readouterr()
    bench_reading.yardstick(path)
    with open_log(path) as log:
        assert capsys.readouterr().out == f"{log.counts().values.sum():,} choices\n"


def sample(wall: float, peak: int = 1) -> list[bench_reading.Sample]:
    return [bench_reading.Sample(wall, wall, peak)]


@pytest.mark.parametrize(
    ("wall", "peak", "good"), [(3.9, 1, True), (4.1, 1, False), (1.0, 3 << 30, False)]
)
def test_the_table_says_which_target_was_missed(wall: float, peak: int, good: bool) -> None:
    todo = [bench_reading.Task("yard", []), bench_reading.Task("hist", [], share=1 / 15)]
    samples = {"yard": sample(60.0), "hist": sample(wall, peak)}
    text, met = bench_reading.table(todo, samples)
    assert met is good
    assert ("MISSED" in text) is not good
    assert f"1/{60 / wall:.1f}" in text
