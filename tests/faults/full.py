# SPDX-License-Identifier: Apache-2.0
"""Every fault test in its long form: python -m tests.faults.full [options of pytest]

More kills, examples, rows and starts of engines than ``tests/run.sh`` takes; about half an hour on
two cores, two test processes at a time. Prints the table that docs/faults.md shows.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.paths import REPO


def main() -> int:
    command = [sys.executable, "-m", "pytest", "tests/faults", "-p", "no:cacheprovider", "-rA"]
    command += ["--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder"]
    command += ["--durations=10", *sys.argv[1:]]
    env = {**os.environ, "FAULTS_FULL": "1", "OMP_NUM_THREADS": "1"}  # as tests/run.sh does
    print("+", " ".join(command), flush=True)
    return subprocess.call(command, cwd=REPO, env=env)


if __name__ == "__main__":
    sys.exit(main())
