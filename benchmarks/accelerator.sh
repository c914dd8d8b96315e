#!/usr/bin/env bash
# Wheels for `accelerator.py` on a GPU machine without network, and the one command to run there:
#   bash benchmarks/accelerator.sh [further arguments of accelerator.py]
#
# Expected there: Linux on x86-64 and Python 3.12 with jax (its CUDA plugin too), flax, optax, orbax-checkpoint, torch,
# transformers (which bring tokenizers, safetensors and huggingface_hub), rich, numpy and pytest. What is missing besides
# goes into .wheels/, which git ignores: bring it along with the checkout.
#
#   PYTHON=/path/to/python     whose pip downloads (default: python3; any version will do)
#   THERE=python3              the Python of the GPU machine, in the command that is printed
#   WHEELS=.wheels             the folder, within the checkout
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} THERE=${THERE:-python3} WHEELS=${WHEELS:-.wheels}

fail() { # fail STATUS MESSAGE...: one line, then out
  local status=$1
  shift
  echo "error: $*" >&2
  exit "$status"
}

# Each with whoever imports it on the way to a train step. tensorflow-datasets and what it needs are not among them:
# they are imported only for a source `tfds:…`, and the benchmark's tokens are random.
packages=(
  grain            # jaxlm: the order of examples
  array-record     # grain
  cloudpickle      # grain
  portpicker       # grain
  tyro             # jaxlm: overrides of a run
  docstring-parser # tyro
  typeguard        # tyro
)
most=$((64 * 1024 * 1024))

platforms=()
for glibc in 2_28 2_27 2_24 2_17 2014 1; do
  case $glibc in *_*) platforms+=(--platform "manylinux_${glibc}_x86_64") ;; *) platforms+=(--platform "manylinux${glibc}_x86_64") ;; esac
done

pinned=()
for package in "${packages[@]}"; do
  version=$(sed -n "s/^$package==\([^ ;]*\).*/\1/p" requirements.lock | tail -n 1)
  [ -n "$version" ] || fail 1 "requirements.lock does not pin $package"
  pinned+=("$package==$version")
done

"$PYTHON" -m pip --version >/dev/null 2>&1 || fail 2 "$PYTHON has no pip: set PYTHON=/path/to/python"
rm -rf "$WHEELS"
mkdir -p "$WHEELS"
log=$(mktemp)
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp "${platforms[@]}" --dest "$WHEELS" "${pinned[@]}" >"$log" 2>&1 ||
  fail 1 "pip found not all of ${pinned[*]} as wheels for Python 3.12; log: $log"
rm -f "$log"

wheels=("$WHEELS"/*.whl)
[ "${#wheels[@]}" -eq "${#packages[@]}" ] || fail 1 "$WHEELS holds ${#wheels[@]} wheels instead of ${#packages[@]}"
bytes=$(cat "${wheels[@]}" | wc -c)
[ "$bytes" -le "$most" ] || fail 1 "$WHEELS takes $bytes bytes, more than $most"
echo "${#wheels[@]} wheels in $WHEELS/, $(((bytes + 1048575) / 1048576)) MiB together" >&2

arguments=""
for argument in "$@"; do arguments+=" $(printf %q "$argument")"; done
command="S=\$(mktemp -d) && $THERE -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target \"\$S\""
command+=" $WHEELS/*.whl && PYTHONPATH=\"\$S:\$PWD\" PYTHONUNBUFFERED=1 $THERE benchmarks/accelerator.py$arguments"
[ "${#command}" -le 2000 ] || fail 2 "the command would be longer than 2000 characters: give fewer arguments"
echo "On the GPU machine, in the root of the checkout:" >&2
echo "$command"
