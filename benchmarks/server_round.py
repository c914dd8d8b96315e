"""Seconds a round of the parameter server on one machine, beside a plain all-reduce of as many bytes.

    python benchmarks/server_round.py --gigabytes 1 --workers 2          # the Python that runs it must have Ray

A real server on a local Ray cluster holds float32 weights, and workers that compute nothing push a delta each round and
take up the new weights: push, sum, outer step and pull are timed, checkpoints aren't. The all-reduce sums the same
arrays over as many CPU devices of one JAX program. Both are the fastest of --rounds. The server's memory is that of its
process at the end of the last round, in multiples of the weights.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from worker import machine, save, table

import jaxlm
from jaxlm.assembly.distributed import ray_cluster, ray_server
from jaxlm.assembly.distributed.ray_link import RayLink
from jaxlm.core import config
from jaxlm.core.distributed import Distributed, Server
from jaxlm.training.distributed import vector


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gigabytes", type=float, default=1.0, help="of the weights in float32")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--shards", type=int, default=1, help="actors that hold the weights")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--compress", nargs="+", default=["none", "int8"])
    p.add_argument("--save", default="server_round", help="name under results/ (-: don't save)")
    p.add_argument("--all-reduce", action="store_true", help=argparse.SUPPRESS)
    return p.parse_args()


class Pusher:
    """A Pusher is a worker without a model."""

    def __init__(self, run: config.Run, name: str, count: int) -> None:
        self.link = RayLink(run, name, {}, count)
        self.delta = np.full(count, 1e-3, np.float32)
        self.packed = vector.pack(run.distributed.compress, self.delta, None, 0.0)

    def rounds(self, count: int) -> list[float]:
        """Returns the seconds of each round, from the push to the new weights."""
        self.link.begin()
        seconds = []
        for _ in range(count):
            began = time.monotonic()
            self.link.exchange(self.packed, steps=1, tokens=1.0, seconds=1.0, loss=1.0)
            seconds.append(time.monotonic() - began)
        return seconds


def resident(pid: int) -> int:
    """Returns the bytes that a process has allocated; files and Ray's object store, which it maps, don't count."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def server(a: argparse.Namespace, compress: str, folder: str) -> tuple[float, float]:
    """Returns the seconds of the fastest round, and the server's memory in multiples of the weights."""
    count = int(a.gigabytes * 1e9 / 4)
    rules = Server("sync", quorum=1.0, timeout=600.0, shards=a.shards, checkpoint_every=10**6)
    run = jaxlm.load("quickstart")
    run = dataclasses.replace(
        run, name=compress, out=folder, train=dataclasses.replace(run.train, steps=10**6),
        distributed=Distributed("server", workers=a.workers, every=1, compress=compress, server=rules),
    )  # fmt: skip
    ray = ray_cluster.need()
    ray_server.write_first(run, np.zeros(count, np.float32))
    keeper = ray_server.start(run, {})
    crew = [ray.remote(Pusher).options(num_cpus=0).remote(run, f"worker {i}", count) for i in range(a.workers)]
    seconds = ray.get([one.rounds.remote(a.rounds) for one in crew])
    pids = ray.get([actor.__ray_call__.remote(lambda self: os.getpid())
                    for actor in (keeper, *ray.get(keeper.holders.remote()))])  # fmt: skip
    memory = sum(map(resident, pids)) / (4 * count)
    for actor in (keeper, *crew):
        ray.kill(actor)
    return min(max(each) for each in zip(*seconds, strict=True)), memory


def all_reduce(a: argparse.Namespace) -> float:
    """Returns the seconds of the fastest sum of arrays of all devices."""
    import jax
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((a.workers,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))
    count = int(a.gigabytes * 1e9 / 4)
    make = jax.jit(lambda: jax.numpy.full((a.workers, count), 1e-3), out_shardings=jax.NamedSharding(mesh, P("worker")))
    add = jax.jit(jax.shard_map(
        lambda x: jax.lax.psum(x, "worker"), mesh=mesh, in_specs=P("worker"), out_specs=P()
    ), donate_argnums=0)  # fmt: skip
    seconds = []
    for _ in range(a.rounds + 1):
        x = jax.block_until_ready(make())
        began = time.monotonic()
        jax.block_until_ready(add(x))
        seconds.append(time.monotonic() - began)
    return min(seconds[1:])


def main() -> None:
    a = arguments()
    if a.all_reduce:
        print(all_reduce(a))
        return
    flags = f"--xla_force_host_platform_device_count={a.workers} {os.environ.get('XLA_FLAGS', '')}"
    command = [sys.executable, *sys.argv, "--all-reduce"]
    told = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True)
    if told.returncode:
        raise SystemExit(told.stderr)
    plain = float(told.stdout.split()[-1])
    results: dict[str, dict[str, float]] = {"all-reduce, float32": {"seconds": plain}}
    with tempfile.TemporaryDirectory() as folder:
        ray_cluster.connect("")
        for compress in a.compress:
            seconds, memory = server(a, compress, folder)
            results[f"server, {compress}"] = {"seconds": seconds, "times_the_all_reduce": seconds / plain,
                                              "server_memory_in_weights": memory}  # fmt: skip
    shown = ("seconds", "times_the_all_reduce", "server_memory_in_weights")
    rows = [[name, *(f"{r[key]:.2f}" if key in r else "" for key in shown)] for name, r in results.items()]
    print(table(rows, ["", "seconds a round", "times the all-reduce", "server's memory / weights"]))
    if a.save != "-":
        settings = {key: getattr(a, key) for key in ("gigabytes", "workers", "shards", "rounds")}
        save(a.save, {"machine": machine(), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
