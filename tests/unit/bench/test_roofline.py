# SPDX-License-Identifier: Apache-2.0
"""The projection for GPUs, as docs/overhead.md has it."""

from __future__ import annotations

import pytest

from expert_profiler.bench import roofline
from tests.support.paths import REPO


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
