#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The one command: from a bare machine to route logs, a plot and an overhead figure.
set -euo pipefail
caller=$PWD
cd "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

usage() {
  cat <<'TEXT'
usage: ./test.sh [run] [OPTION...]     install, patch, profile, plot, validate
       ./test.sh preflight             look at this machine and change nothing
       ./test.sh validate [DIR]        check the artifacts in DIR, ours or anyone's [.]

run installs into .venv (8 GB, about a minute with a fast network), then writes prompts.txt,
moe_routes.jsonl, outputs.jsonl, timing.json and expert_hist.png here, over older ones.
OPTIONs are those of run_profile.py; see: ./test.sh run --help
Paths among them are relative to the repository.
TEXT
}

command=run
case ${1:-} in
run | preflight | validate)
  command=$1
  shift
  ;;
-h | --help | help)
  usage
  exit
  ;;
-* | '') ;;
*) die "unknown command $1; run: ./test.sh --help" ;;
esac

find_python
case $command in
preflight)
  exec "$PYTHON" -m expert_profiler preflight "$@"
  ;;
validate)
  make_env "$(lock_for_machine)"
  [[ ${1:---} == -* ]] || set -- "$(cd "$caller" && realpath -m -- "$1")" "${@:2}"
  exec .venv/bin/expert-profiler validate "$@"
  ;;
run)
  "$PYTHON" -m expert_profiler preflight --brief "$@" || exit 2
  make_env "$(lock_for_machine)"
  ./apply_patch.sh
  exec .venv/bin/python -m expert_profiler.run.pipeline "$@"
  ;;
esac
