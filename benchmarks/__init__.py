# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.overhead`` is ``expert-profiler bench``, which see."""
