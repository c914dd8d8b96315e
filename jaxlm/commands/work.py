"""`jaxlm work` trains as one worker of a run with a parameter server."""

import socket
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from jaxlm.commands.arguments import Done, OnRun, start_processes


@dataclass(frozen=True)
class Work(OnRun):
    """Joins a run as a worker, on the devices and processes that it is started on, and trains until the run is over. It
    may come late, die and come back.

    example: jaxlm work runs/quickstart --address 10.0.0.1:6379 --worker east
    """

    address: Annotated[str, arg(metavar="HOST:PORT")] = "auto"
    """Ray cluster that the server is in; auto: the one that this machine is a node of."""
    worker: str = ""
    """Name of the worker, by which it is known when it comes back, and of its folder; default: that of the machine."""

    def run(self, rest: list[str]) -> Done:
        run, start, _ = self.load(rest)
        start_processes(self, run)
        from jaxlm.assembly.distributed import job, ray_cluster
        from jaxlm.assembly.distributed.ray_link import RayLink

        ray_cluster.need()
        name = self.worker or socket.gethostname().partition(".")[0]

        def connect(terms: dict, count: int) -> job.Link:
            ray_cluster.connect(self.address or "auto")
            return RayLink(run, name, terms, count)

        status = job.work(run, start, name, connect)
        return Done({"worker": name, "status": status}, status)
