"""Engine tests need a patched vLLM in this environment; ``tests/run.sh`` makes one."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expert_profiler.patch import patch_state
from tests.support.harness import TABLE, Engines


@pytest.fixture(scope="session", autouse=True)
def _patched() -> None:
    report = patch_state.inspect()
    if not report.ok:
        pytest.fail(f"engine tests need a patched vLLM: {report.message}")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint with the real routing shape."""
    from expert_profiler.run.tiny_model import TinyMoeSpec, build

    folder = tmp_path_factory.mktemp("model") / "tiny-moe"
    build(folder, TinyMoeSpec())
    return folder


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the table from a test process to the one that prints it."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["engine_modes"] = base64.b64encode(pickle.dumps(TABLE)).decode()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a test process handed over."""
    handed = getattr(node, "workeroutput", {}).get("engine_modes")
    if handed:
        TABLE.extend(pickle.loads(base64.b64decode(handed)))  # noqa: S301  our own process's


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the modes were held against, whatever else is shown."""
    if not TABLE:
        return
    terminalreporter.section("engine modes")
    line = "{:<20}  {:>13}  {:>11}  {:>15}  {:>9}  {:>14}"
    head = ("mode", "rows expected", "rows logged", "oracle agrees", "near-ties", "weights within")
    terminalreporter.write_line(line.format(*head))
    for mode, expected, logged, found in TABLE:
        agrees = found.compared - len(found.different) - len(found.near_ties)
        terminalreporter.write_line(
            line.format(
                mode,
                expected,
                logged,
                f"{agrees}/{found.compared}",
                len(found.near_ties),
                f"{found.worst_weight:.1e}",
            )
        )


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """Starts engines on the installed vLLM."""
    running = Engines()
    yield running
    running.close()
