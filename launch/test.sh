#!/usr/bin/env bash
# The tests, in the pinned environment: bash launch/test.sh [--slow] [what pytest takes]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

args=(-n 2)
for arg in "$@"; do
  if [ "$arg" = --slow ]; then args+=(-m ""); else args+=("$arg"); fi
done

# Tests compile the same small programs many times over: share them between the workers of this run, and only this run.
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
export JAX_COMPILATION_CACHE_DIR=$cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
"$VENV/bin/python" -m pytest "${args[@]}"
