"""`jaxlm train` trains a config, or continues a run directory."""

from dataclasses import dataclass

from jaxlm.commands.arguments import Flag, OnRun, start_processes


@dataclass(frozen=True)
class Train(OnRun):
    """Trains the run that a config describes; the same command continues an interrupted run, and a run directory.

    example: jaxlm train quickstart --optim.lr 3e-4 --mesh.fsdp 8
    """

    dry_run: Flag = False
    """Show the config, the memory and one example of what would run, and don't run it."""

    def run(self, rest: list[str]) -> int:
        run, start, origins = self.load(rest)
        start_processes(self, run)
        from jaxlm.assembly import run_directory, training_run
        from jaxlm.commands import dry_run

        run_directory.check_place(run)
        if self.dry_run:
            return dry_run.show(run, start, origins)
        return training_run.train(run, start)
