"""`jaxlm grow` makes a larger model of a trained one."""

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command, Done, Model, part, start_processes
from jaxlm.core.growth import Growth
from jaxlm.core.ranges import Natural


@dataclass(frozen=True)
class Grow(Growth, Command):
    """Makes a larger model that computes the same, in a run directory to start from; give one of the first five
    options.

    example: jaxlm grow runs/quickstart runs/larger --blocks 2
    """

    model: Model = field(kw_only=True)
    target: Annotated[Positional[str], arg(metavar="RUN_DIR", help="a new directory")] = field(kw_only=True)
    step: Natural | None = None
    """The checkpoint's; None: the newest."""

    def run(self, rest: list[str]) -> Done:
        start_processes(self)
        from jaxlm.assembly import grow

        notes, record = grow.grow(self.model, self.target, part(self, Growth), self.step)
        print(*notes, sep="\n")
        print(
            f"logits before and after: off by {record['relative_difference']:.2g} of their deviation, at most by "
            f"{record['max_abs_difference']:.2g}; same likeliest token at {record['same_top_token']:.1%} of places"
        )
        return Done({"folder": self.target, "notes": notes, **record})
