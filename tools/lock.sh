#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
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
compile requirements/cpu-0.15.1.txt pyproject.toml --extra cpu --override requirements/cpu-overrides.txt
compile requirements/dev.txt --group dev \
  -c requirements-lock.txt -c requirements/cpu-0.15.1.txt
compile requirements/uv.txt --group bootstrap
