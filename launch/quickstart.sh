#!/usr/bin/env bash
# From a fresh checkout to a trained language model: bash launch/quickstart.sh [overrides, as `jaxlm train` takes them]
# Paths among the overrides are relative to the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec "$VENV/bin/jaxlm" train configs/quickstart.py "$@"
