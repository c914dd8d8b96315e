"""A parameter server and its workers on a Ray cluster, one worker a node.

    python launch/ray_workers.py --workers 4 --gpus 8 -- CONFIG --distributed.method server --distributed.workers 4

From outside the cluster: ray job submit --working-dir . -- python launch/ray_workers.py … Every node needs the same
environment, and `--out` and `--data.cache` on storage that all share. `JAXLM="python -m jaxlm"` names another command
than the `jaxlm` of this Python. The server runs where this does. A worker whose node is lost is started again on
another one, and joins under its name; stopped by SIGTERM, all save and end, and the same line goes on from there.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time

import ray


@ray.remote(max_restarts=-1, max_task_retries=-1, max_concurrency=2)
class Node:
    """On its node: runs a worker, and passes a stop on while it runs. Ray kills the worker with this actor."""

    def run(self, words: list[str], address: str, name: str) -> int:
        told = {"JAXLM_LAUNCHER": "Ray", "JAXLM_DISTRIBUTED": "0"}  # each worker is a run of one process
        for variable in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
            os.environ.pop(variable, None)
        self.command = subprocess.Popen(
            [*words, "--address", address, "--worker", name], env=os.environ | told, start_new_session=False
        )
        return self.command.wait()

    def stop(self) -> None:
        self.command.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--gpus", type=float, default=0, help="of a worker")
    parser.add_argument("--cpus", type=float, default=1, help="of a worker")
    parser.add_argument("config", nargs="+", metavar="-- CONFIG", help="as jaxlm takes it: CONFIG [overrides]")
    args = parser.parse_args()

    ray.init(address="auto")
    address = ray.get_runtime_context().gcs_address
    jaxlm = shlex.split(os.environ.get("JAXLM", f"{sys.executable} -m jaxlm"))
    server = subprocess.Popen([*jaxlm, "coordinate", *args.config, "--address", address])
    spread = Node.options(num_cpus=args.cpus, num_gpus=args.gpus, scheduling_strategy="SPREAD")
    crew = {f"w{i}": spread.remote() for i in range(args.workers)}
    words = [*jaxlm, "work", *args.config]
    running = {node.run.remote(words, address, name): name for name, node in crew.items()}

    def stop(*_: object) -> None:
        server.terminate()
        for node in crew.values():
            node.stop.remote()

    signal.signal(signal.SIGTERM, stop)
    while server.poll() is None:
        ended, _ = ray.wait(list(running), timeout=1)
        for one in ended:
            name = running.pop(one)
            status = ray.get(one)
            print(f"{name} ended with status {status}", flush=True)
            if status not in (0, 2) and server.poll() is None:  # 2: it can't be met, and would end so again
                running[crew[name].run.remote(words, address, name)] = name
        time.sleep(1)
    ray.wait(list(running), num_returns=len(running), timeout=60) if running else None
    return server.returncode


if __name__ == "__main__":
    sys.exit(main())
