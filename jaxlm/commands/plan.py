"""`jaxlm plan` says what a config needs on other machines; `jaxlm tune` measures what is fastest on this one."""

from dataclasses import dataclass
from pathlib import Path

from jaxlm.commands.arguments import Done, Flag, OnRun
from jaxlm.core.ranges import Count, Natural, Positive


@dataclass(frozen=True)
class Plan(OnRun):
    """Says what a step of a config needs on machines that aren't here: memory, time, bottleneck.

    example: jaxlm plan llama_8b --target v5p:4x4x4 --train.batch_size 64
    """

    target: str = "here"
    """The machine: v5p:4x4x4, v5p-128, v6e:16x16, 2*v5e:16x16 (slices), h100:8, h100:8x8 (nodes × GPUs), cpu:8."""
    analytic: Flag = False
    """Work it out by arithmetic alone, in a second; compile nothing."""
    link: Positive | None = None
    """Workers that train apart: Gbit/s that each has to the others, or to the parameter server; by default what the
    machine's devices have."""
    search: Flag = False
    """Try meshes, micro-batches and remat policies, by arithmetic."""
    compile: Natural = 0
    """--search: compile so many of the best."""
    out: Path | None = None
    """--search: write the best as a config file for jaxlm train."""

    def run(self, rest: list[str]) -> Done:
        if (self.compile or self.out) and not self.search:
            raise ValueError(f"--{'compile' if self.compile else 'out'}: is for --search; add it, or leave this out")
        if self.link is not None and self.search:
            raise ValueError("--link: is for one mesh, not for --search; leave one of them out")
        run = self.load(rest).run
        from jaxlm.commands import plan_report
        from jaxlm.planning import targets

        target = targets.parse(self.target)
        if self.search:
            values, ok = plan_report.search(run, target, self.compile, self.out)
        else:
            values, ok = plan_report.plan_one(run, target, not self.analytic, self.link)
        return Done(values, 0 if ok else 1)


@dataclass(frozen=True)
class Tune(OnRun):
    """Measures a few steps of a config's fastest meshes and remat policies on this machine.

    example: jaxlm tune quickstart --candidates 4 --out tuned.py
    """

    candidates: Count = 4
    """How many are tried besides the config as it is."""
    steps: Count = 5
    """Steps that are measured of each, after two that aren't."""
    out: Path | None = None
    """Write the fastest as a config file for jaxlm train."""

    def run(self, rest: list[str]) -> Done:
        run = self.load(rest).run
        from jaxlm.commands import plan_report

        return Done(plan_report.measured(run, self.candidates, self.steps, self.out))
