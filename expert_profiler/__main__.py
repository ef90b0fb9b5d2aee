# SPDX-License-Identifier: Apache-2.0
"""The console script ``expert-profiler``, also as ``python -m expert_profiler``."""

from __future__ import annotations

import sys

from expert_profiler import commands, errors


def main() -> int:
    return errors.run(commands.main)


if __name__ == "__main__":
    sys.exit(main())
