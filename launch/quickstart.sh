#!/usr/bin/env bash
# From a fresh checkout to a trained language model: bash launch/quickstart.sh [overrides, as `jaxlm train` takes them]
# Paths among the overrides are relative to the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# On a CPU, XLA allocates and frees the same large buffers every step. Keep them in the process, on huge pages, rather
# than have the kernel map and zero them anew. glibc reads these when a process starts, so they can't be set later.
if getconf GNU_LIBC_VERSION >/dev/null 2>&1; then
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
  export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-100000000000}
fi
exec "$VENV/bin/jaxlm" train configs/quickstart.py "$@"
