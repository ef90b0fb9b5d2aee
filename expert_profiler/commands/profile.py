# SPDX-License-Identifier: Apache-2.0
"""Run vLLM over prompts, record every token's experts, and measure what that costs."""

from __future__ import annotations

from collections.abc import Sequence

from expert_profiler.run import profile_options, profiling


def main(argv: Sequence[str] | None = None, prog: str = "expert-profiler profile") -> int:
    return profiling.profile(profile_options.parse(argv, prog))
