"""`jaxlm report` rebuilds report.html and report.png from a run's logs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command


@dataclass(frozen=True)
class Report(Command):
    """Rebuilds report.html and report.png from a run's logs.

    example: jaxlm report runs/quickstart
    """

    folder: Annotated[Positional[Path], arg(metavar="RUN_DIR", help="a run directory")]

    def run(self, rest: list[str]) -> int:
        from jaxlm.training import report

        print(report.build(self.folder))
        return 0
