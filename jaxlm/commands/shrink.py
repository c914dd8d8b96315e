"""`jaxlm shrink` makes a smaller model of a trained one."""

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command, Done, Flag, Model, part, start_processes
from jaxlm.core.ranges import Natural
from jaxlm.core.shrinking import Shrinking


@dataclass(frozen=True)
class Shrink(Shrinking, Command):
    """Makes a smaller model of the same family, in a run directory to train on from; what goes is chosen on calibration
    text, and the loss on held-out text is told before and after.

    example: jaxlm shrink runs/quickstart runs/smaller --share 0.25
    """

    model: Model = field(kw_only=True)
    target: Annotated[Positional[str], arg(metavar="RUN_DIR", help="a new directory")] = field(kw_only=True)
    calibration: tuple[str, ...] = ()
    """Sources of text that units are judged on; empty: those that the run was trained on."""
    held_out: tuple[str, ...] = ()
    """Sources that the loss is measured on; empty: the run's own, or a tenth of the calibration's documents."""
    compensate: Flag = False
    """Change the matrices behind heads and feed-forward neurons such that the rest makes up for what goes, by least
    squares over the calibration's inputs."""
    step: Natural | None = None
    """The checkpoint's; None: the newest."""

    def run(self, rest: list[str]) -> Done:
        start_processes(self)
        from jaxlm.assembly import shrink

        made = shrink.shrink(self.model, self.target, part(self, Shrinking), self.calibration, self.held_out, self.step)
        print(*made.notes, made.table(), sep="\n")
        return Done({"folder": self.target, "notes": made.notes, **made.record})
