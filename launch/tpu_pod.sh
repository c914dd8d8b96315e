#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU VM: bash launch/tpu_pod.sh TPU_NAME ZONE train CONFIG [overrides]
# Copies this checkout's last commit to every host, installs it there, and runs jaxlm on all at once. JAX asks the TPU
# how many hosts there are. `--out` and `--data.cache` must lie on storage that all hosts have mounted under one path.
set -euo pipefail
name=${1:?usage: bash launch/tpu_pod.sh TPU_NAME ZONE train CONFIG [overrides]}
zone=${2:?usage: bash launch/tpu_pod.sh TPU_NAME ZONE train CONFIG [overrides]}
shift 2
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
archive=$(mktemp -d)/jaxlm.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
git archive --output="$archive" HEAD

gcloud compute tpus tpu-vm scp "$archive" "$name:jaxlm.tar.gz" --zone="$zone" --worker=all
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  set -e
  mkdir -p jaxlm && tar -xzf jaxlm.tar.gz -C jaxlm && cd jaxlm
  source launch/setup.sh && install 'jax[tpu]'
  exec .venv/bin/jaxlm$(printf ' %q' "$@")"
