# SPDX-License-Identifier: Apache-2.0
"""What ends a request, as the mode per_token takes it."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.moe_routes.recording import per_token
from vllm.sampling_params import SamplingParams

EOS = 9


@pytest.mark.parametrize(
    ("facts", "stops"),
    [
        ({}, {EOS}),
        ({"stop_token_ids": [5]}, {5, EOS}),
        ({"ignore_eos": True}, set()),
        ({"ignore_eos": True, "stop_token_ids": [5]}, {5}),
    ],
)
def test_a_request_stops_at_what_its_parameters_say(facts: dict[str, Any], stops: set[int]) -> None:
    params = SamplingParams(min_tokens=2, **facts)
    params.update_from_generation_config({}, EOS)  # as the engine does
    assert per_token._stop_rule(params) == (stops, 2)


def test_a_pooling_request_has_no_stop_rule() -> None:
    assert per_token._stop_rule(None) is None
