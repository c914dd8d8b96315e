"""`jaxlm compress` makes a model small: few bits, low rank, or zeros that stay."""

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command, Done, Model, part, start_processes
from jaxlm.core.compress_request import Calibration, Comparison, Settings
from jaxlm.core.ranges import Natural


@dataclass(frozen=True)
class Compress(Comparison, Calibration, Settings, Command):
    """Makes a model small, layer by layer, in a run directory that computes on few bits or low rank,
    or with zeros that stay.

    example: jaxlm compress runs/quickstart runs/small --method gptq --calibration README.md --rows 16
    """

    model: Model = field(kw_only=True)
    target: Annotated[Positional[str], arg(metavar="RUN_DIR", help="a new directory")] = field(kw_only=True)
    step: Natural | None = None
    """The checkpoint's; None: the newest."""

    def run(self, rest: list[str]) -> Done:
        start_processes(self)
        from jaxlm.assembly import compress

        made = compress.compress(
            self.model, self.target, part(self, Settings), part(self, Calibration), part(self, Comparison), self.step
        )
        print(*made.lines, sep="\n")
        print(f"{made.folder}: a run directory, with {compress.RECORD} and its table in {compress.CARD}")
        return Done({"folder": made.folder, **made.record})
