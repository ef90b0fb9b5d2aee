# SPDX-License-Identifier: Apache-2.0
"""Exports, read back the way their consumers read them."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from expert_profiler import errors
from expert_profiler.commands import export
from expert_profiler.log import open_log
from expert_profiler.metrics import placement
from expert_profiler.report import exports
from tests.support.logs import meta, public_meta, route, run_rows, write_log
from tests.unit.metrics.test_placement import vllm_policy

ROWS = [
    # layers 1 and 3 of a model whose layers 0 and 2 are dense
    route("0", 0, 1, [2, 0], [0.75, 0.25], forward_pass_id=0),
    route("0", 0, 3, [1, 0], [0.5, 0.5], forward_pass_id=0),
    route("0", 1, 1, [2, 3], [0.5, 0.25], phase="decode", forward_pass_id=1),
    route("0", 1, 3, [1, 2], [0.5, 0.5], phase="decode", forward_pass_id=1),
    route("0", 2, 1, [2, 0], [1.0, 0.0], phase="decode", forward_pass_id=4),
    route("0", 2, 3, [3, 2], [0.5, 0.5], phase="decode", forward_pass_id=4),
    route("0", 2, 3, [0, 2], [0.5, 0.5], flag="overrun", forward_pass_id=4),
]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "log.jsonl", ROWS, meta(layers=(1, 3), experts=4))


def run(*args: object) -> int:
    return errors.run(lambda: export.main([str(arg) for arg in args]))


def test_sglang_reads_counts_by_step_layer_and_expert(log: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    out = tmp_path / "x.pt"
    assert run(log, "--format", "sglang", "--out", out) == 0
    # As SGLang's --init-expert-location does: weights_only, then the key; 3 dimensions.
    found = torch.load(out, weights_only=True)["logical_count"]
    assert found.dtype == torch.int64
    assert list(found.shape) == [5, 4, 4]  # passes 0 to 4, layers 0 to 3
    assert found[:, 1].tolist() == [
        [1, 0, 1, 0], [0, 0, 1, 1], [0] * 4, [0] * 4, [1, 0, 1, 0]
    ]  # fmt: skip
    assert found[:, [0, 2]].sum() == 0
    assert found.sum() == 12  # 6 unmarked rows of 2


def test_passes_are_added_up_to_the_steps_asked_for(log: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    out = tmp_path / "x.pt"
    args = ("--steps", 2, "--num-layers", 6)
    assert run(log, "--format", "sglang", "--out", out, *args) == 0
    found = torch.load(out, weights_only=True)["logical_count"]
    assert list(found.shape) == [2, 6, 4]
    # Pass p of 5 is in step p * 2 // 5: passes 0 to 2, and 3 and 4.
    assert found[:, 1].tolist() == [[1, 0, 2, 1], [1, 0, 1, 0]]


def test_a_log_without_passes_is_one_step(tmp_path: Path) -> None:
    rows = [
        {k: v for k, v in row.items() if k not in ("phase", "forward_pass_id")}
        for row in run_rows()
    ]
    path = write_log(tmp_path / "log.jsonl", rows, public_meta(), finished=False)
    with open_log(path) as log:
        found = exports.logical_count(log, 1000)
        assert found.shape == (1, 2, 8)
        assert (found[0] == log.counts().values.sum(axis=1)).all()


def test_deepseeks_balancer_takes_the_weights(log: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pt, npy = tmp_path / "w.pt", tmp_path / "w.npy"
    assert run(log, "--format", "eplb", "--out", pt) == run(log, "--format", "eplb", "--out", npy)
    weight = torch.load(pt, weights_only=True)
    assert weight.dtype == torch.float32
    assert weight.tolist() == [[2, 0, 3, 1], [1, 2, 2, 1]]
    assert np.load(npy).tolist() == weight.tolist()
    answer = vllm_policy().rebalance_experts(weight, 6, 1, 1, 2)
    copies = np.asarray(answer[-1])
    assert copies.tolist() == [
        placement.copies(np.array(row), 6).tolist() for row in weight.tolist()
    ]


def test_hot_experts_as_csv_and_json(log: Path, tmp_path: Path) -> None:
    assert run(log, "--format", "hot", "--out", tmp_path / "hot.csv") == 0
    with (tmp_path / "hot.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["layer"], r["expert"], r["count"]) for r in rows[:5]] == [
        ("1", "2", "3"), ("1", "0", "2"), ("1", "3", "1"), ("1", "1", "0"), ("3", "1", "2")
    ]  # fmt: skip
    assert len(rows) == 8
    assert sum(float(r["share"]) for r in rows if r["layer"] == "3") == pytest.approx(1)
    assert run(log, "--format", "hot", "--out", tmp_path / "hot.json", "--top", 1) == 0
    data = json.loads((tmp_path / "hot.json").read_text())
    assert data["experts"] == [
        {"layer": 1, "expert": 2, "count": 3, "share": 0.5},
        {"layer": 3, "expert": 1, "count": 2, "share": 2 / 6},
    ]
    assert (data["num_experts"], data["top_k"]) == (4, 2)


def test_numpy_archive(log: Path, tmp_path: Path) -> None:
    assert run(log, "--format", "npz", "--out", tmp_path / "x.npz") == 0
    with np.load(tmp_path / "x.npz") as data:
        assert data["layers"].tolist() == [1, 3]
        assert data["phases"].tolist() == ["prefill", "decode"]
        assert data["counts"].dtype == np.int64
        assert data["counts"].tolist() == [
            [[1, 0, 1, 0], [1, 0, 2, 1]], [[1, 1, 0, 0], [0, 1, 2, 1]]
        ]  # fmt: skip
        assert data["weight_mass"][0].tolist() == [[0.25, 0, 0.75, 0], [0, 0, 1.5, 0.25]]
        assert data["rows"].tolist() == [[1, 2], [1, 2]]
        assert str(data["model_id"]) == "tiny/moe"


def test_identical_runs_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warm_up = [route("w", i, 0, [0, 1], [0.5, 0.25]) for i in range(100)]
    path = write_log(tmp_path / "log.jsonl", warm_up + run_rows())
    assert run(path, "--format", "npz", "--out", tmp_path / "x.npz") == 0
    assert "100 rows in long runs of identical rows are left out" in capsys.readouterr().out
    with np.load(tmp_path / "x.npz") as data:
        assert data["rows"].sum() == 24


def test_a_log_cut_short_is_exported_but_fails(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.jsonl", run_rows(), finished=False)
    assert run(path, "--format", "npz", "--out", tmp_path / "x.npz") == 1
    assert (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "sglang", "--out", "x.json"], "must end in .pt"),
        (["--format", "eplb", "--out", "x.csv"], "must end in .pt or .npy"),
        (["--format", "npz", "--out", "no/x.npz"], "mkdir -p no"),
        (["--format", "npz", "--out", "there.npz"], "there.npz exists; replace it with --force"),
        pytest.param(
            ["--format", "sglang", "--out", "x.pt", "--num-layers", "3"],
            "the log has layer 3",
            marks=pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed"),
        ),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    log: Path, tmp_path: Path, args: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.npz").write_bytes(b"mine")
    assert run(log, *args) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "there.npz").read_bytes() == b"mine"
