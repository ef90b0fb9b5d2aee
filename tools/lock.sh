#!/usr/bin/env bash
# Resolves the lock files anew. A lock's header names the command that made it.
# Usage: tools/lock.sh [options of uv pip compile, such as --upgrade-package NAME]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=("$@")

compile() { # LOCK OPTION...
  local lock=$1
  local command=(uv pip compile --universal --python-version 3.10 --generate-hashes "${@:2}" -o "$lock")
  UV_CUSTOM_COMPILE_COMMAND="${command[*]}" "${command[@]}" "${extra[@]}" --quiet
  echo "$lock: $(grep -c '^[a-z0-9].*==' "$lock") packages"
}

compile requirements-lock.txt pyproject.toml --extra cuda
compile requirements-cpu-lock.txt pyproject.toml --extra cpu --override tools/cpu-overrides.txt
compile tests/requirements-dev-lock.txt --group dev \
  -c requirements-lock.txt -c requirements-cpu-lock.txt
compile tools/requirements-uv-lock.txt --group bootstrap
