# SPDX-License-Identifier: Apache-2.0
"""What the bench shows and writes; nothing is timed here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from expert_profiler.bench import overhead, overhead_chart, overhead_tables, pass_metrics
from expert_profiler.bench.cases import HEADLINE_MODES, MATRIX_MODES
from expert_profiler.commands import bench
from expert_profiler.errors import UserError
from tests.unit.bench.passes import CASE, pairs


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
    used = pass_metrics.memory(
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
        "fit": {"jsonl, writer thread": pass_metrics.fit([1, 2, 3], [1, 1, 1], [2, 3, 4])},
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
    text = overhead_tables.table(a_record())
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
    overhead_chart.draw(record).savefig(tmp_path / "overhead.png")
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
    with pytest.raises(UserError, match=r"overhead\.json exists .* --force"):
        bench.main(["--out", str(tmp_path)])
