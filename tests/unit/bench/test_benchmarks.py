"""The bench's order of passes, its arithmetic and what it prints; nothing is timed here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import figures, overhead, plot, report, roofline
from benchmarks.cases import (
    AA,
    BASE,
    FULL,
    HEADLINE_MODES,
    MATRIX_MODES,
    MODES,
    QUICK,
    YARDSTICK,
    Case,
    schedule,
)
from benchmarks.figures import Pair
from benchmarks.probes import Probes
from expert_profiler.errors import UserError
from expert_profiler.report.histogram import save_png
from tests.support.paths import REPO

CASE = Case(prompt_tokens=4, batch=2, output_tokens=3)
MOE_LAYERS = 24


def a_pass(wall: float, rows: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "wall": wall,
        "generate": wall * 0.9,
        "ttft": [wall * 0.1, wall * 0.3],
        "gaps": [wall * 0.2, wall * 0.1, wall * 0.4],
        "tokens": "abc",
        "generated": 6,
        "bytes": 10 * rows,
        "rows": rows,
        "moe_layers": MOE_LAYERS,
        "verdict": "pass",
        "dropped": 0,
        **changes,
    }


def pairs(mode: str, ratios: Sequence[float]) -> list[Pair]:
    rows = CASE.routed_tokens * figures.recorded_layers(mode, MOE_LAYERS)
    return [Pair(a_pass(1.0 + i), a_pass((1.0 + i) * x, rows)) for i, x in enumerate(ratios)]


# ---- the order of passes -------------------------------------------------------------------


@given(
    modes=st.lists(st.sampled_from([m for m in MODES if m != BASE]), unique=True, max_size=8),
    number=st.integers(0, 40),
)
def test_every_mode_runs_once_a_round_right_beside_its_baseline(
    modes: list[str], number: int
) -> None:
    slots = schedule(modes, number)
    assert sorted(slot.mode for slot in slots if slot.mode != BASE) == sorted(modes)
    for i, slot in enumerate(slots):
        assert slots[slot.base].mode == BASE
        assert abs(slot.base - i) == (slot.mode != BASE)


def test_over_rounds_no_mode_keeps_a_side_of_its_baseline() -> None:
    modes = list(HEADLINE_MODES)
    before = dict.fromkeys(modes, 0)
    rounds = 2 * len(modes)
    for number in range(rounds):
        for i, slot in enumerate(schedule(modes, number)):
            if slot.mode != BASE:
                before[slot.mode] += i < slot.base
    assert all(0.3 <= count / rounds <= 0.7 for count in before.values()), before


def test_the_plan_has_its_cases_its_pairs_and_its_targets() -> None:
    assert [(cell.case.prompt_tokens, cell.case.batch) for cell in FULL.matrix] == [
        (prompt, batch) for prompt in (16, 128, 512) for batch in (1, 8, 32)
    ]
    assert all({"parquet", "jsonl"} <= set(cell.modes) <= set(MATRIX_MODES) for cell in FULL.matrix)
    assert (FULL.headline.batch, FULL.headline_pairs) == (25, 20)
    assert {AA, YARDSTICK, "armed"} < set(HEADLINE_MODES)
    targets = {name: MODES[name].target for name in HEADLINE_MODES if MODES[name].target}
    assert targets == {
        "armed": 1.003, "stat": 1.005, "per_pass": 1.008, "parquet": 1.01, "jsonl": 1.02
    }  # fmt: skip
    assert {"parquet_layer0", "jsonl_layer0"} < set(MATRIX_MODES)


def test_a_requests_last_token_is_no_routed_token() -> None:
    assert CASE.routed_tokens == 2 * (4 + 3 - 1)


# ---- the arithmetic ------------------------------------------------------------------------


def test_a_mode_is_compared_with_its_own_baseline_passes() -> None:
    record = figures.compare("jsonl", pairs("jsonl", [1.01, 1.02, 1.03]))
    assert record["ratios"]["wall"]["paired_ratio_median"] == pytest.approx(1.02)
    assert record["ratios"]["wall"]["pairs"] == 3
    assert record["seconds"]["wall"]["base"]["values"] == [1.0, 2.0, 3.0]
    assert record["seconds"]["wall"]["base"]["iqr"] == [1.5, 2.5]
    assert record["seconds"]["ttft"]["base"]["median"] == pytest.approx(0.4)
    assert record["seconds"]["inter_token"]["base"]["median"] == pytest.approx(0.4)
    assert (record["target"], record["meets_target"]) == (1.02, "open")


@pytest.mark.parametrize(
    ("ratios", "told"),
    [([1.001, 1.002, 1.003], "yes"), ([1.004, 1.005, 1.006], "open"), ([1.006, 1.007], "no")],
)
def test_a_target_is_met_or_missed_only_where_the_interval_tells(
    ratios: list[float], told: str
) -> None:
    assert figures.compare("stat", pairs("stat", ratios))["meets_target"] == told
    assert figures.compare(YARDSTICK, pairs(YARDSTICK, [1.2]))["meets_target"] is None


@pytest.mark.parametrize(("ratios", "holds"), [([0.99, 1.0, 1.01], True), ([1.02] * 9, False)])
def test_the_baseline_against_itself_must_hold_1(ratios: list[float], holds: bool) -> None:
    assert figures.aa_holds({AA: figures.compare(AA, pairs(AA, ratios))}) is holds


def test_a_clean_case_has_no_problems() -> None:
    found = {mode: pairs(mode, [1.0, 1.1]) for mode in MODES if mode != BASE}
    assert figures.problems("c", found, CASE.routed_tokens) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokens": "other"}, "2 different outputs"),
        ({"verdict": "fail"}, "verdict fail"),
        ({"dropped": 3}, "3 dropped"),
        ({"rows": 25}, "25 rows, expected 288"),
        ({"rows": 276}, "276 rows"),
        ({"rows": 576}, "576 rows"),
        ({"rows": 0}, "0 rows"),
    ],
)
def test_what_makes_a_case_untrue_is_told(changes: dict[str, Any], told: str) -> None:
    (pair,) = pairs("jsonl", [1.0])
    found = figures.problems("c", {"jsonl": [Pair(pair.base, {**pair.own, **changes})]}, 12)
    assert len(found) == 1
    assert told in found[0]


@settings(max_examples=30)
@given(a=st.floats(1e-5, 1), b=st.floats(1e-8, 1e-3), seed=st.integers(0, 99))
def test_a_cost_that_is_linear_is_found_to_be_linear(a: float, b: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps, rows = rng.integers(1, 100, 9), rng.integers(1, 100_000, 9)
    fit = figures.fit(rows.tolist(), steps.tolist(), (a * steps + b * rows).tolist())
    assert fit["seconds_per_step"] == pytest.approx(a, rel=1e-4)
    assert fit["seconds_per_row"] == pytest.approx(b, rel=1e-4)
    assert fit["r2"] == pytest.approx(1)


def test_memory_is_held_against_buffer_queue_and_allowance() -> None:
    record = {
        "buffer_bytes": 100,
        "queue_bytes": 1000,
        "samples": [[1, 10], [2, 500], [3, 520], [4, 540]],
    }
    figured = figures.memory(record, allowance=50)
    assert (figured["recorder_bytes"], figured["bound_bytes"]) == (640, 1150)
    assert figured["within_bound"]
    assert figured["growth_bytes"] == pytest.approx(20)
    assert not figures.memory({**record, "queue_bytes": 400}, allowance=50)["within_bound"]


def test_a_profile_adds_up_by_step() -> None:
    parts = {
        "hook ops": {"seconds": 0.004, "calls": 48},
        "begin": {"seconds": 0.001, "calls": 2},
        "end": {"seconds": 0.003, "calls": 2},
        "enqueue": {"seconds": 0.001, "calls": 2},
        "writer": {"seconds": 0.02, "calls": 4},
    }
    assert figures.parts_per_step(parts, 2) == pytest.approx(
        {"hook ops": 2000, "begin": 500, "end": 1500, "enqueue": 500}
    )
    assert figures.engine_seconds(parts) == pytest.approx(0.008)
    assert figures.seconds_of(parts, "writer") == 0.02
    assert figures.seconds_of({}, "writer") == 0
    counts_at_the_end = {**parts, "stop": {"seconds": 0.01, "calls": 1}}
    assert figures.engine_seconds(counts_at_the_end) == pytest.approx(0.008), "its writer's"
    del counts_at_the_end["writer"]
    assert figures.engine_seconds(counts_at_the_end) == pytest.approx(0.018)


def test_a_part_that_is_dear_once_in_many_calls_counts_in_full() -> None:
    probes = Probes()
    ticks = iter([x for i in range(32) for x in (float(i), i + (0.5 if i == 7 else 0.001))])
    timed = probes._timed("end", lambda: None, lambda: next(ticks))
    for _ in range(32):
        timed()
    spent = probes.take()["end"]
    assert spent.calls == 32
    assert spent.seconds == pytest.approx(0.5 + 31 * 0.001, rel=1e-2)


def test_what_a_probe_costs_in_the_hooks_place_is_not_the_hooks() -> None:
    """A probe takes 1.5 s there, whatever it took where it was calibrated; the hook takes 0.5."""
    probes, now, hooked = Probes(), [0.0], []

    def clock() -> float:
        now[0] += 1.5
        return now[0]

    def hook(layer: str) -> None:
        hooked.append(layer)
        now[0] += 0.5

    timed = probes._held_against_nothing("hook ops", hook, clock)
    for i in range(100):
        timed(f"layer {i}")
    assert hooked == [f"layer {i}" for i in range(100)], "each of them once, timed or not"
    spent = probes.take()["hook ops"]
    assert spent.calls == 100
    assert spent.seconds == pytest.approx(50.0)
    assert probes.take() == {}


def test_what_recording_adds_is_accounted_for_by_its_own_clocks() -> None:
    """0.008 s of the engine thread, 0.02 s of the writer, beside passes of 2 s."""
    parts = {
        "hook ops": {"seconds": 0.004, "calls": 48},
        "begin": {"seconds": 0.001, "calls": 2},
        "end": {"seconds": 0.003, "calls": 2},
        "start": {"seconds": 0.5, "calls": 1},
        "writer": {"seconds": 0.02, "calls": 4},
    }
    slow = {name: {**part, "seconds": 9.0} for name, part in parts.items()}
    passes = [a_pass(2.0, 1200, parts=item) for item in (parts, slow, parts)]
    told = figures.profile(passes, base_wall=2.0)
    assert told["accounted"] == pytest.approx({"least": 1.004, "most": 1.014})
    assert told["start_stop_seconds"] == {"start": 0.5, "stop": 0.0}
    assert told["writer_seconds_per_million_rows"] == pytest.approx(0.02 / 1200 * 1e6)
    assert (told["passes"], told["steps"], told["rows_per_step"]) == (3, 2, 600)


# ---- what is shown -------------------------------------------------------------------------


def a_record() -> dict[str, Any]:
    """A record as ``overhead.measure`` makes it, of made-up passes."""

    def section(modes: Sequence[str]) -> dict[str, Any]:
        return overhead.section(CASE, {m: pairs(m, [0.99, 1.0, 1.01]) for m in modes}, 3)

    profiled = {
        "steps": 3,
        "rows_per_step": 600.0,
        "engine_us_per_step": {"hook ops": 50.0, "begin": 3.0, "end": 20.0},
        "accounted": {"least": 1.0007, "most": 1.0012},
        "start_stop_seconds": {"start": 0.004, "stop": 0.001},
        "writer_seconds_per_million_rows": 1.5,
    }
    used = figures.memory(
        {
            "simulated_minutes": 30.0,
            "rows": 12,
            "buffer_bytes": 1,
            "queue_bytes": 2,
            "samples": [[1, 2], [2, 2]],
        }
    )
    speed = {
        "rows": 1000, "bytes": 9000, "rows_per_cpu_second": 2e6, "rows_per_second": 1e6
    }  # fmt: skip
    return {
        "headline": section(HEADLINE_MODES),
        "aa_interval_holds_1": True,
        "matrix": [section(["parquet"]), section(MATRIX_MODES)],
        "processes": {
            "ops": {"unpatched": 10, "unset": 10, "armed": 10},
            **section(["unpatched again", "unset"]),
        },
        "profile": {"case": {"name": CASE.name, "output_tokens": 3}, "modes": {"stat": profiled}},
        "fit": {"jsonl, writer thread": figures.fit([1, 2, 3], [1, 1, 1], [2, 3, 4])},
        "writer": {
            "shape": [61, 256, 8],
            "parquet": speed,
            "jsonl": {**speed, "rows_per_cpu_second": 3e5},
            "sustained": {
                "rows_per_second": 580_000.0,
                "seconds": 60.0,
                "drops": {"queue_full": 0},
                "most_waiting_bytes": 1 << 20,
                "queue_bytes": 64 << 20,
            },
            "memory": used,
            "worst_memory": used,
        },
        "problems": [],
        "quick": False,
        "provenance": {"model": "tiny", "device": "cpu", "vllm": "0.15.1", "seconds": 1.0},
    }


def test_the_report_names_every_mode_ratio_and_target() -> None:
    text = report.table(a_record())
    for name in HEADLINE_MODES:
        assert f"\n{name}" in text
    assert "1.0000 (0.9900 to 1.0100)" in text
    assert "1.003 open" in text
    assert "1.0007 to 1.0012" in text
    assert "2.00 M rows a core second" in text
    assert "0.30 M rows a core second" in text
    assert "MISSED" in text  # the writer's 0.30 M of JSONL
    assert "a 1000000.0 us/step" in " ".join(text.split())


def test_the_record_is_plain_json_and_the_plot_is_drawn(tmp_path: Path) -> None:
    record = json.loads(json.dumps(a_record()))
    save_png(plot.overhead_figure(record), tmp_path / "overhead.png")
    assert (tmp_path / "overhead.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, 0),
        ({"problems": ["tokens differ"]}, 1),
        ({"aa_interval_holds_1": False}, 1),
    ],
)
def test_figures_that_can_t_be_trusted_end_with_1(
    changes: dict[str, Any], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert overhead.tell({**a_record(), **changes}, Path("out")) == code
    assert ("FAILED" in capsys.readouterr().out) == bool(code)


def test_results_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "overhead.json").touch()
    with pytest.raises(UserError, match=r"overhead\.json exist .* add --force"):
        overhead.main(["--out", str(tmp_path)])


def test_the_quick_form_has_every_part_but_the_other_processes() -> None:
    assert QUICK.processes == 0
    assert QUICK.headline_pairs >= 2
    assert QUICK.matrix and QUICK.fit and QUICK.synthetic_rows and QUICK.simulated_minutes


def test_the_spread_keeps_every_value() -> None:
    values = [3.0, 1.0, 2.0]
    assert figures.spread(values)["values"] == values
    assert figures.spread(values)["median"] == statistics.median(values)


# ---- the projection ------------------------------------------------------------------------


def test_the_documented_projection_is_what_the_arithmetic_gives() -> None:
    text = (REPO / "docs" / "overhead.md").read_text(encoding="utf-8")
    assert roofline.table() in text


def test_a_projection_by_hand() -> None:
    """Qwen1.5-MoE: 24 layers, top-4; 10 tokens make 960 choices of 1 + 4 bytes."""
    told = roofline.project(roofline.MODELS[0], 10)
    assert told.captured_bytes == 960 * 5
    assert told.moved_bytes == 960 * ((4 + 4) + (1 + 4) + 2 * (1 + 4) + (1 + 4) + 1)
    assert told.launch_seconds == pytest.approx(48 * 1.5e-6)
    assert told.step_seconds == pytest.approx(28.6e9 / 3.35e12)


def test_ids_of_256_experts_take_two_bytes() -> None:
    told = roofline.project(roofline.MODELS[2], 1)
    assert told.captured_bytes == 58 * 8 * (2 + 4)
    assert told.moved_bytes == 58 * 8 * ((4 + 4) + (2 + 4) + 2 * (2 + 4) + (2 + 4) + 2)
