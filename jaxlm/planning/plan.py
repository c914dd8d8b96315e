"""A plan says what a run needs on a target: memory, seconds and speed, compiled or by arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxlm.core import config
from jaxlm.planning import ahead_of_time, roofline, workers
from jaxlm.planning.ahead_of_time import Compiled, CompiledExchange
from jaxlm.planning.roofline import Cost
from jaxlm.planning.targets import Target
from jaxlm.planning.workers import Exchange


@dataclass(frozen=True)
class Plan:
    """A Plan holds what one step of a run costs on a target."""

    target: Target
    mesh: Mapping[str, int]
    """Sizes of the mesh axes; empty: one device."""
    cost: Cost
    """What one device spends in one step."""
    by_arithmetic: Cost
    """The same without compiling: what changes of the run are compared by."""
    notes: Mapping[str, str]
    """The choices that the run makes there, in words."""
    compiled: Compiled | None = None
    """The compiled step; None: the cost is by arithmetic."""
    host_bytes: float | None = 0.0
    """The most bytes of a host's memory that rows of earlier tasks take; None: only the data can say."""
    refused: str = ""
    """Why the target's compiler refuses the step; empty: it doesn't."""
    exchange: Exchange | None = None
    """What workers that train apart exchange in a round; None: all devices train together."""
    compiled_exchange: CompiledExchange | None = None
    """The compiled program of the exchange of all weights; None: there is none."""

    @property
    def memory_bytes(self) -> float:
        """The most bytes of a device that are in use at one time."""
        return self.cost.peak

    @property
    def fits(self) -> bool | None:
        """True if the step fits a device's memory; None: the chip's memory isn't known."""
        if self.refused:
            return False
        return fits(self.cost, self.target) if self.target.chip.hbm else None

    @property
    def seconds(self) -> float | None:
        """The predicted seconds of a step; None: the chip's peaks aren't known."""
        return self.cost.times.get("step")

    @property
    def tokens_per_second(self) -> float | None:
        """The predicted tokens a second of all devices; None: the chip's peaks aren't known."""
        return self.cost.tokens / self.seconds if self.seconds else None

    @property
    def bottleneck(self) -> str | None:
        """Names what most of the step's time goes to; None: the chip's peaks aren't known."""
        return bottleneck(self.cost) if self.cost.times else None


def make(run: config.Run, target: Target, compiling: bool = True, link: float | None = None) -> Plan:
    """Returns the plan of a run on a target: compiled for it, or by arithmetic alone in a fraction of a second.

    With a parameter server the target is that of one worker. `link`: Gbit/s that a worker has to the others, or to the
    server; None: what the target has. ValueError: a field of the run can't be met on the target's devices.
    """
    run = workers.worker_run(run)
    if link is not None and run.distributed.method == "none":
        raise ValueError("link: is for workers that train apart; set distributed.method, or leave it out")
    p = ahead_of_time.program_for(run, target)
    cost = roofline.cost(p, target)
    plan = Plan(
        target,
        dict(p.mesh.shape) if p.mesh is not None else {},
        cost,
        cost,
        p.notes,
        host_bytes=ahead_of_time.kept_bytes(p),
        exchange=workers.exchange(p, target, link),
    )
    if not compiling:
        return plan
    try:
        compiled = ahead_of_time.compile_step(run, target)
        together = ahead_of_time.compile_exchange(run, target) if p.apart else None
    except ahead_of_time.Refused as refusal:
        return replace(plan, refused=str(refusal))
    return replace(plan, cost=compiled.cost, compiled=compiled, compiled_exchange=together)


def fits(c: Cost, t: Target) -> bool:
    """Returns whether a cost fits the target's memory, but for the share that is left to the runtime."""
    return c.peak <= t.chip.hbm * (1 - ahead_of_time.RESERVE)


def bottleneck(c: Cost) -> str:
    """Names what most of the step's time goes to."""
    parts = {
        "compute": c.times["compute"], "memory between products": c.times["memory"],
        "gaps between kernels": c.times["launches"], "sums of activations that are waited for": c.times["waited"],
        "the optimizer's state from the host and back": c.times["copied"], "the pipeline's bubble": c.times["bubble"],
    }  # fmt: skip
    known = sum(parts.values())
    if c.times["step"] > known * 1.001:
        return "a network or the host's link: what moves beside the products takes longer than they do"
    name = max(parts, key=lambda k: parts[k])
    return f"{name} ({parts[name] / c.times['step']:.0%} of the step)"
