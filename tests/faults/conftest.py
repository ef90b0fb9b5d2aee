# SPDX-License-Identifier: Apache-2.0
"""Faults: what may go wrong beside a recorder that runs for days."""

from __future__ import annotations

import os
from typing import Any

import pytest

import tests.recorder.conftest  # noqa: F401  puts this checkout's recorder first

# isort: split
from vllm.moe_routes import recorder
from vllm.moe_routes.recording import provenance

from tests.faults.load import group
from tests.faults.table import TABLE, Row, as_lines


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, none of the caller's switches, and nothing hashed that lies elsewhere."""
    for name in [name for name in os.environ if name.startswith("VLLM_LOG_MOE")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(recorder, "get_pp_group", group)
    monkeypatch.setattr(recorder, "get_tp_group", group)
    monkeypatch.setattr(provenance, "patch_id", lambda: "0123abcd")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A test process of several hands its part of the table over."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["faults"] = [tuple(row) for row in TABLE]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """And the process that started it takes it."""
    TABLE.extend(Row(*row) for row in getattr(node, "workeroutput", {}).get("faults", ()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the fault table of what ran."""
    if TABLE:
        terminalreporter.section("faults: rows executed = written + reported lost + left out")
        for line in as_lines():
            terminalreporter.write_line(line)
