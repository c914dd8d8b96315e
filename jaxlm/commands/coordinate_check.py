"""`jaxlm coordinate-check` shows whether a config's settings can be taken from a narrow model to wide ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.commands.arguments import Done, OnRun, start_processes
from jaxlm.core.ranges import Count, Positive

if TYPE_CHECKING:
    from jaxlm.assembly.coordinate_check import Result


@dataclass(frozen=True)
class CoordinateCheck(OnRun):
    """Trains a config's model at several widths for a few updates, and shows how its activations change with the width;
    exit status 1 if one grows or stands still.

    example: jaxlm coordinate-check tiny_llama --transfer.method mup --transfer.base_width 64 --optim.lr 1e-2
    """

    widths: tuple[Count, ...] = (64, 128, 256, 512)
    """Values of model.width; heads and ffn grow in proportion."""
    updates: Count = 5
    """Updates after which activations are compared with those before, at optim.lr from the first one on; a rate above
    the best one shows more."""
    repeats: Count = 2
    """Initial weights whose figures are averaged."""
    tolerance: Positive = 0.3
    """Slope by which the logarithm of a change may go up or down with that of the width."""
    picture: Path | None = None
    """A .png, .svg or .pdf of all figures."""

    def run(self, rest: list[str]) -> Done:
        run = self.load(rest).run
        from jaxlm.assembly import coordinate_check, coordinate_picture

        settings = coordinate_check.Settings(self.widths, self.updates, self.repeats, self.tolerance)
        if self.picture is not None:
            coordinate_picture.check_place(self.picture)
        start_processes(self, run)
        result = coordinate_check.check(run, settings, lambda width, seed: print(f"width {width}, seed {seed}"))
        _show(result)
        if self.picture is not None:
            coordinate_picture.draw(result, self.picture)
            print(self.picture)
        return Done(result.as_dict(), 1 if result.faults else 0)


def _show(result: "Result") -> None:
    """Prints the table and the verdict."""
    import rich.console
    import rich.table

    widths = result.activations[0].widths
    console = rich.console.Console()
    table = rich.table.Table("activation", *(f"change at {w}" for w in widths), "slope", "slope of size", "")
    for a in result.activations:
        changes = [f"{x:.3g}" for x in a.changes[-1]]
        table.add_row(a.name, *changes, f"{a.change_slope:+.2f}", f"{a.size_slope:+.2f}", a.fault(result.tolerance))
    console.print(table)
    n = len(result.activations)
    if faults := result.faults:
        name, fault = next(iter(faults.items()))
        print(f"fails: {len(faults)} of {n} activations, first {name}: {fault}")
    else:
        print(f"passes: the changes of all {n} activations stay within a slope of {result.tolerance:g}")
