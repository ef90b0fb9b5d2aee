#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# `vllm serve` with the expert-distribution routes: install, check the patch, start.
set -euo pipefail
caller=$PWD
cd "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

usage() {
  cat <<'TEXT'
usage: ./serve.sh [--auto-record[=NAME]] [MODEL] [OPTION of vllm serve...]

Starts `vllm serve MODEL` with the expert-distribution routes and their live page, which is
http://localhost:8000/expert_distribution unless --port says otherwise. MODEL is a hub id or a
folder; without one, a machine without a GPU serves demo_model, any other the GPTQ model.

  --auto-record[=NAME]   record from the first request on: a line a forward pass into NAME
                         [per_pass-TIME.jsonl] in the recording directory

Variables: VLLM_LOG_MOE_DIR, the recording directory [moe_recordings in the current folder];
VLLM_API_KEY, the key that the server and these routes then ask for. More in README.md.
TEXT
}

record=''
case ${1:-} in
-h | --help | help)
  usage
  exit
  ;;
--auto-record) record=per_pass-$(date -u +%Y%m%d-%H%M%S).jsonl && shift ;;
--auto-record=*) record=${1#*=} && shift ;;
esac

find_python
lock=$(lock_for_machine)
make_env "$lock"
./apply_patch.sh

if [[ -n ${1:-} && $1 != -* ]]; then
  # A folder is meant as seen from where the command was given.
  if [[ -d $caller/$1 ]]; then model=$(cd "$caller" && realpath -- "$1"); else model=$1; fi
  shift
  set -- "$model" "$@"
elif [[ $lock == requirements-lock.txt ]]; then
  set -- Qwen/Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4 --max-model-len 2048 "$@"
else
  say "no GPU: serving demo_model, a very small model that was trained for this project"
  set -- "$PWD/demo_model" --served-model-name demo --dtype bfloat16 --max-model-len 1024 "$@"
fi
[[ $lock == requirements-lock.txt ]] || export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}

cd "$caller"
export VLLM_LOG_MOE_API=1
VLLM_LOG_MOE_DIR=$(realpath -m -- "${VLLM_LOG_MOE_DIR:-moe_recordings}")
export VLLM_LOG_MOE_DIR
if [[ -n $record ]]; then
  (umask 077 && mkdir -p -- "$VLLM_LOG_MOE_DIR")
  export VLLM_LOG_MOE=$VLLM_LOG_MOE_DIR/$record VLLM_LOG_MOE_MODE=per_pass
  say "recording a line a forward pass; follow it: tail -f $VLLM_LOG_MOE"
fi
say "files go to $VLLM_LOG_MOE_DIR; the page is /expert_distribution on the server's port [8000]"
exec "$VIRTUAL_ENV/bin/vllm" serve "$@"
