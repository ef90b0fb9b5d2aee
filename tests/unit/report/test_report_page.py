# SPDX-License-Identifier: Apache-2.0
"""The report: its figures by hand, its page safe and complete, contamination with and without."""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import make_hist
from expert_profiler import errors
from expert_profiler.log import open_log
from expert_profiler.log.token_counts import count_tokens
from expert_profiler.report import log_metrics, page, report_page
from expert_profiler.report.report_data import collect, pass_balance
from tests.support.logs import Record, meta, public_meta, route, run_rows, write_log

EVIL = "<script>alert('x')</script>&\""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: object) -> int:
    return errors.run(lambda: make_hist.main([str(arg) for arg in args]))


def report_of(folder: Path) -> tuple[dict[str, Any], str]:
    data: dict[str, Any] = json.loads((folder / "r" / "report.json").read_text())
    return data, (folder / "r" / "report.html").read_text()


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time; the test of the whole page draws."""
    monkeypatch.setattr(report_page.charts, "png", lambda figure: b"")


def data_of(path: Path, **options: Any) -> dict[str, Any]:
    with open_log(path) as log:
        return dict(json.loads(page.as_json(collect(log, **options).data)))


class Parsed(html.parser.HTMLParser):
    """Tags, what is loaded from elsewhere, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# ---- make_hist.py --report ----------------------------------------------------------------------


def test_one_command_makes_plot_page_and_json(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(folder / "moe_routes.jsonl", run_rows())
    assert run() == 0
    alone = (folder / "expert_hist.png").read_bytes()
    assert run("--report", "r", "--force") == 0
    assert (folder / "expert_hist.png").read_bytes() == alone  # the report changes no plot
    assert "report             r/report.html" in capsys.readouterr().out
    assert sorted(p.name for p in (folder / "r").iterdir()) == ["report.html", "report.json"]
    data, text = report_of(folder)
    found = Parsed(text)
    assert found.open == []
    # Nothing is loaded from anywhere.
    assert found.sources and all(s.startswith("data:image/png;base64,") for s in found.sources)
    assert "http" not in re.sub(r'data:image/png;base64,[^"]*', "", text).replace("http-equiv", "")
    assert "Sound: the log is complete" in found.text
    assert data["verdict"]["verdict"] == "pass"
    assert len(data["key_figures"]) == 5
    for title in (
        "Hot experts by layer", "How even is the load", "Coverage", "chosen together",
        "cache of experts", "Expert parallelism", "Token types", "The hottest experts",
        "Never used",
    ):  # fmt: skip
        assert title in found.text


@pytest.mark.usefixtures("no_charts")
def test_a_log_that_lost_rows_says_so_on_the_page_and_in_the_exit_code(folder: Path) -> None:
    write_log(folder / "moe_routes.jsonl", run_rows(), end={"drops": {"queue_full": 3}})
    assert run("--report", "r") == 1
    data, text = report_of(folder)
    assert data["verdict"]["verdict"] == "fail"
    assert "the recorder dropped rows: 3 queue_full" in Parsed(text).text


def test_an_existing_report_is_kept_unless_forced(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(folder / "moe_routes.jsonl", run_rows())
    (folder / "r").mkdir()
    (folder / "r" / "report.html").write_text("mine")
    assert run("--report", "r") == 2
    assert "report.html exists in r; replace with --force" in capsys.readouterr().err
    assert not (folder / "expert_hist.png").exists()  # refused before the work
    assert (folder / "r" / "report.html").read_text() == "mine"


# ---- figures ------------------------------------------------------------------------------------


def test_figures_of_a_hand_made_log(tmp_path: Path) -> None:
    # Experts 0, 1, 2, 3 of 4 chosen 4, 2, 1, 1 times by 4 tokens of 2 requests.
    rows = [
        route("a", 0, 0, [0, 1], [0.75, 0.25]),
        route("a", 1, 0, [0, 1], [0.5, 0.5], "decode"),
        route("b", 0, 0, [0, 2], [1.0, 0.0]),
        route("b", 1, 0, [0, 3], [0.5, 0.25], "decode"),
    ]
    path = write_log(tmp_path / "log.jsonl", rows, meta(layers=(0,), experts=4))
    data = data_of(path)
    [layer] = data["layers"]
    expected = {
        "choices": 8, "entropy_bits": 1.75, "normalised_entropy": 0.875,
        "effective_experts": 2**1.75, "gini": 0.3125, "max_over_mean": 2,
        "coefficient_of_variation": math.sqrt(1.5) / 2, "share_of_hottest_tenth": 0.5,
        "experts_to_cover_half": 1, "never_used": 0, "topk_entropy_lack": 0.25,
        "topk_excess_peak": 1, "topk_gini": 0.625,
    }  # fmt: skip
    assert {k: layer["all"][k] for k in expected} == pytest.approx(expected)
    # prefill [2, 1, 1, 0] and decode [2, 1, 0, 1]: JSD = 1/4 * 1 bit.
    assert data["prefill_decode_divergence_bits"] == [0.25]
    # Tokens of a share both experts, those of b one of two.
    assert layer["next_token_reuse"]["decode"] == 0.75
    assert layer["next_token_reuse"]["even"] == 0.5
    hot = data["hot_experts"][0]
    assert (hot["expert"], hot["choices"], hot["share"], hot["times_even"]) == (0, 4, 0.5, 2)
    assert hot["mean_weight"] == 2.75 / 4
    assert hot["share_of_weight"] == pytest.approx(2.75 / 3.75)
    assert data["run"]["rows_by_phase"] == {"prefill": 2, "decode": 2}
    # Two ranks in linear order: 6 and 2 choices.
    two = [e for e in data["expert_parallel"] if e["ranks"] == 2]
    assert [e["balance"] for e in two if e["placement"] == "linear"] == pytest.approx([4 / 6])
    assert [e["balance"] for e in two if e["placement"] == "round robin"] == [4 / 5]
    assert data["counts"]["values"] == [[[2, 1, 1, 0], [2, 1, 0, 1]]]
    assert data["counts"]["weight_mass"] == [[[1.75, 0.25, 0, 0], [1, 0.5, 0, 0.25]]]
    assert data["cache"]["accesses"] == [4]
    # Decode choices 0 1 | 0 3: a cache of two has expert 0 once.
    assert data["cache"]["hit_rate_by_layer_and_size"] == [[0, 0.25, 0.25, 0.25]]


@pytest.mark.parametrize("seed", range(4))
def test_balance_by_pass_equals_a_plain_loop(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [
        route("0", t, layer, rng.permutation(6)[:2].tolist(), forward_pass_id=t // 3)
        for t in range(10)
        for layer in (0, 1)
    ]
    rank_of = rng.integers(0, 3, 6)
    loads: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        for expert in row["topk_ids"]:
            key = row["forward_pass_id"], row["layer"]
            loads.setdefault(key, [0, 0, 0])[rank_of[expert]] += 1
    path = write_log(tmp_path / "log.jsonl", [*rows, route("1", 0, 0, [0, 1], flag="overrun")])
    with open_log(path) as log:
        found = pass_balance(log, "NOT flagged", rank_of, 3)
        expected = sum(sum(x) / 3 for x in loads.values()) / sum(map(max, loads.values()))
        assert found == pytest.approx(expected)


def built(kind: str, experts: int = 8, tokens: int = 64) -> list[Record]:
    rng = np.random.default_rng(0)
    rows = []
    for t in range(tokens):
        ids = {
            "uniform": [(2 * t) % experts, (2 * t + 1) % experts],
            "hot": [0, 1 + t % (experts - 1)],
            "blocks": [[0, 1], [4, 5]][t % 2],
        }[kind]
        weights = rng.random(2).tolist()
        rows += [route(str(t // 16), t % 16, layer, ids, weights) for layer in (0, 1)]
    return rows


@pytest.mark.parametrize(
    ("kind", "effective", "tenth", "dead", "balance"),
    [
        ("uniform", 8, 1 / 8, 0, 1),
        # H = 1/2 * 1 + 1/2 * log2(14) for expert 0 at 1/2 and seven at 1/14 (64 tokens: about).
        ("hot", 2 ** (0.5 + 0.5 * math.log2(14)), 1 / 2, 0, 1 / 4),
        ("blocks", 4, 1 / 4, 8, 1 / 2),
    ],
)
def test_built_cases_have_closed_forms(
    tmp_path: Path, kind: str, effective: float, tenth: float, dead: int, balance: float
) -> None:
    path = write_log(tmp_path / "log.jsonl", built(kind))
    with open_log(path) as log:
        found = count_tokens(log)
    key = {
        f["name"]: f["value"]
        for f in log_metrics.key_metrics(found, log_metrics.expert_parallel(found))
    }
    assert key["effective experts"] == pytest.approx(100 * effective / 8, rel=1e-3)
    assert key["load of the hottest tenth"] == pytest.approx(100 * tenth)
    assert key["never used"] == dead
    assert key["balance over 8 ranks"] == pytest.approx(100 * balance, rel=1e-3)
    assert math.isnan(key["prefill against decode"])
    entries = log_metrics.by_layer(found)
    if kind == "blocks":
        # Every token and its next are in different blocks; a layer tells the next one's block.
        assert entries[0]["next_token_reuse"]["all"] == 0
        assert entries[0]["transition_bits"] == pytest.approx(1)
    if kind == "uniform":
        assert entries[0]["next_token_reuse"]["all"] == 0


# ---- the contamination case ---------------------------------------------------------------------


def contaminated(folder: Path) -> Path:
    """A public logger's fault at its true size: 16,640 identical rows before 4,384 true ones."""
    rng = np.random.default_rng(0)
    rows = [route("w", i, 0, [0, 1, 2, 3], [0.5, 0.25, 0.15, 0.1]) for i in range(16_640)]
    for i in range(4384):
        ids = rng.permutation(60)[:4].tolist()
        rows.append(route(f"r{i % 25}{EVIL}", i // 25, 0, ids, rng.random(4).tolist()))
    rows = [{k: v for k, v in r.items() if k not in ("phase", "forward_pass_id")} for r in rows]
    header = public_meta(layers_logged=[0], top_k=4, model_id=EVIL)
    return write_log(folder / "moe_routes.jsonl", rows, header, finished=False)


@pytest.mark.usefixtures("no_charts")
def test_warm_up_rows_are_said_and_figures_shown_with_and_without(folder: Path) -> None:
    contaminated(folder)
    assert run("--report", "r") == 0
    data, text = report_of(folder)
    assert data["verdict"]["verdict"] == "doubtful"
    runs = data["identical_rows"]
    assert (runs["rows"], runs["of_rows"], runs["longest_run"]) == (16_640, 21_024, 16_640)
    assert data["run"]["rows"] == 4384 and data["run"]["requests"] == 25
    clean = {f["name"]: f["value"] for f in data["key_figures"]}
    dirty = {f["name"]: f["value"] for f in runs["key_figures_with_them"]}
    assert clean["effective experts"] > 98
    # 4 experts with 16,640 + 292 choices each, 56 with 292, of 84,096: H = 3.452 bits, 10.9 of 60.
    hot, cold = (16_640 + 292) / 84_096, 292 / 84_096
    entropy = -4 * hot * math.log2(hot) - 56 * cold * math.log2(cold)
    assert dirty["effective experts"] == pytest.approx(100 * 2**entropy / 60, rel=0.01)
    assert clean["load of the hottest tenth"] < 12 < 80 < dirty["load of the hottest tenth"]
    found = Parsed(text)
    assert "16,640 of 21,024 rows (79.1%)" in found.text
    assert "the figures with and without" in found.text
    assert "Below: without them" in found.text
    # The strings of the log are text, not markup.
    assert "script" not in found.tags
    assert EVIL in found.text
    assert "<script" not in text


def test_a_log_of_nothing_but_identical_rows_is_reported_as_it_is(tmp_path: Path) -> None:
    rows = [route("w", i, 0, [0, 1], [0.5, 0.25]) for i in range(100)]
    data = data_of(write_log(tmp_path / "log.jsonl", rows, meta(layers=(0,))))
    assert data["identical_rows"]["key_figures_with_them"] is None
    assert not data["identical_rows"]["left_out_of_everything_else"]
    assert data["run"]["rows"] == 100
