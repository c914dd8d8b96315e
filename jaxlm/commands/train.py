"""`jaxlm train` trains a config, or continues a run directory."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jaxlm.commands.arguments import Done, Flag, OnRun, start_processes


@dataclass(frozen=True)
class Train(OnRun):
    """Trains the run that a config describes; the same command continues an interrupted run, and a run directory. A
    finished run directory with another --data.train begins a new run beside it, which goes on from its model.

    example: jaxlm train quickstart --optim.lr 3e-4 --mesh.fsdp 8
    """

    dry_run: Flag = False
    """Show the config, the memory and one example of what would run, and don't run it."""
    board: Flag = False
    """Serve a page that shows this run, and those beside it, while it trains; its address is printed."""

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
        with self._board(run.folder):
            status = training_run.train(run, start)
        return Done(results(run.folder), status)

    @contextlib.contextmanager
    def _board(self, folder: Path) -> Iterator[None]:
        """Serves the board while it is entered, if it is asked for, by one process of all."""
        import jax

        if not self.board or jax.process_index():
            yield
            return
        from jaxlm.training.board import beside

        with beside.serving(folder.parent) as address:
            print(f"board        {address}#run={quote(folder.name, safe='')}", flush=True)
            yield


def results(folder: Path) -> dict[str, Any]:
    """Returns what a run has come to."""
    from jaxlm.training import run_logs

    logs = run_logs.read(folder)
    end = logs.events.get("end", {})
    figures = [vars(result) for result in run_logs.results(logs)]
    return {"folder": folder, "step": logs.step, "reason": end.get("reason", "interrupted"), "used": end.get("used"),
            "results": figures, "gain": (run_logs.gain(logs) or {}).get("figures", {})}  # fmt: skip
