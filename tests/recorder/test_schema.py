# SPDX-License-Identifier: Apache-2.0
"""What the recorder writes is what the schema says, and the schema loads without vLLM."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.moe_routes import schema
from vllm.moe_routes.config import RouteLogConfig
from vllm.moe_routes.recorder import control

from tests.support.build import read_lines
from tests.support.fake_runner import FakeRunner
from tests.support.paths import REPO

OF_REQUESTS = {"rows_flagged", "requests", "cached_tokens", "missed_tokens"}


def _recorded(give_recorder: Callable[..., FakeRunner], path: Path, mode: str) -> list[Any]:
    runner = give_recorder(FakeRunner(), RouteLogConfig(path, mode=mode))
    runner.execute(("7-0000000a", 2, 2))
    runner.execute(("7-0000000a", 1, 2))
    assert control(SimpleNamespace(model_runner=runner), "stop")["ok"]
    return read_lines(path)


def test_a_log_of_tokens_has_the_schemas_keys_in_its_order(
    give_recorder: Callable[..., FakeRunner], tmp_path: Path
) -> None:
    meta, *routes, request, end = _recorded(give_recorder, tmp_path / "x.jsonl", "per_token")
    assert (meta["type"], meta["schema_version"]) == (schema.META, schema.SCHEMA_VERSION)
    route_keys = ["type", *(field.name for field in schema.ROUTE_FIELDS)]
    assert {tuple(route) for route in routes} == {tuple(route_keys[:-1])}, "none has a flag"
    assert tuple(request) == schema.REQUEST_KEYS
    absent = {"next", "error", "expert_counts"}
    assert list(end) == [key for key in schema.END_KEYS if key not in absent]
    assert {line["type"] for line in (routes[0], request, end)} == {"route", "request", "end"}


def test_a_log_of_passes_has_the_schemas_keys_in_its_order(
    give_recorder: Callable[..., FakeRunner], tmp_path: Path
) -> None:
    _, one, other, end = _recorded(give_recorder, tmp_path / "x.jsonl", "per_pass")
    assert tuple(one) == tuple(other) == schema.PASS_KEYS
    absent = {"next", "error", *OF_REQUESTS}
    assert list(end) == [key for key in schema.END_KEYS if key not in absent]


@pytest.mark.parametrize("module", ["schema", "writing.formats.dataset"])
def test_it_loads_where_there_is_no_vllm(module: str) -> None:
    code = f"""
import sys
sys.modules["vllm"] = sys.modules["torch"] = None  # importing either raises
from expert_profiler.resources import recorder_module
loaded = recorder_module({module!r})
schema = recorder_module("schema")
print(schema.FLAGS)
if hasattr(loaded, "PartWriter"):
    assert loaded.schema(8, 2, "float32").names == [field.name for field in schema.ROUTE_FIELDS]
try:
    import vllm
except ImportError:
    print("no vllm")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "('recomputed', 'overrun', 'rejected')\nno vllm\n"
