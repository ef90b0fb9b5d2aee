# SPDX-License-Identifier: Apache-2.0
"""Load on a recorder: requests that come and go on the stand-in runner."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tests.recorder.conftest  # noqa: F401  puts this checkout's recorder first

# isort: split
from vllm.moe_routes import recorder
from vllm.moe_routes.config import RouteLogConfig

from tests.support.fake_runner import INDICES, FakeRunner


def group() -> SimpleNamespace:
    """Stands for a parallel group of one rank."""
    return SimpleNamespace(rank_in_group=0, world_size=1, cpu_group=None)


def arm(path: Path, **switches: Any) -> FakeRunner:
    """A runner whose recorder writes to ``path``."""
    runner = FakeRunner()
    runner.moe_routes = recorder.Recorder(RouteLogConfig(path, **switches), runner)
    return runner


class Load:
    """Passes over requests that come and go; counts what was executed.

    Args:
        runner: runs them.
        tokens: of every request: half of them prompt, the rest one by one.
    """

    def __init__(self, runner: FakeRunner, tokens: int = 6) -> None:
        self._runner = runner
        self._tokens = tokens
        self._next = 0
        self._live: dict[str, int] = {}
        self._ended: tuple[str, ...] = ()
        #: Tokens times layers.
        self.rows = 0
        self.tokens = 0

    def step(self, new: int = 2) -> None:
        """One pass: ``new`` requests join, the others go on, those that are done end."""
        rows = [(raw_id, 1, self._tokens // 2) for raw_id in self._live]
        for _ in range(min(new, 8 - len(rows))):
            raw_id = f"{self._next}-{self._next:08x}"
            self._next += 1
            rows.append((raw_id, self._tokens // 2, self._tokens // 2))
        for raw_id, n, _ in rows:
            self._live[raw_id] = self._live.get(raw_id, 0) + n
        self._runner.execute(*rows, finished=self._ended)
        self._ended = tuple(raw_id for raw_id, n in self._live.items() if n >= self._tokens)
        for raw_id in self._ended:
            del self._live[raw_id]
            self._runner.computed.pop(raw_id, None)
            self._runner.requests.pop(raw_id, None)
        self.tokens += sum(n for _, n, _ in rows)
        self.rows = self.tokens * len(INDICES)
