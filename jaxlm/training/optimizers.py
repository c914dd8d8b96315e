"""Builds optimizers and schedules: optax chains, and which parameters each of them gets."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxlm.core import config, tree
from jaxlm.core.registry import Table
from jaxlm.core.spec import Spec, is_spec
from jaxlm.training import adafactor, rate_scales
from jaxlm.training.rate_scales import Scale, Scales

DecayMask = Callable[[Any], Any]
"""From weights to a tree of booleans: those that weight decay is for."""


class Numbers(NamedTuple):
    """Numbers are what an update takes of a run's settings as data: runs that differ in these alone share a compiled
    program. Each is a Python number, or a traced one."""

    peak: float
    """The highest learning rate, `optim.lr`."""
    muon_peak: float
    """That of the matrices that Muon moves."""
    balance_peak: float
    """The size of a step of the biases that experts are chosen by."""
    weight_decay: float
    warmup: int
    """Updates of the linear warm-up."""
    start: int
    """Updates after the warm-up at which the decay begins."""
    span: int
    """Updates that the decay takes."""
    final: float
    """What the decay ends at, as a share of the peak."""


def numbers(c: config.Optim, steps: int) -> Numbers:
    """Returns the numbers of a run of so many updates. ValueError: the warm-up doesn't fit."""
    if c.warmup >= steps:
        raise ValueError(f"optim.warmup: {c.warmup} steps do not fit into train.steps {steps}")
    start, span = 0, max(1, steps - c.warmup - 1)
    if c.schedule == "wsd":
        span = min(max(1, round(c.decay * steps)), steps - c.warmup)
        start = steps - span - c.warmup
    muon, balance = (c.muon_lr, BALANCE_RATE) if c.lr else (0.0, 0.0)  # with `optim.lr` 0 nothing moves
    return Numbers(c.lr, muon, balance, c.weight_decay, c.warmup, start, span, c.final)


def _constant(n: Numbers, t: Any) -> Any:
    return jnp.ones(())


def _linear(n: Numbers, t: Any) -> Any:
    return 1 - (1 - n.final) * jnp.clip(t / n.span, 0.0, 1.0)


def _cosine(n: Numbers, t: Any) -> Any:
    return n.final + (1 - n.final) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(t / n.span, 0.0, 1.0)))


def _inverse_sqrt(n: Numbers, t: Any) -> Any:
    """Decays as sqrt(w / (w + t)), which continues a warm-up of w steps (Vaswani et al. 2017)."""
    w = jnp.maximum(1, n.warmup)
    return jnp.sqrt(w / (w + t))


def _wsd(n: Numbers, t: Any) -> Any:
    """Stays, and decays linearly over the last share `decay` of all steps, or what the warm-up leaves of it (Hu et al.
    2024)."""
    return 1 - (1 - n.final) * jnp.clip((t - n.start + 1) / n.span, 0.0, 1.0)


SCHEDULES: Table[Callable[[Numbers, Any], Any]] = Table(
    "schedule",
    {"constant": _constant, "linear": _linear, "cosine": _cosine, "inverse_sqrt": _inverse_sqrt, "wsd": _wsd},
)
"""Maps a name to the function of the numbers and the updates since the warm-up that returns the share of the peak."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A Schedule is the function from the update t = 0, 1, …, steps - 1 to its learning rate: a linear warm-up, whose
    first step moves already, and what follows it."""

    after: Callable[[Numbers, Any], Any]
    numbers: Numbers

    def __call__(self, t: Any) -> Any:
        """Returns the learning rate of update t."""
        n = self.numbers
        after = self.after(n, jnp.maximum(t - n.warmup, 0))
        return n.peak * jnp.where(t < n.warmup, (t + 1) / (n.warmup + 1), after)

    def with_peak(self, peak: float) -> "Schedule":
        """Returns the schedule with another peak."""
        return Schedule(self.after, self.numbers._replace(peak=peak))


def schedule(c: config.Optim, steps: int, given: Numbers | None = None) -> Schedule:
    """Returns the learning rates of a run of so many updates, or those that the `given` numbers make of its
    schedule."""
    return Schedule(SCHEDULES.find(c.schedule, "optim.schedule"), numbers(c, steps) if given is None else given)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An Optimizer holds a run's optax chain, and what happens to each parameter."""

    tx: optax.GradientTransformation
    schedule: Schedule
    trainable: Callable[[str], bool]
    """Whether the parameter of a path is trained."""
    groups: dict[str, str]
    """Path of every parameter → what happens to it, such as `muon, decay 0.1` or `frozen`."""
    moved: Callable[[Any], Any] = lambda grads: grads
    """Gradients → the same with zeros for layers that stay as they are, which count in no norm."""


def make(
    c: config.Optim,
    steps: int,
    specs: Any,
    *,
    trainable: Callable[[str], bool] = lambda path: True,
    rate_of: Callable[[str], float] = lambda path: 1.0,
    scales: Scales = {},  # noqa: B006  # nothing changes it
    wrap: Callable[[optax.GradientTransformation, int], optax.GradientTransformation] = lambda tx, steps: tx,
    given: Numbers | None = None,
) -> Optimizer:
    """Returns the optimizer of a run for a spec tree. Raises ValueError for a pattern that matches no parameter.

    `trainable` says which of the weights that aren't frozen by name are trained; `rate_of` returns what a weight's
    learning rate is multiplied by; `wrap` gets the whole chain and the number of steps. `scales` are of a model whose
    settings come from one of another size; ValueError: it isn't known how those of the optimizer change. `given`: the
    numbers to use instead of those in the settings.
    """
    if scales and c.name not in SCALED:
        raise ValueError(
            f"optim.name: it isn't known how the rates of {c.name} change with the width, which transfer.method asks "
            f"for; choose {' or '.join(SCALED)}"
        )
    flat = tree.flatten(specs, is_spec)
    by_name = tree.matcher(c.freeze, flat, "optim.freeze")
    frozen = lambda path: by_name(path) or not trainable(path)  # noqa: E731
    without_decay = tree.matcher(c.no_decay, flat, "optim.no_decay")
    to_adamw = tree.matcher(c.adamw_paths, flat, "optim.adamw_paths")
    if all(frozen(p) for p in flat):
        raise ValueError("optim.freeze: every parameter is frozen; nothing would be trained")

    def decays(path: str) -> bool:
        return flat[path].is_matrix and not without_decay(path)

    def group(path: str) -> str:
        if flat[path].role == "selection_bias":
            return "balance"
        hidden = "layers" in flat[path].axes and flat[path].is_matrix and flat[path].role != "table"
        return "muon" if c.name == "muon" and hidden and not to_adamw(path) else "adamw" if c.name == "muon" else c.name

    rate = schedule(c, steps, given)
    OPTIMIZERS.find(c.name, "optim.name")
    labels = tree.map_named(lambda path, s: None if frozen(path) else group(path), specs)
    mask = tree.map_named(lambda path, s: None if frozen(path) else decays(path), specs)
    used = set(tree.flatten(labels).values())

    def chain(name: str) -> optax.GradientTransformation:
        if scales and name in SCALED:
            build, factor = SCALED[name]
            return build(c, rate, _mask_for(mask), specs, rate_scales.after(scales, factor))
        return (BY_ROLE.get(name) or OPTIMIZERS[name])(c, rate, _mask_for(mask), specs)

    chains = {name: chain(name) for name in sorted(used)}
    tx = chains[next(iter(used))] if len(used) == 1 else optax.partition(chains, labels)
    rates, moved = {path: rate_of(path) for path in flat}, lambda grads: grads
    if scales:
        tx, moved = optax.chain(rate_scales.before(scales), tx), rate_scales.unfolded(scales)
    if c.layer_decay != 1 or c.top_layers is not None or c.only_layers or set(rates.values()) != {1.0}:
        depths, _ = tree.partition(rate_scales.depth_scales(c, specs), lambda path: not frozen(path))
        shares = tree.map_named(lambda path, scale: scale * rates[path], depths)
        tx = optax.chain(tx, optax.stateless(lambda u, _: jax.tree.map(jnp.multiply, u, shares)))
        still = lambda g, x: g if np.all(x) else jnp.where(np.asarray(x) == 0, jnp.zeros((), g.dtype), g)  # noqa: E731
        of_size = moved
        moved = lambda grads: jax.tree.map(still, of_size(grads), shares)  # noqa: E731

    def described(path: str) -> str:
        if frozen(path):
            return "frozen"
        decay = f"decay {c.weight_decay:g}" if decays(path) and c.weight_decay else "no decay"
        factor = rate_scales.factor(scales, path, SCALED[name][1]) if (name := group(path)) in SCALED else 1.0
        return f"{name}, {decay}" + (f", rate × {factor:g}" if factor != 1 else "")

    groups = {path: described(path) for path in flat}
    return Optimizer(wrap(tx, steps), rate, lambda path: not frozen(path), groups, moved)


Scaled: TypeAlias = optax.GradientTransformation | None
"""What scales the direction of single weights; None: nothing."""


def _finish(c: config.Optim, rate: Schedule, decays: DecayMask, scaled: Scaled = None) -> optax.GradientTransformation:
    """Applies decoupled weight decay (Loshchilov & Hutter 2019), then the learning rate."""
    decay = optax.add_decayed_weights(rate.numbers.weight_decay, mask=decays) if c.weight_decay else optax.identity()
    first = () if scaled is None else (scaled,)
    return optax.chain(*first, decay, optax.scale_by_learning_rate(rate))


def _mask_for(mask: Any) -> DecayMask:
    """Returns the mask for whichever part of the tree a partition hands over: holes there are `MaskedNode`s."""

    def mask_of(params: Any) -> Any:
        hole = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
        return jax.tree.map(lambda p, m: p if hole(p) else m, params, mask, is_leaf=hole)

    return mask_of


def _adamw(
    c: config.Optim, rate: Schedule, decays: DecayMask, specs: Any, scaled: Scaled = None
) -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_adam(c.beta1, c.beta2, c.eps), _finish(c, rate, decays, scaled))


def _sgd(c: config.Optim, rate: Schedule, decays: DecayMask, specs: Any) -> optax.GradientTransformation:
    momentum = optax.trace(c.momentum) if c.momentum else optax.identity()
    return optax.chain(momentum, _finish(c, rate, decays))


def _lion(c: config.Optim, rate: Schedule, decays: DecayMask, specs: Any) -> optax.GradientTransformation:
    """Builds Lion (Chen et al. 2023), which wants a learning rate 3–10 × below AdamW's and a decay as much above."""
    return optax.chain(optax.scale_by_lion(c.beta1, c.beta2), _finish(c, rate, decays))


def _adafactor(c: config.Optim, rate: Schedule, decays: DecayMask, specs: Any) -> optax.GradientTransformation:
    """Builds Adafactor (Shazeer & Stern 2018): factored second moments, updates clipped to RMS 1 and scaled by each
    weight's own RMS."""
    return optax.chain(adafactor.chain(specs), _finish(c, rate, decays))


def matrix_dimensions(s: Spec) -> MuonDimensionNumbers:
    """Returns which dimensions of a stacked weight are its matrix's input and output; layers and experts are a
    batch."""
    dims = adafactor.own_axes(s)
    inputs = dims[:-1] if s.axes[dims[-1]] == "embed" else dims[:1]
    return MuonDimensionNumbers(tuple(inputs), tuple(i for i in dims if i not in inputs))


def _muon(
    c: config.Optim, rate: Schedule, decays: DecayMask, specs: Any, scaled: Scaled = None
) -> optax.GradientTransformation:
    """Builds Muon (Jordan 2024): momentum made orthogonal by Newton–Schulz, for hidden matrices only.

    The iteration is written on whole matrices, so the partitioner keeps it exact however they are sharded.
    """

    def numbers(params: Any) -> Any:
        hole = lambda x: x is None or isinstance(x, optax.MaskedNode)  # noqa: E731
        return jax.tree.map(lambda p, s: p if hole(p) else matrix_dimensions(s), params, specs, is_leaf=hole)

    def shape_scale(s: Spec) -> float:
        n = matrix_dimensions(s)
        rows, columns = (math.prod(s.shape[i] for i in dims) for dims in (n.output_axis, n.reduction_axis))
        return max(1.0, rows / columns) ** 0.5

    def rescale(updates: Any, params: Any = None) -> Any:
        hole = lambda x: x is None or isinstance(x, optax.MaskedNode)  # noqa: E731
        return jax.tree.map(lambda u, s: u if hole(u) else u * shape_scale(s), updates, specs, is_leaf=hole)

    return optax.chain(
        scale_by_muon(beta=c.muon_momentum, weight_dimension_numbers=numbers),
        optax.stateless(rescale),
        _finish(c, rate.with_peak(rate.numbers.muon_peak), decays, scaled),
    )


OPTIMIZERS: Table[Callable[[config.Optim, Schedule, DecayMask, Any], optax.GradientTransformation]] = Table(
    "optimizer", {"adamw": _adamw, "sgd": _sgd, "lion": _lion, "adafactor": _adafactor, "muon": _muon}
)
"""Maps a name to a function of the settings, the schedule, the mask of what is decayed (optax's `mask=`), and the specs
of all weights. It returns a whole optimizer: what it gives is added to the weights."""


SCALED: dict[str, tuple[Callable[..., optax.GradientTransformation], Callable[[Scale], float]]] = {
    "adamw": (_adamw, lambda s: s.adam),
    "muon": (_muon, lambda s: s.muon),
}
"""Optimizers whose rates are known for models of another size, and which factor of a `Scale` is theirs."""

BALANCE_RATE = 1e-3  # the size of a step at the peak of the schedule, which it follows


def _balance(c: config.Optim, rate: Schedule, decays: DecayMask, specs: Any) -> optax.GradientTransformation:
    """Takes steps of one size against an expert's load, for the biases that `moe.route` chooses by (DeepSeek V3,
    section 2.1.2).

    Their gradient is no gradient of the loss, and only its sign is read: neither its scale nor clipping counts.
    """
    return optax.chain(
        optax.stateless(lambda g, _: jax.tree.map(jnp.sign, g)),
        optax.scale_by_learning_rate(rate.with_peak(rate.numbers.balance_peak)),
    )


BY_ROLE = {"balance": _balance}  # for weights of a certain role, whatever `optim.name` is


def state_shardings(
    tx: optax.GradientTransformation, params: Any, shardings: Any, whole: Any, host: bool = False
) -> Any:
    """Returns where the optimizer's state lives: moments with their weights; counters and factored moments whole on
    every device.

    `params` are the abstract trainable weights, `shardings` theirs, `whole` the replicated sharding. With `host` all
    but the counters rest in the hosts' memory.
    """
    by_path = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(tree.flatten(params).items(), tree.flatten(shardings).values(), strict=True)
    }

    def place(key_path: tuple, leaf: Any) -> Any:
        # A moment sits in the optimizer's state under its weight's own path, whatever chains and groups surround it.
        name = "/".join(str(k.key) for k in key_path if isinstance(k, jax.tree_util.DictKey))
        of_suffixes = (weight for path, weight in by_path.items() if name.endswith("/" + path))
        shape, sharding = by_path.get(name) or next(of_suffixes, (None, whole))
        placed = sharding if leaf.shape == shape else whole
        return placed.with_memory_kind("pinned_host") if host and leaf.ndim else placed

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))
