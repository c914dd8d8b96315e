"""Searches which mesh, micro-batches and recomputation are fastest (`jaxlm plan `search`` and `jaxlm tune`).

Candidates are ranked by `roofline`; the first few are compiled, or run for some steps on the machine at hand.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxlm
from jaxlm.assembly import remember
from jaxlm.core import config
from jaxlm.core.errors import one_line
from jaxlm.planning import ahead_of_time
from jaxlm.planning.ahead_of_time import RESERVE
from jaxlm.planning.roofline import Cost
from jaxlm.planning.targets import Target
from jaxlm.runtime.mesh import AXES, on_mesh
from jaxlm.weights import adapters

REMAT: tuple[Any, ...] = ("none", "dots", "full")
MICRO = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Candidate:
    """A Candidate is a run with its estimated cost."""

    run: config.Run
    cost: Cost

    @property
    def changes(self) -> str:
        """Returns the mesh, micro-batches and remat of the run, in words."""
        m, x = self.run.mesh, self.run.execution
        mesh = " × ".join(f"{a} {n}" for a in AXES if (n := getattr(m, a)) not in (1, None)) or "one device"
        return f"{mesh}, {self.run.train.micro_batches} micro-batches, remat {x.remat}"


def meshes(run: config.Run, count: int) -> Iterator[config.Mesh]:
    """Yields every way to give devices to the axes that this model can use; a pipeline only where the run has one, and
    as many replicas as it has where workers train apart on them."""
    experts = 1 if run.model.moe is None else run.model.moe.experts
    limits = {"tensor": 16, "context": 16 if run.train.seq_len >= 8192 else 1, "expert": experts}
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    choices = [[n for n in divisors if n <= limit] for limit in limits.values()]
    stage, replica = max(1, run.mesh.stage), run.mesh.replica if run.distributed.method == "diloco" else 1
    for tensor, context, expert in itertools.product(*choices):
        taken = tensor * context * expert * stage * replica
        if count % taken == 0:
            for fsdp in (n for n in divisors if (count // taken) % n == 0):
                yield dataclasses.replace(
                    run.mesh, replica=replica, data=count // taken // fsdp, fsdp=fsdp, context=context, expert=expert,
                    tensor=tensor, stage=stage,
                )  # fmt: skip


def candidates(run: config.Run, t: Target) -> list[Candidate]:
    """Returns all that the program accepts, fastest first; those that don't fit come last, by how little they miss.

    Where the chip's numbers are unknown memory traffic and products are weighed on any one scale, which ranks nothing
    finely. Raises ValueError where no mesh will do.
    """
    accepted = []
    for mesh, micro, remat in itertools.product(meshes(run, t.count), MICRO, REMAT):
        variant = dataclasses.replace(
            run, mesh=mesh, train=dataclasses.replace(run.train, micro_batches=micro),
            execution=dataclasses.replace(run.execution, remat=remat),
        )  # fmt: skip
        try:
            accepted.append(Candidate(variant, ahead_of_time.estimate(variant, t)))
        except ValueError:  # it doesn't divide, or would rest unsharded
            continue
    if not accepted:
        ahead_of_time.estimate(run, t)  # its error says why
        raise ValueError(f"search: no mesh of {t.count} devices divides this model and batch; change train.batch_size")
    return sorted(accepted, key=lambda c: rank(c, t))


def rank(c: Candidate, t: Target) -> tuple[float, ...]:
    """Returns what candidates are sorted by: missing memory, time, then simplicity."""
    excess = max(0.0, c.cost.peak - t.chip.hbm * (1 - RESERVE)) if t.chip.hbm else 0.0
    seconds = c.cost.times.get(
        "step", c.cost.flops / 1e11 + c.cost.hbm / 1e10 + sum(f.sent for f in c.cost.flows) / 1e10
    )
    # The simpler of equally fast ones comes first: fewer axes, fewer micro-batches.
    axes = sum(getattr(c.run.mesh, a) not in (1, None) for a in AXES)
    return excess, round(seconds, 6), axes, c.run.train.micro_batches, c.cost.peak


def best_change(run: config.Run, t: Target, current: Cost) -> str:
    """Returns, in words, the one change of one field that helps most by arithmetic."""
    room = t.chip.hbm * (1 - RESERVE)
    swap = dataclasses.replace
    variants = {f"execution.remat={r}": swap(run, execution=swap(run.execution, remat=r)) for r in REMAT}
    variants |= {f"train.micro_batches={n}": swap(run, train=swap(run.train, micro_batches=n)) for n in MICRO}
    for mesh in meshes(run, t.count):
        axes = [f"mesh.{a}={n}" for a in AXES if (n := getattr(mesh, a)) != 1]
        variants[" ".join(axes) or "one device"] = swap(run, mesh=mesh)
    tried = []
    for name, variant in variants.items():
        try:
            tried.append((name, ahead_of_time.estimate(variant, t)))
        except ValueError:
            continue
    excess = lambda c: max(0.0, c.peak - room)  # noqa: E731
    if not tried or not current.times:
        return ""
    name, cost = min(tried, key=lambda x: (excess(x[1]), x[1].times["step"]))
    if (excess(cost), cost.times["step"]) >= (excess(current), current.times["step"] * 0.995):
        return "none of one field: by arithmetic this is the fastest of its kind"
    fits = ""
    if excess(cost):
        fits = ", which only comes nearer to fitting"
    elif excess(current):
        fits = ", and now it fits"
    return f"{name}: {cost.times['step'] / current.times['step'] - 1:+.0%} of the time{fits}"


# ---- on the machine at hand


def measure(run: config.Run, steps: int = 5, warmup: int = 2) -> float:
    """Returns the seconds of a step, the median of some, with weights and tokens that are made up."""
    p = ahead_of_time.program_of(run)
    rng = np.random.default_rng(0)
    with on_mesh(p.mesh):
        batch = {
            name: jax.device_put(_filled(x, run.model.vocab, rng), x.sharding)
            for name, x in ahead_of_time.abstract_batch(p).items()
        }
        kept = remember.memory_like(p)
        train_step = p.train_step().lower(p.abstract_state().replace(memory=kept), batch).compile()
        made = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), kept)
        state, seconds = p.init().replace(memory=made), []
        for _ in range(warmup + steps):
            started = time.perf_counter()
            state, metrics = train_step(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[warmup:]))


def _filled(x: Any, vocab: int, rng: np.random.Generator) -> np.ndarray:
    if np.issubdtype(x.dtype, np.floating):
        return np.ones(x.shape, x.dtype)
    if len(x.shape) < 3:
        return np.zeros(x.shape, x.dtype)
    return rng.integers(1, max(2, min(vocab, x.shape[2])), x.shape).astype(x.dtype)


def tune(
    run: config.Run, t: Target, limit: int, steps: int, say: Callable[[str], None]
) -> list[tuple[Candidate, float | None]]:
    """Measures the candidates that arithmetic puts first, and the run as it is; returns them, fastest first."""
    ranked = candidates(run, t)
    unchanged = Candidate(run, ahead_of_time.estimate(run, t))
    chosen = [unchanged, *[c for c in ranked if c.changes != unchanged.changes][:limit]]
    measured: list[tuple[Candidate, float | None]] = []
    for c in chosen:
        try:
            seconds: float | None = measure(c.run, steps)
        except jax.errors.JaxRuntimeError as e:  # out of memory
            seconds = None
            say(f"{c.changes}: {one_line(e, 300)}")
        else:
            say(f"{c.changes}: {seconds:.4g} s")
        measured.append((c, seconds))
    return sorted(measured, key=lambda x: math.inf if x[1] is None else x[1])


# ---- a run as a config file


def check_free(path: Path | None) -> None:
    """Refuses a file that exists, before minutes are spent on what is to be written there."""
    if path is not None and path.exists():
        raise ValueError(f"out: {path} exists; name another file")


def write(run: config.Run, path: Path, why: str) -> None:
    """Writes a file that `jaxlm train` takes, with every field that isn't its default."""
    check_free(path)
    modules: set[str] = set()
    body = _code(run, modules, 1)
    imports = "\n".join(f"import {m}" for m in sorted(modules))
    path.write_text(f'"""{why}"""\n\n{imports}\n\n\ndef config() -> jaxlm.Run:\n    return {body}\n')


def _code(value: Any, modules: set[str], depth: int) -> str:
    if not dataclasses.is_dataclass(value):
        return repr(value)
    kind = type(value)
    # Config files name what is public: parts of a run by the package, those of models and objectives by their module.
    module = next((m.__name__ for m in (jaxlm, adapters) if kind.__name__ in m.__all__), kind.__module__)
    modules.add(module)
    arguments = []
    for f in dataclasses.fields(value):
        current = getattr(value, f.name)
        default = f.default if f.default is not dataclasses.MISSING else (
            f.default_factory() if f.default_factory is not dataclasses.MISSING else dataclasses.MISSING
        )  # fmt: skip
        if default is dataclasses.MISSING or current != default:
            arguments.append(f"{'    ' * (depth + 1)}{f.name}={_code(current, modules, depth + 1)},")
    name = f"{module}.{kind.__qualname__}"
    return f"{name}(\n" + "\n".join(arguments) + f"\n{'    ' * depth})" if arguments else f"{name}()"
