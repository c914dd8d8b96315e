#!/usr/bin/env bash
# The tests, in the pinned environment: bash launch/test.sh [--slow] [what pytest takes]
# Compiled programs are kept for the next run, for as long as jaxlib and requirements.lock stay the same, in
# ${XDG_CACHE_HOME:-$HOME/.cache}/jaxlm/tests; with JAXLM_TEST_CACHE=off each run begins with none and keeps none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

args=(-n 2 --dist loadfile)  # a file's tests in one process, which keeps what they share
for arg in "$@"; do
  if [ "$arg" = --slow ]; then args+=(-m ""); else args+=("$arg"); fi
done

# Tests compile the same small programs many times over: the workers share them.
if [ "${JAXLM_TEST_CACHE:-on}" = off ]; then
  cache=$(mktemp -d)
  trap 'rm -rf "$cache"' EXIT
else
  jaxlib=$("$VENV/bin/python" -c 'from importlib.metadata import version; print(version("jaxlib"))')
  caches=${XDG_CACHE_HOME:-$HOME/.cache}/jaxlm/tests
  cache=$caches/jaxlib-$jaxlib-$(cksum <requirements.lock | cut -d " " -f 1)
  mkdir -p "$cache"
  # Never more than 2 GiB: changed code leaves programs that nothing asks for again.
  [ "$(du -sm "$cache" | cut -f 1)" -lt 2048 ] || rm -rf "$cache"
  find "$caches" -mindepth 1 -maxdepth 1 ! -path "$cache" -exec rm -rf {} +
fi
export JAX_COMPILATION_CACHE_DIR=$cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
status=0
"$VENV/bin/python" -m pytest "${args[@]}" || status=$?
[ "$status" -le 1 ] || rm -rf "$cache"  # cut short while it wrote, perhaps
exit "$status"
