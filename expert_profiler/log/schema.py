# SPDX-License-Identifier: Apache-2.0
"""The recorder's schema of a log, as the readers take it: without vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expert_profiler.resources import recorder_module

if TYPE_CHECKING:
    from vllm.moe_routes import schema
else:
    schema = recorder_module("schema")

__all__ = ["PHASES", "schema"]

#: A phase's code is its index here; "unknown" where a public logger does not say the phase.
PHASES: tuple[str, ...] = (*schema.PHASES, "unknown")
