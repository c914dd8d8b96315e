"""`jaxlm board` serves a page that shows runs while they train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command, Done


@dataclass(frozen=True)
class Board(Command):
    """Serves a page that shows all runs below a folder while they train: curves, comparisons, samples, tables and what
    is wrong. It reads the run directories alone and changes nothing.

    example: jaxlm board runs
    """

    folder: Annotated[Positional[Path], arg(metavar="RUNS_DIR", help="a folder with run directories, or one of them")]
    host: str = "127.0.0.1"
    """The address to serve at. Only this machine reaches the default; any other needs a token, which is printed."""
    port: int = 8011
    """The port to serve at; 0: any that is free."""
    token: str = ""
    """What whoever reads the page must give; a new one each time where one is needed and none is given."""
    stalled: float = 0.0
    """Seconds without a new line after which a run is shown as stalled; 0: five times the longest pause between its
    last lines, and at least a minute."""

    def run(self, rest: list[str]) -> Done:
        from jaxlm.training.board.runs import Runs
        from jaxlm.training.board.server import Server

        if self.stalled < 0:
            raise ValueError(f"--stalled {self.stalled:g}: give seconds, or 0 for a limit by each run's own pace")
        if not self.folder.is_dir():
            raise ValueError(f"RUNS_DIR: no folder {self.folder}")
        runs = Runs(self.folder, self.stalled)
        with Server(runs, self.host, self.port, self.token) as server:
            told = {"address": server.address, "runs": len(runs.folders())}
            print(f"{told['runs']:,} runs below {self.folder}: {told['address']}  (Ctrl-C ends it)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print("ended")
        return Done(told)
