"""Test this checkout's recorder, whatever copy is installed.

The recorder is a part of the package ``vllm``, so that package is loaded here once, with the
overlay in front of its own folder, before anything else imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

OVERLAY = Path(__file__).resolve().parents[2] / "overlay" / "vllm"


def _put_overlay_first() -> None:
    loaded = sys.modules.get("vllm")
    if loaded is not None:
        loaded.__path__.insert(0, str(OVERLAY))
        return
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        raise pytest.UsageError("vllm is not installed here; run tests/run.sh, which sets it up")
    spec.submodule_search_locations.insert(0, str(OVERLAY))
    package = importlib.util.module_from_spec(spec)
    sys.modules["vllm"] = package
    spec.loader.exec_module(package)


_put_overlay_first()

import vllm.moe_routes  # noqa: E402

assert vllm.moe_routes.__file__ is not None
assert Path(vllm.moe_routes.__file__).is_relative_to(OVERLAY), (
    f"{vllm.moe_routes.__file__} would be tested instead of {OVERLAY}"
)


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches of whoever runs the tests don't reach them."""
    import os

    for name in [name for name in os.environ if name.startswith("VLLM_LOG_MOE")]:
        monkeypatch.delenv(name)
