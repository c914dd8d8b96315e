#!/usr/bin/env bash
# launch/slurm.sbatch in a real SLURM of one node on this machine: bash tests/system/slurm.sh
# Needs root and Debian's packages slurm-wlm and munge; starts daemons of its own in a temporary folder, and ends them.
#
#   PYTHON=/path/to/python   one that has jaxlm's packages (default: that of .venv)
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/../.."
missing=""
for program in munged slurmctld slurmd sbatch srun; do command -v $program >/dev/null || missing+=" $program"; done
if [ -n "$missing" ]; then echo "MISSING:$missing (apt-get install slurm-wlm munge)" >&2; exit 2; fi
if [ "$(id -u)" != 0 ]; then echo "MISSING: root, which slurmd needs" >&2; exit 2; fi
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
"$PYTHON" -c "import jax" || { echo "MISSING: a Python with jaxlm's packages; set PYTHON" >&2; exit 2; }

T=$(mktemp -d)
pids=()
clean() {
  [ ${#pids[@]} = 0 ] || kill "${pids[@]}" 2>/dev/null || true
  wait 2>/dev/null || true
  rm -rf "$T"
}
trap clean EXIT
fail() { echo "FAILED: $*" >&2; tail -n 40 "$T"/*.log >&2; exit 1; }
port() { "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

chmod 755 "$T"
mkdir "$T/spool" "$T/state" "$T/text"
head -c 1024 /dev/urandom >"$T/munge.key"
chmod 600 "$T/munge.key"
munged --foreground --force --key-file="$T/munge.key" --socket="$T/munge.socket" --pid-file="$T/munge.pid" \
  --seed-file="$T/munge.seed" >"$T/munged.log" 2>&1 &
pids+=($!)
node=$(hostname -s)
cat >"$T/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$(port)
SlurmdPort=$(port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$T/munge.socket
CredType=cred/munge
StateSaveLocation=$T/state
SlurmdSpoolDir=$T/spool
SlurmctldPidFile=$T/slurmctld.pid
SlurmdPidFile=$T/slurmd.pid
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=60
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP OverSubscribe=FORCE:4
CONF
export SLURM_CONF=$T/slurm.conf
for _ in $(seq 50); do [ -S "$T/munge.socket" ] && break; sleep 0.1; done
slurmctld -D >"$T/slurmctld.log" 2>&1 &
pids+=($!)
slurmd -D >"$T/slurmd.log" 2>&1 &
pids+=($!)
for _ in $(seq 100); do sinfo -h -o %t 2>/dev/null | grep -q idle && break; sleep 0.3; done
sinfo -h -o %t | grep -q idle || fail "the node never became idle"
echo "SLURM $(sinfo --version) is up"

for i in 1 2 3 4 5 6 7 8; do for j in $(seq 60); do echo "file $i line $j of several words"; done >"$T/text/$i.txt"; done
export JAXLM="$PYTHON -m jaxlm" PYTHONPATH=$PWD JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=1
train="configs/tiny_llama.py --data.train $T/text --data.holdout 0.3 --data.cache $T/cache --out $T/runs
  --train.eval-every 0 --train.eval-batches 2 --train.prompts --train.log-every 1 --optim.warmup 1 --mesh.fsdp 2
  --execution.scan True"
submit() { # submit NAME SLURM_OPTIONS -- OVERRIDES
  local name=$1 options=()
  shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  sbatch --parsable --output="$T/$name.log" --gpus-per-node=0 --nodes=1 --cpus-per-task=1 "${options[@]}" \
    launch/slurm.sbatch $train "$@"
}
ended() { # ended ID: waits for a job, gives its state and status
  for _ in $(seq 600); do
    info=$(scontrol -o show job "$1")
    case $info in *JobState=COMPLETED* | *JobState=FAILED* | *JobState=CANCELLED* | *JobState=TIMEOUT*) break ;; esac
    sleep 1
  done
  sed -n 's/.*JobState=\([A-Z]*\).*ExitCode=\([0-9:]*\).*/\1 \2/p' <<<"$info"
}
said() { grep -qE -- "$2" "$T/$1.log" || fail "$1 did not say: $2"; }

# Two tasks find each other by SLURM's variables, and train.
id=$(submit two --ntasks-per-node=2 -- --train.steps 4 --train.save-every 4 --name two)
state=$(ended "$id")
[ "$state" = "COMPLETED 0:0" ] || fail "two tasks: $state"
said two "0: processes +2, by SLURM"
said two "0: finished at step 4"
"$PYTHON" - "$T/runs/two/environment.json" <<'PY'
import json, sys
d = json.load(open(sys.argv[1]))["devices"]
assert (d["processes"], d["launcher"]) == (2, "2, by SLURM"), d
PY
echo "ok: two tasks trained together"

# One task of an allocation waits for nobody.
id=$(submit one --ntasks-per-node=1 -- --train.steps 2 --train.save-every 2 --mesh.fsdp 1 --name one)
state=$(ended "$id")
[ "$state" = "COMPLETED 0:0" ] || fail "one task: $state"
said one "processes +SLURM, one task"
echo "ok: one task trained alone"

# Nor does what a batch script starts without srun, whatever the job was given.
sbatch --wait --output="$T/batch.log" --nodes=1 --ntasks=2 \
  --wrap "$PYTHON -c 'import os; from jaxlm import clusters; print(clusters.find(os.environ))'" >/dev/null
said batch "SLURM, but not started by srun: alone.*count=1"
echo "ok: a batch script itself is alone"

# SIGTERM to the job, as at the end of its time: all save at one step, and the same line goes on from there.
id=$(submit term --ntasks-per-node=2 -- --train.steps 100000 --train.save-every 100000 --name long)
for _ in $(seq 300); do grep -q '"step": 12' "$T/runs/long/metrics.jsonl" 2>/dev/null && break; sleep 1; done
scancel --signal=TERM "$id"
state=$(ended "$id")
[ "$state" = "FAILED 1:0" ] || fail "after SIGTERM: $state"
said term "interrupted after step [0-9]+; saved. Go on with: jaxlm train"
step=$(sed -n 's/.*interrupted after step \([0-9]*\);.*/\1/p' "$T/term.log")
[ -d "$T/runs/long/checkpoints/checkpoint-$step" ] || fail "no checkpoint of step $step"
echo "ok: SIGTERM saved step $step"
id=$(submit again --ntasks-per-node=2 -- --train.steps 100000 --train.save-every 100000 --name long)
for _ in $(seq 300); do grep -q "\"step\": $((step + 3))" "$T/runs/long/metrics.jsonl" 2>/dev/null && break; sleep 1; done
said again "continuing .*/long after step $step"
echo "ok: the same line goes on after step $step"

# A task is killed: the job ends soon, and says which.
pid=$(scontrol listpids "$id" | awk '$5 == 1 && $4 == 1 { print $1; exit }')
[ -n "$pid" ] || pid=$(pgrep -f "jaxlm train.*--out $T/runs.*--name long" | tail -n 1)
kill -KILL "$pid"
since=$SECONDS
state=$(ended "$id")
said again "process [01] \(.*\) has died; go on with: jaxlm train"
((SECONDS - since < 60)) || fail "the others took $((SECONDS - since)) s to end"
echo "ok: a killed task ended the job ($state) within $((SECONDS - since)) s: $(grep -o 'process [01] ([^)]*) has died' "$T/again.log")"
echo "PASSED"
