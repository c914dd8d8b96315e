"""`jaxlm coordinate` runs the parameter server of a run."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from jaxlm.commands.arguments import Done, Flag, OnRun


@dataclass(frozen=True)
class Coordinate(OnRun):
    """Runs the parameter server of a run whose workers are jobs of their own (distributed.method server), writes its
    log and validates the global weights; the same command goes on after a stop or a crash.

    example: jaxlm coordinate quickstart --local 2 --distributed.method server --distributed.workers 2
    """

    address: Annotated[str, arg(metavar="HOST:PORT")] = ""
    """Ray cluster to join, or auto for the one of this machine; empty: one is started here."""
    local: int = 0
    """Workers to start on this machine too, and to start again if they die or hang."""
    dashboard: Flag = False
    """Let a Ray that is started here have its dashboard."""

    def run(self, rest: list[str]) -> Done:
        run, start, _ = self.load(rest)
        if self.local < 0:
            raise ValueError(f"local: {self.local} is no number of workers")
        from jaxlm.assembly.distributed import coordinator, ray_cluster

        ray_cluster.need()
        if self.local:
            import jax

            jax.config.update("jax_platforms", "cpu")  # the accelerators are the workers'
        from jaxlm.assembly import run_directory
        from jaxlm.commands.train import results

        run_directory.check_place(run)
        status = coordinator.coordinate(run, start, address=self.address, local=self.local, dashboard=self.dashboard)
        return Done(results(run.folder), status)
