#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run vLLM over prompts, record every token's experts, and measure what that costs."""

import sys

from expert_profiler import errors
from expert_profiler.commands import profile

if __name__ == "__main__":
    sys.exit(errors.run(lambda: profile.main(prog="run_profile.py")))
