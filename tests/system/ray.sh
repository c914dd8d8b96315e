#!/usr/bin/env bash
# launch/ray_job.py on a real Ray cluster of one node on this machine: bash tests/system/ray.sh
# The Ray that is used may be another Python's than jaxlm's, as in clusters whose images come from elsewhere.
#
#   RAY=/path/to/venv   an environment with `pip install ray`
#   PYTHON=/path/to/python   one that has jaxlm's packages (default: that of .venv)
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
[ -x "${RAY:-}/bin/ray" ] || { echo "MISSING: RAY, an environment with Ray (python -m venv V; V/bin/pip install ray)" >&2; exit 2; }
"$PYTHON" -c "import jax" || { echo "MISSING: a Python with jaxlm's packages; set PYTHON" >&2; exit 2; }

T=$(mktemp -d)
clean() {
  "$RAY/bin/ray" stop --force >/dev/null 2>&1 || true
  rm -rf "$T"
}
trap clean EXIT
fail() { echo "FAILED: $*" >&2; cat "$T"/*.log >&2; exit 1; }
mkdir "$T/text"
for i in 1 2 3 4 5 6 7 8; do for j in $(seq 60); do echo "file $i line $j of several words"; done >"$T/text/$i.txt"; done

export JAXLM="$PYTHON -m jaxlm" PYTHONPATH=$PWD JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=1
export JAX_DISABLE_MOST_OPTIMIZATIONS=1 RAY_USAGE_STATS_ENABLED=0
"$RAY/bin/ray" start --head --num-cpus=2 --disable-usage-stats --include-dashboard=false --temp-dir="$T/ray" >"$T/ray.log" 2>&1 ||
  fail "ray start"
job() { # job NAME OVERRIDES: in the background; its pid is in $!
  local name=$1
  shift
  "$RAY/bin/python" launch/ray_job.py --processes 2 --pack -- train configs/tiny_llama.py --data.train "$T/text" \
    --data.holdout 0.3 --data.cache "$T/cache" --out "$T/runs" --train.eval-every 0 --train.eval-batches 2 \
    --train.prompts --train.log-every 1 --optim.warmup 1 --mesh.fsdp 2 --execution.scan True --name "$name" "$@" \
    >"$T/$name.log" 2>&1 &
}

job whole --train.steps 4
wait $! || fail "two processes ended with status $?"
grep -q "2, by Ray" "$T/whole.log" && grep -q "finished at step 4" "$T/whole.log" || fail "two processes"
echo "ok: two processes trained together"

job stopped --train.steps 100000 --train.save-every 0
driver=$!
for _ in $(seq 600); do grep -q '"step": 12' "$T/runs/stopped/metrics.jsonl" 2>/dev/null && break; sleep 0.5; done
kill -TERM $driver
wait $driver && fail "a stopped job ended with status 0"
grep -q "interrupted after step" "$T/stopped.log" || fail "the stopped job did not say so"
for _ in $(seq 60); do pgrep -f "jaxlm train.*--out $T/runs" >/dev/null || break; sleep 1; done
! pgrep -f "jaxlm train.*--out $T/runs" >/dev/null || fail "processes outlived the job"
step=$(ls "$T/runs/stopped/checkpoints" | sed -n 's/^checkpoint-\([0-9]*\)$/\1/p' | tail -n 1)
[ -n "$step" ] || fail "the stopped job saved nothing"
echo "ok: stopping the job saved step $step"
echo "PASSED"
