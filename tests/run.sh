#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
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

# The live page is tested in Debian's Chromium. Where it can't be installed, those tests say so.
find_browser() {
  if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
    return
  fi
  if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
    say "no chromium and chromedriver: the tests of the live page are skipped"
    return
  fi
  say "installing chromium"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium chromium-driver >/dev/null
}

find_python
find_browser
make_env "$(lock_for_machine)"
install_lock requirements/dev.txt
scripts=(*.sh tools/*.sh tests/*.sh .ci/run)

stage ./apply_patch.sh
stage ruff check
stage ruff format --check
stage mypy
stage shellcheck "${scripts[@]}"
stage shfmt -d -i 2 "${scripts[@]}"
stage python tools/export_patch.py --check
# A test process a core, a file of tests at a time: much of the time goes into starting engines,
# which one core does alone.
export OMP_NUM_THREADS=1
stage python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=10 "$@"
say "all passed in $SECONDS s"
