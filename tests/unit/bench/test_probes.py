# SPDX-License-Identifier: Apache-2.0
"""What the recorder's parts spend is told in full, without the probes' own cost."""

from __future__ import annotations

import pytest

from expert_profiler.bench.probes import Probes


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
