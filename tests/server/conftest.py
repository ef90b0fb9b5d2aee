# SPDX-License-Identifier: Apache-2.0
"""Test this checkout's routes, whatever copy is installed."""

from __future__ import annotations

import os

import pytest

from tests.support import overlay

overlay.put_first()


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches of whoever runs the tests don't reach them."""
    for name in [name for name in os.environ if name.startswith("VLLM_LOG_MOE")]:
        monkeypatch.delenv(name)
