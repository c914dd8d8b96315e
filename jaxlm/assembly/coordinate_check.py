"""Checks that training does the same at every width: the sizes of activations, and how far the first updates move them
(the coordinate check of Yang et al. 2022, appendix D.1).

The same few batches train models of several widths at one learning rate. Where settings can be taken from a smaller
model, no activation's change grows or vanishes with the width. A check that passes is no proof: it sees a few steps,
and nothing of the weight decay.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly.own_loop import Program
from jaxlm.core import config, spec
from jaxlm.core.ranges import Count, Positive
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.taps import HIDDEN, Taps
from jaxlm.runtime import mesh

LOGITS = "logits"


@dataclass(frozen=True)
class Settings:
    """Settings say which models a coordinate check trains, and what it lets pass."""

    widths: tuple[Count, ...] = (64, 128, 256, 512)
    """Values of `model.width`; heads and ffn grow in proportion."""
    updates: Count = 5
    """Updates after which activations are compared with those before, at `optim.lr` from the first one on."""
    repeats: Count = 2
    """Initial weights, by seeds from `seed` on, whose figures are averaged."""
    tolerance: Positive = 0.3
    """Slope by which the logarithm of a change may go up or down with that of the width."""


@dataclass(frozen=True)
class Activation:
    """The mean absolute value of an activation at each width, and of its change, after each number of updates."""

    kind: str
    """What it is: `hidden` is what a layer hands on, others are products by the weight's name, and the logits."""
    layer: int | None
    """The number of its layer, from 0; None: it is of the whole model."""
    widths: tuple[int, ...]
    sizes: np.ndarray
    """[updates + 1, widths]."""
    changes: np.ndarray
    """[updates + 1, widths], from what it was before the first update."""

    @property
    def name(self) -> str:
        """Returns what the activation is called in a table."""
        return self.kind if self.layer is None else f"layer {self.layer} {self.kind}"

    @property
    def size_slope(self) -> float:
        """Returns the slope of the size's logarithm over that of the width, after the last update."""
        return slope(self.widths, self.sizes[-1])

    @property
    def change_slope(self) -> float:
        """Returns the slope of the change's logarithm over that of the width, after the last update."""
        return slope(self.widths, self.changes[-1])

    def fault(self, tolerance: float) -> str:
        """Returns what is wrong with the activation, in words; empty: nothing."""
        if not (np.isfinite(self.sizes).all() and np.isfinite(self.changes).all()):
            return "not finite"
        if not self.changes[-1].all():
            return "does not change"
        if self.size_slope > tolerance:
            return "grows with the width"
        if abs(self.change_slope) > tolerance:
            return f"change {'grows' if self.change_slope > 0 else 'vanishes'} with the width"
        return ""


@dataclass(frozen=True)
class Result:
    """A Result holds what a coordinate check has measured."""

    activations: tuple[Activation, ...]
    tolerance: float

    @property
    def faults(self) -> dict[str, str]:
        """Returns what is wrong by the activation's name; empty: the check passes."""
        return {a.name: fault for a in self.activations if (fault := a.fault(self.tolerance))}

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as values that JSON has."""
        rows = {
            a.name: {
                "sizes": a.sizes[-1].tolist(), "changes": a.changes[-1].tolist(),
                "size_slope": a.size_slope, "change_slope": a.change_slope, "fault": a.fault(self.tolerance),
            }
            for a in self.activations
        }  # fmt: skip
        widths = list(self.activations[0].widths)
        return {"passes": not self.faults, "widths": widths, "tolerance": self.tolerance, "activations": rows}


def slope(widths: Sequence[int], values: Sequence[float] | np.ndarray) -> float:
    """Returns the slope of the least-squares line through the logarithms; NaN where a value is 0 or not finite."""
    y = np.asarray(values, np.float64)
    if not (np.isfinite(y).all() and (y > 0).all()):
        return math.nan
    return float(np.polyfit(np.log(np.asarray(widths, np.float64)), np.log(y), 1)[0])


def check(run: config.Run, settings: Settings, told: Callable[[int, int], None] = lambda width, seed: None) -> Result:
    """Trains the run's model at every width for a few updates, and returns how its activations change with the width.

    The learning rate is that of the run from the first update on. `told` is called before each training, with its width
    and seed. Nothing is written but the cache of tokens. ValueError: the run can't be had at a width, or there are
    fewer than two.
    """
    widths = tuple(sorted(set(settings.widths)))
    if len(widths) < 2:
        raise ValueError("widths: a slope needs at least two of them, and four to be believed; give more")
    runs = {width: _at_width(run, width) for width in widths}  # refuses a width before anything is trained
    found: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
    batches = None
    for width, own in runs.items():
        program = Program(own)
        if batches is None:
            batches = list(itertools.islice(program.batches(), settings.updates + 1))
        measure = jax.jit(lambda first, now, batch, model=program.model: _measured(model, first, now, batch))
        each = []
        for seed in range(run.seed, run.seed + settings.repeats):
            told(width, seed)
            each.append(_trajectory(program, seed, batches, measure))
        found.append({name: tuple(np.mean([e[name] for e in each], 0).T) for name in each[0]})
    names = {name: tuple(np.stack([f[name][i] for f in found], 1) for i in range(2)) for name in found[0]}
    activations = [Activation(*_parsed(name), widths, *both) for name, both in names.items()]
    return Result(tuple(activations), settings.tolerance)


def _at_width(run: config.Run, width: int) -> config.Run:
    optim = dataclasses.replace(run.optim, schedule="constant", warmup=0)
    return dataclasses.replace(run, model=run.model.at_width(width), optim=optim)


def _trajectory(program: Program, seed: int, batches: Sequence[Any], measure: Any) -> dict[str, np.ndarray]:
    """Returns [updates + 1, 2] of each activation: its size and its change before the first update and after each. The
    last batch is the one that is measured on."""
    parts = dataclasses.replace(program.parts, run=dataclasses.replace(program.run, seed=seed))
    *trained, last = batches
    with mesh.on_mesh(program.mesh):
        state = parts.init()
        first = jax.tree.map(jnp.copy, state.all_params)  # the step takes the state's own memory
        figures = [jax.device_get(measure(first, first, last))]
        for batch in trained:
            state, _ = program.step(state, batch)
            figures.append(jax.device_get(measure(first, state.all_params, last)))
    return {name: np.array([f[name] for f in figures], np.float64) for name in figures[0]}


def _measured(model: Model, first: Any, now: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns (size, change) of each activation of the first micro-batch, as means over its tokens."""
    rows = {name: x[0] for name, x in batch.items()}
    before, after = _activations(model, first, rows), _activations(model, now, rows)
    here_BT = (rows["segments"] > 0).astype(jnp.float32)

    def mean(x: jax.Array) -> jax.Array:
        inner = jnp.abs(x.astype(jnp.float32)).reshape(*here_BT.shape, -1).mean(-1)
        return (inner * here_BT).sum() / here_BT.sum()

    return {name: jnp.stack([mean(x), mean(x - before[name])]) for name, x in after.items()}


def _activations(model: Model, weights: Any, rows: Mapping[str, Any]) -> dict[str, jax.Array]:
    matrices = {
        path.rpartition("/")[2]
        for stack in spec.stacks(model.specs).values() for path, s in stack.items() if s.is_matrix
    }  # fmt: skip
    taps = Taps(frozenset([HIDDEN, *matrices]))
    tapped = dataclasses.replace(model, shard=dataclasses.replace(model.shard, taps=taps))
    out = tapped.forward(weights, rows)
    found = {f"{i} {name}": x for i, layer in enumerate(taps.layers) for name, x in sorted(layer.items())}
    return found | {LOGITS: losses.logits(model.readout(weights, out.x_BTD), model.shard)}


def _parsed(name: str) -> tuple[str, int | None]:
    layer, _, kind = name.rpartition(" ")
    return kind, int(layer) if layer else None
