#!/usr/bin/env bash
# Every check of the project, from a bare machine: environment, patch, linters, tests.
# Usage: tests/run.sh [options of pytest, such as -k NAME or -m 'not engine']
set -euo pipefail
cd "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

# stage COMMAND...: says what runs and how long it took; a failure ends the run.
stage() {
  local start=$SECONDS
  say "$*"
  "$@" || die "$1 ${2:-} failed after $((SECONDS - start)) s; see above"
  say "ok: $1 ${2:-} ($((SECONDS - start)) s)"
}

find_python
make_env "$(lock_for_machine)"
install_lock tests/requirements-dev-lock.txt
scripts=(*.sh tools/*.sh tests/*.sh .ci/run)

stage ./apply_patch.sh
stage ruff check
stage ruff format --check
stage mypy
stage shellcheck "${scripts[@]}"
stage shfmt -d -i 2 "${scripts[@]}"
stage python tools/export_patch.py --check
stage python -m pytest --durations=10 "$@"
say "all passed in $SECONDS s"
