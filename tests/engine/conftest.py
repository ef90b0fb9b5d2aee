"""Engine tests need a patched vLLM in this environment; ``tests/run.sh`` makes one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from expert_profiler import patching
from tests.engine.harness import Engines


@pytest.fixture(scope="session", autouse=True)
def _patched() -> None:
    report = patching.inspect()
    if not report.ok:
        pytest.fail(f"engine tests need a patched vLLM: {report.message}")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint with the real routing shape."""
    from tools.make_tiny_moe import TinyMoeSpec, build

    folder = tmp_path_factory.mktemp("model") / "tiny-moe"
    build(folder, TinyMoeSpec())
    return folder


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """Starts engines on the installed vLLM."""
    running = Engines()
    yield running
    running.close()
