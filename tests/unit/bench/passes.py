# SPDX-License-Identifier: Apache-2.0
"""Made-up passes of the bench."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expert_profiler.bench import pass_metrics
from expert_profiler.bench.cases import Case
from expert_profiler.bench.pass_metrics import Pair

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
    rows = CASE.routed_tokens * pass_metrics.recorded_layers(mode, MOE_LAYERS)
    return [Pair(a_pass(1.0 + i), a_pass((1.0 + i) * x, rows)) for i, x in enumerate(ratios)]
