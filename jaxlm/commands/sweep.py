"""`jaxlm sweep` searches settings of a run: a trial is a run, and the best configuration becomes a file."""

from dataclasses import dataclass, fields
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from jaxlm.commands.arguments import Done, Flag, OnRun, part
from jaxlm.core.sweep import Settings

_SPACE = (
    "A field that varies, and its values: optim.lr=log(1e-5,1e-3), optim.beta2=uniform(0.9,0.999), "
    "train.seq_len=uniform(64,256,64), train.batch_size=16|32, adapter=lora|dora. May be given several times"
)


@dataclass(frozen=True)
class Sweep(Settings, OnRun):
    """Searches settings of the run that a config describes, each trial a training run of its own, in the run's
    directory; the same command goes on with a sweep that was stopped or killed. The best configuration is then
    best.json there, which `jaxlm train` takes.

    example: jaxlm sweep quickstart --space "optim.lr=log(1e-4,1e-2)" --space "train.batch_size=16|32" --trials 20
    """

    space: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FIELD=VALUES", help=_SPACE)] = ()
    coordinate_check: Flag = False
    """Searches nothing, but shows whether settings found at one width hold at others: `jaxlm coordinate-check` as it is
    without options of its own."""

    def run(self, rest: list[str]) -> Done:
        if self.coordinate_check:
            from jaxlm.commands.coordinate_check import CoordinateCheck

            if self.space:
                raise ValueError("coordinate_check: searches no settings; leave `space` out")
            return CoordinateCheck(**{f.name: getattr(self, f.name) for f in fields(OnRun)}).run(rest)
        run, _, _ = self.load(rest)
        import jax

        jax.config.update("jax_platforms", "cpu")  # the accelerators are the trials'
        from jaxlm.assembly import sweep, sweep_results
        from jaxlm.training import sweep_report

        status = sweep.search(run, self.space, part(self, Settings))
        results = sweep_results.read(run.folder)
        print(sweep_report.table(results))
        print(f"report: {run.folder / sweep_report.PAGE_NAME}")
        if results["best"] is not None:
            print(f"the best configuration: jaxlm train {run.folder / sweep_results.BEST}")
        return Done({"folder": run.folder, **results}, status)
