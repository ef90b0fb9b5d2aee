#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Apply, check or revert the MoE route logger on an installed vLLM; see --help.
# All the work is in expert_profiler/patch/, which needs no package.
set -euo pipefail

repo=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")

if [[ -n ${VIRTUAL_ENV:-} && -x $VIRTUAL_ENV/bin/python ]]; then
  python=$VIRTUAL_ENV/bin/python
elif [[ -x $repo/.venv/bin/python ]]; then
  python=$repo/.venv/bin/python
else
  python=$(command -v python3) || {
    echo "error: no python3 in PATH; install Python 3.10 or later" >&2
    exit 2
  }
fi

# Not "-m": that puts the current folder in front of sys.path, and a stray
# module or vLLM there would be taken for ours.
exec "$python" -c '
import sys
if sys.version_info < (3, 10):
    sys.exit("error: %s is older than Python 3.10; activate another one" % sys.executable)
sys.path[:] = [sys.argv.pop(1)] + [p for p in sys.path if p]
from expert_profiler import errors
from expert_profiler.commands import patch
sys.exit(errors.run(lambda: patch.main(prog="apply_patch.sh")))
' "$repo" "$@"
