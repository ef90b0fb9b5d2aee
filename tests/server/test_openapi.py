# SPDX-License-Identifier: Apache-2.0
"""Made-up requests against the documented routes: no crash, no escape, nothing undocumented."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.support.fakes import Engines, an_app, isolate

schemathesis = pytest.importorskip("schemathesis")
GenerationMode = schemathesis.GenerationMode

pytestmark = pytest.mark.timeout(120)


ROUTES = (
    "/configure_expert_distribution",
    "/start_expert_distribution",
    "/stop_expert_distribution",
    "/reset_expert_distribution",
    "/dump_expert_distribution",
    "/expert_distribution_status",
)
QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openapi")


@pytest.fixture(scope="module")
def api(folder: Path) -> Iterator[Any]:
    """The schema of a server that records into ``folder/recordings``."""
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch)
        patch.setenv("VLLM_LOG_MOE_API", "1")
        patch.setenv("VLLM_LOG_MOE_DIR", str(folder / "recordings"))
        engines = Engines()
        yield schemathesis.openapi.from_asgi("/openapi.json", an_app(engines, keys=["key"]))
        engines.shutdown()


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", ROUTES)
def test_any_request_gets_a_documented_answer(
    api: Any, folder: Path, path: str, mode: GenerationMode
) -> None:
    """In whatever state the requests before have left: configured, recording, stopped."""
    operation = next(found.ok() for found in api.get_all_operations() if found.ok().path == path)
    checks = schemathesis.checks

    @QUICK
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        case.headers["Authorization"] = "Bearer key"
        response = case.call()
        assert response.status_code < 500
        case.validate_response(
            response,
            checks=[
                checks.not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
                checks.allow_header_conformance,
            ],
        )

    ask()
    found = {item.name for item in folder.iterdir()}
    assert found <= {"recordings"}, "nothing outside of the recording directory"
