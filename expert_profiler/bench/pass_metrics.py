# SPDX-License-Identifier: Apache-2.0
"""From passes to the metrics of ``overhead.json``. Pure: seconds in, ratios and intervals out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from expert_profiler.bench.cases import AA, MODES, YARDSTICK
from expert_profiler.run import timing

Pass = Mapping[str, Any]


class Pair(NamedTuple):
    """A pass in some mode and the baseline pass that ran next to it; see ``engine_worker``."""

    base: Pass
    own: Pass


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and every value, in the values' own unit."""
    low, middle, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
    return {
        "median": float(middle),
        "iqr": [float(low), float(high)],
        "values": [float(value) for value in values],
    }


#: What is compared, by name: seconds, smaller is better. A pass's key, whose median is taken:
#: over requests of the time to the first token, over engine steps of the time to the next.
MEASURES = {"wall": "wall", "generate": "generate", "ttft": "ttft", "inter_token": "gaps"}


def compare(mode: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    """One mode of one case: the paired ratio of every measure, and what it was made from."""
    seconds = {
        name: {
            "base": [float(np.median(pair.base[key])) for pair in pairs],
            "own": [float(np.median(pair.own[key])) for pair in pairs],
        }
        for name, key in MEASURES.items()
    }
    ratios = {name: timing.paired_ratio(*sides.values()) for name, sides in seconds.items()}
    known = MODES.get(mode)
    target = known.target if known else None
    return {
        "mode": mode,
        "ratios": ratios,
        "seconds": {
            name: {side: spread(values) for side, values in sides.items()}
            for name, sides in seconds.items()
        },
        "rows": pairs[0].own["rows"],
        "bytes": pairs[0].own["bytes"],
        "target": target,
        "meets_target": None if target is None else meets(ratios["wall"], target),
    }


def meets(ratio: Mapping[str, Any], target: float) -> str:
    """Whether a target is met, as far as the interval can tell: "yes", "no" or "open"."""
    low, high = ratio["paired_ratio_ci95"]
    if high <= target:
        return "yes"
    return "no" if low > target else "open"


def problems(name: str, pairs: Mapping[str, Sequence[Pair]], expected_rows: int) -> list[str]:
    """Why a case's metrics must not be trusted; empty where nothing stands against them.

    Args:
        name: of the case.
        pairs: by mode.
        expected_rows: a layer's rows of one pass.
    """
    found: list[str] = []
    digests = {item["tokens"] for each in pairs.values() for pair in each for item in pair}
    if len(digests) > 1:
        found.append(f"{name}: {len(digests)} different outputs; recording must not change tokens")
    for mode, each in pairs.items():
        for pair in each:
            own = pair.own
            where = f"{name}, {mode}"
            if own["verdict"] != "pass" or own["dropped"]:
                found.append(f"{where}: verdict {own['verdict']}, {own['dropped']} dropped")
            rows = expected_rows * recorded_layers(mode, own["moe_layers"])
            if own["rows"] != rows:
                found.append(f"{where}: {own['rows']} rows, expected {rows}")
    return found


def recorded_layers(mode: str, moe_layers: int) -> int:
    """How many of the model's MoE layers a pass in this mode leaves rows of."""
    known = MODES.get(mode)
    if known is None or (known.recorder is None and mode != YARDSTICK):
        return 0
    return moe_layers if known.layers == "all" else 1


def aa_holds(compared: Mapping[str, Any]) -> bool:
    """Whether the interval of the baseline against itself holds 1."""
    low, high = compared[AA]["ratios"]["wall"]["paired_ratio_ci95"]
    return bool(low <= 1 <= high)


def fit(rows: Sequence[float], steps: Sequence[float], seconds: Sequence[float]) -> dict[str, Any]:
    """Least squares of seconds = a * steps + b * rows, rows = layers x tokens.

    Returns:
        ``seconds_per_step`` a, ``seconds_per_row`` b, and ``r2``, the share of the variance about
        the mean that the two explain.
    """
    x = np.column_stack([np.asarray(steps, dtype=float), np.asarray(rows, dtype=float)])
    y = np.asarray(seconds, dtype=float)
    solution, *_ = np.linalg.lstsq(x, y, rcond=None)
    left = float(((y - x @ solution) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    return {
        "seconds_per_step": float(solution[0]),
        "seconds_per_row": float(solution[1]),
        "r2": 1 - left / total if total else 1.0,
        "points": [
            {"rows": float(r), "steps": float(s), "seconds": float(t)}
            for r, s, t in zip(rows, steps, seconds, strict=True)
        ],
    }


def memory(record: Mapping[str, Any], allowance: int = 64 << 20) -> dict[str, Any]:
    """The recorder's memory against its bound, and whether it grows.

    ``recorder_bytes`` = buffer + most resident memory above the process's own;
    ``bound_bytes`` = buffer + queue limit + ``allowance``. ``growth_bytes`` is what a line through
    the second half of the samples, when queue and allocator have filled, gains over that half.

    Args:
        record: of ``writer_alone.memory`` or ``writer_alone.worst_memory``.
        allowance: bytes for everything that is neither buffer nor queue.
    """
    samples = np.asarray(record["samples"], dtype=float)
    late = samples[len(samples) // 2 :]
    slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) if len(late) > 1 else 0.0
    span = float(late[-1, 0] - late[0, 0])
    used = record["buffer_bytes"] + max(0.0, float(samples[:, 1].max()))
    bound = record["buffer_bytes"] + record["queue_bytes"] + allowance
    return {
        **record,
        "recorder_bytes": used,
        "bound_bytes": bound,
        "within_bound": used <= bound,
        "growth_bytes": slope * span,
    }


#: The engine thread's parts of every step; ``end`` holds those after it.
STEP_PARTS = ("hook ops", "begin", "end", "snapshot", "count", "enqueue")


def parts_per_step(parts: Mapping[str, Any], steps: int) -> dict[str, float]:
    """Microseconds of the engine thread a step; ``hook ops`` + ``begin`` + ``end`` is all of it."""
    return {name: parts[name]["seconds"] / steps * 1e6 for name in STEP_PARTS if name in parts}


def engine_seconds(parts: Mapping[str, Any]) -> float:
    """Seconds that the steps of a recorded pass took from the engine's thread.

    A recording without a writer counts its last steps when it stops: they are in it too.
    """
    names = ["hook ops", "begin", "end"] + ([] if "writer" in parts else ["stop"])
    return sum(seconds_of(parts, name) for name in names)


def seconds_of(parts: Mapping[str, Any], name: str) -> float:
    """Seconds of one part; 0 where it was never called."""
    return float(parts[name]["seconds"]) if name in parts else 0.0


def profile(passes: Sequence[Pass], base_wall: float) -> dict[str, Any]:
    """Where the time of a mode's passes goes: of every metric the median over passes.

    ``accounted`` is what recording adds to a pass, by its own clocks, as ratios to the wall time
    of a pass without a recorder. ``least``: the engine thread's steps. ``most``: those and all CPU
    time of the writer, as if the engine had waited for every moment of it.

    Args:
        passes: of ``engine_worker.Bench.profile``, all of one mode and case.
        base_wall: median seconds of that case's baseline passes.
    """
    steps = passes[0]["parts"]["end"]["calls"]
    engine = float(np.median([engine_seconds(item["parts"]) for item in passes]))
    writer = float(np.median([seconds_of(item["parts"], "writer") for item in passes]))
    per_step = [parts_per_step(item["parts"], steps) for item in passes]
    return {
        "passes": len(passes),
        "steps": steps,
        "rows_per_step": passes[0]["rows"] / steps,
        "engine_us_per_step": {
            name: float(np.median([item[name] for item in per_step])) for name in per_step[0]
        },
        "start_stop_seconds": {
            name: float(np.median([seconds_of(item["parts"], name) for item in passes]))
            for name in ("start", "stop")
        },
        "writer_seconds": writer,
        "writer_seconds_per_million_rows": (
            writer / passes[0]["rows"] * 1e6 if passes[0]["rows"] else 0.0
        ),
        "accounted": {
            "least": 1 + engine / base_wall,
            "most": 1 + (engine + writer) / base_wall,
        },
    }
