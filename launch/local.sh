#!/usr/bin/env bash
# One run in several processes on this machine: bash launch/local.sh 4 train configs/tiny_llama.py [overrides]
# Process i has the i-th GPU, if there are any. If one dies the others end and say which.
#
#   JAXLM="python -m jaxlm"   a command to run instead of the one in .venv
set -euo pipefail
count=${1:?usage: bash launch/local.sh N train CONFIG [overrides]}
shift
if [ -z "${JAXLM:-}" ]; then
  source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
  JAXLM=$VENV/bin/jaxlm
fi

export JAXLM_LAUNCHER=launch/local.sh JAX_NUM_PROCESSES=$count
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${JAX_COORDINATOR_PORT:-$((20000 + $$ % 10000))}
export JAXLM_START_SECONDS=${JAXLM_START_SECONDS:-120}
pids=()
for ((i = 0; i < count; i++)); do
  JAX_PROCESS_ID=$i JAX_LOCAL_DEVICE_IDS=$i $JAXLM "$@" > >(sed -u "s/^/$i: /") 2>&1 &
  pids+=($!)
  echo "process $i is pid $!"
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT # every process saves, then ends
status=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" && code=0 || code=$?; done # a signal ends `wait`, not the process
  wait "$pid" && code=0 || code=$?
  if ((code > status)); then status=$code; fi
done
exit "$status"
