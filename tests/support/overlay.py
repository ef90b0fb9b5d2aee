# SPDX-License-Identifier: Apache-2.0
"""Test this checkout's recorder, whatever copy is installed.

The recorder is a part of the package ``vllm``, so that package is loaded here once, with the
overlay in front of its own folder, before anything else imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPO

OVERLAY = REPO / "overlay" / "vllm"


def put_first() -> None:
    """Let ``vllm.moe_routes`` and the server's routes come from the overlay."""
    _load_vllm()
    import vllm.entrypoints.serve
    import vllm.moe_routes

    # A folder that is a package on both sides: the wheel's own __init__ is found first.
    vllm.entrypoints.serve.__path__.insert(0, str(OVERLAY / "entrypoints" / "serve"))
    import vllm.entrypoints.serve.expert_distribution as routes

    for module in (vllm.moe_routes, routes):
        assert module.__file__ is not None
        found = Path(module.__file__)
        assert found.is_relative_to(OVERLAY), f"{found} would be tested instead of {OVERLAY}"


def _load_vllm() -> None:
    loaded = sys.modules.get("vllm")
    if loaded is not None:
        if str(OVERLAY) not in loaded.__path__:
            loaded.__path__.insert(0, str(OVERLAY))
        return
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        raise pytest.UsageError("vllm is not installed here; run tests/run.sh, which sets it up")
    spec.submodule_search_locations.insert(0, str(OVERLAY))
    package = importlib.util.module_from_spec(spec)
    sys.modules["vllm"] = package
    spec.loader.exec_module(package)
