"""`jaxlm train` trains a config, or continues a run directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.commands.arguments import Done, Flag, OnRun, start_processes


@dataclass(frozen=True)
class Train(OnRun):
    """Trains the run that a config describes; the same command continues an interrupted run, and a run directory. A
    finished run directory with another --data.train begins a new run beside it, which goes on from its model.

    example: jaxlm train quickstart --optim.lr 3e-4 --mesh.fsdp 8
    """

    dry_run: Flag = False
    """Show the config, the memory and one example of what would run, and don't run it."""

    def run(self, rest: list[str]) -> Done:
        run, start, origins = self.load(rest)
        start_processes(self, run)
        if run.distributed.method == "server":
            raise ValueError(
                "distributed.method: server is trained by `jaxlm coordinate` and `jaxlm work`; start the one and then "
                "the others"
            )
        from jaxlm.assembly import run_directory, training_run
        from jaxlm.commands import dry_run

        run_directory.check_place(run)
        if self.dry_run:
            return Done(dry_run.show(run, start, origins))
        status = training_run.train(run, start)
        return Done(results(run.folder), status)


def results(folder: Path) -> dict[str, Any]:
    """Returns what a run has come to."""
    from jaxlm.training import run_logs

    logs = run_logs.read(folder)
    end = logs.events.get("end", {})
    figures = [vars(result) for result in run_logs.results(logs)]
    step = max(line["step"] for line in [*logs.train, *logs.valid])
    return {"folder": folder, "step": step, "reason": end.get("reason", "interrupted"), "used": end.get("used"),
            "results": figures, "gain": (run_logs.gain(logs) or {}).get("figures", {})}  # fmt: skip
