"""`jaxlm report` rebuilds report.html and report.png from a run's logs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command, Done


@dataclass(frozen=True)
class Report(Command):
    """Rebuilds report.html and report.png from a run's logs.

    example: jaxlm report runs/quickstart
    """

    folder: Annotated[Positional[Path], arg(metavar="RUN_DIR", help="a run directory")]

    def run(self, rest: list[str]) -> Done:
        from jaxlm.training import report, run_logs

        page = report.build(self.folder)
        print(page)
        found = run_logs.results(run_logs.read(self.folder))
        print(*map(run_logs.said, found), sep="\n", end="\n" if found else "")
        return Done({"report": page, "results": [vars(result) for result in found]})
