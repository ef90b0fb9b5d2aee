# SPDX-License-Identifier: Apache-2.0
"""Commands to the recorder of a stand-in runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.moe_routes.recorder import control

from tests.support.fake_runner import FakeRunner

Arm = Callable[..., FakeRunner]


def do(runner: FakeRunner, command: str, **options: Any) -> dict[str, Any]:
    return control(SimpleNamespace(model_runner=runner), command, **options)


def begin(runner: FakeRunner, mode: str, folder: Path) -> None:
    do(runner, "configure", mode=mode)
    path = None if mode == "stat" else str(folder / f"{mode}.jsonl")
    assert do(runner, "start", path=path)["ok"]
