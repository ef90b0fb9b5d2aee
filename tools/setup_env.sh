# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Sourced by test.sh, serve.sh and tests/run.sh, from the repository root: makes .venv, and installs
# exactly what a lock names into it. Nothing outside .venv is installed or changed.

# apply_patch.sh, preflight and uv take the active environment, which may be another one.
export VIRTUAL_ENV=$PWD/.venv

die() {
  echo "error: $*" >&2
  exit 2
}

say() { printf '==> %s\n' "$*"; }

# Sets PYTHON: the machine's python3, if this project runs on it.
find_python() {
  PYTHON=$(command -v "${PYTHON:-python3}") ||
    die "no ${PYTHON:-python3} on PATH; install Python 3.10 to 3.13"
  "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
    die "$("$PYTHON" -V 2>&1) at $PYTHON is not 3.10 to 3.13; run: PYTHON=python3.12 $0"
}

# Prints the lock for this machine: CUDA where a GPU answers, else CPU.
lock_for_machine() {
  if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo requirements-lock.txt
  else
    echo requirements/cpu-0.15.1.txt
  fi
}

# make_env LOCK: .venv with exactly that lock's packages. Quick when it already is so.
make_env() {
  if [[ -e .venv && ! -x .venv/bin/python ]]; then
    die ".venv has no working Python; run: rm -rf .venv && $0"
  fi
  if [[ -f .venv/.lock-name && $(<.venv/.lock-name) != "$1" ]]; then
    # The CPU and the CUDA build own the same files; one can't be installed over the other.
    die ".venv holds $(<.venv/.lock-name), this machine needs $1; run: rm -rf .venv && $0"
  fi
  find_uv
  if [[ ! -e .venv ]]; then
    say "creating .venv"
    "$UV" venv --quiet --python "$PYTHON" .venv
  fi
  echo "$1" >.venv/.lock-name
  install_lock "$1"
  link_checkout
  export PATH=$VIRTUAL_ENV/bin:$PATH
}

# Makes .venv/bin/expert-profiler, and lets .venv's Python import expert_profiler from anywhere:
# what an editable install does, without a build backend to download.
link_checkout() {
  local site
  for site in .venv/lib/python3*/site-packages; do
    echo "$PWD" >"$site/vllm_expert_profiler_checkout.pth"
  done
  # sys.path[0] is the current folder, where anything may lie.
  cat >.venv/bin/expert-profiler <<SCRIPT
#!/usr/bin/env bash
exec $(printf %q "$VIRTUAL_ENV/bin/python") -c '
import sys
sys.path[0] = sys.argv.pop(1)
from expert_profiler.__main__ import main
sys.exit(main())' $(printf %q "$PWD") "\$@"
SCRIPT
  chmod +x .venv/bin/expert-profiler
}

# Sets UV: the one on PATH, else one installed into .venv.
find_uv() {
  if UV=$(command -v uv) && "$UV" --version >/dev/null 2>&1; then
    return
  fi
  UV=.venv/bin/uv
  [[ -x $UV ]] && return
  say "uv is not on PATH; installing it into .venv"
  "$PYTHON" -m venv .venv ||
    die "$PYTHON can't make an environment; run: apt-get install python3-venv, or install uv"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
    --require-hashes -r requirements/uv.txt
}

# install_lock LOCK: skipped when .venv already has this very file's packages.
install_lock() {
  local stamp quiet=(--quiet) start=$SECONDS sum
  stamp=.venv/.installed-$(basename "$1")
  sum=$(sha256sum <"$1")
  if [[ -f $stamp && $(<"$stamp") == "$sum" ]]; then
    return
  fi
  [[ -t 2 ]] && quiet=() # uv's progress bars are for people
  say "installing $1 ($(grep -c '^[a-z0-9].*==' "$1") packages at most)"
  "$UV" pip install "${quiet[@]}" --python .venv/bin/python --no-deps --require-hashes -r "$1"
  echo "$sum" >"$stamp"
  say "installed in $((SECONDS - start)) s"
}
