"""A run on a Ray cluster, one process a node.

    python launch/ray_job.py --processes 2 --gpus 8 -- train CONFIG [overrides]

From outside the cluster: ray job submit --working-dir . -- python launch/ray_job.py … Every node needs the same
environment, and `--out` and `--data.cache` on storage that all share. `JAXLM="python -m jaxlm"` names another command
than the `jaxlm` of this Python. Stopped by SIGTERM, all processes save at one step, and the same line goes on from
there; `ray job stop` waits for it if the job was submitted with RAY_JOB_STOP_WAIT_TIME_S=300 among its variables.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys

import ray


@ray.remote(max_restarts=0, max_concurrency=2)
class Process:
    """On its node: runs the command, and passes a stop on while it runs. Ray kills the command with this actor."""

    def address(self) -> str:
        with socket.socket() as s:
            s.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{s.getsockname()[1]}"

    def run(self, words: list[str], address: str, count: int, index: int) -> int:
        told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        self.command = subprocess.Popen(words, env=os.environ | {"JAXLM_LAUNCHER": "Ray"} | told)
        return self.command.wait()

    def stop(self) -> None:
        self.command.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--gpus", type=float, default=0, help="of a process")
    parser.add_argument("--cpus", type=float, default=1, help="of a process")
    parser.add_argument("--pack", action="store_true", help="several processes may share a node")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="as jaxlm takes it: train CONFIG [overrides]")
    args = parser.parse_args()

    ray.init(address="auto")
    each = {"CPU": args.cpus} | ({"GPU": args.gpus} if args.gpus else {})
    group = ray.util.placement_group([each] * args.processes, "PACK" if args.pack else "STRICT_SPREAD")
    if not group.wait(600):
        print(f"the cluster has no room for {args.processes} × {each}: see `ray status`", file=sys.stderr)
        return 1
    place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
    crew = [
        Process.options(num_cpus=args.cpus, num_gpus=args.gpus, scheduling_strategy=place(group, i)).remote()
        for i in range(args.processes)
    ]
    address = ray.get(crew[0].address.remote())
    words = [*shlex.split(os.environ.get("JAXLM", f"{sys.executable} -m jaxlm")), *args.command]
    running = [p.run.remote(words, address, len(crew), i) for i, p in enumerate(crew)]
    signal.signal(signal.SIGTERM, lambda *_: [p.stop.remote() for p in crew])
    return max(ray.get(running), key=abs)


if __name__ == "__main__":
    sys.exit(main())
