# SPDX-License-Identifier: Apache-2.0
"""A recorder that is armed by the API: nothing recorded yet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vllm.moe_routes.config import RouteLogConfig

from tests.support.fake_runner import FakeRunner


@pytest.fixture
def arm(give_recorder: Callable[..., FakeRunner]) -> Callable[..., FakeRunner]:
    """A runner whose recorder is armed by the API: nothing recorded yet."""
    return lambda **switches: give_recorder(
        FakeRunner(), RouteLogConfig(None, api=True, **switches)
    )
