# SPDX-License-Identifier: Apache-2.0
"""Test this checkout's recorder, whatever copy is installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import overlay

overlay.put_first()


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches of whoever runs the tests don't reach them."""
    for name in [name for name in os.environ if name.startswith("VLLM_LOG_MOE")]:
        monkeypatch.delenv(name)


@pytest.fixture
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, and nothing hashed: that covers files of an installed vLLM, which lie elsewhere."""
    from vllm.moe_routes import recorder
    from vllm.moe_routes.recording import provenance

    from tests.support.fake_runner import group

    monkeypatch.setattr(recorder, "get_pp_group", group())
    monkeypatch.setattr(recorder, "get_tp_group", group())
    monkeypatch.setattr(provenance, "patch_id", lambda: "0123abcd")


@pytest.fixture
def give_recorder(_one_rank: None) -> Iterator[Callable[[Any, Any], Any]]:
    """Give runners a recorder with a config; what is still open at a test's end is closed."""
    from vllm.moe_routes.recorder import Recorder

    armed: list[Any] = []

    def give(runner: Any, config: Any) -> Any:
        runner.moe_routes = Recorder(config, runner)
        armed.append(runner)
        return runner

    yield give
    for runner in armed:
        runner.moe_routes.shutdown()
