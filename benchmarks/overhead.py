# SPDX-License-Identifier: Apache-2.0
"""The documented name of ``expert-profiler bench``: ``python -m benchmarks.overhead``."""

import sys

from expert_profiler import errors
from expert_profiler.commands import bench

sys.exit(errors.run(lambda: bench.main(prog="python -m benchmarks.overhead")))
