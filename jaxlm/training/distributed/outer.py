"""Moves the global weights to where the workers went: the outer optimizers.

Deltas are global weights minus workers' weights, so that they are taken as gradients (Douillard et al. 2023, DiLoCo).
Everything is float32, whatever the weights of the workers are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.core.distributed import Outer


class DelayedState(NamedTuple):
    """A DelayedState is the state of `delayed_nesterov`."""

    updates: jax.Array
    """How many were made, int32."""
    buffer: Any
    """The sum of the deltas since momentum was last renewed."""
    trace: Any


def delayed_nesterov(momentum: float, delay: int) -> optax.GradientTransformation:
    """Returns Nesterov momentum for deltas that come one at a time (Liu et al. 2024, algorithm 3): each is applied at
    once by 1/`delay`, and every `delay`th update renews the momentum by the mean of the last ones and applies it. So
    many updates together are one Nesterov step on the mean of their deltas."""

    def init(params: Any) -> DelayedState:
        return DelayedState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(deltas: Any, state: DelayedState, params: Any = None) -> tuple[Any, DelayedState]:
        count = state.updates + 1
        renews = count % delay == 0
        buffer = jax.tree.map(jnp.add, state.buffer, deltas)
        trace = jax.tree.map(lambda m, b: jnp.where(renews, momentum * m + b / delay, m), state.trace, buffer)
        out = jax.tree.map(lambda d, m: d / delay + jnp.where(renews, momentum * m, 0.0), deltas, trace)
        return out, DelayedState(count, jax.tree.map(lambda b: jnp.where(renews, 0.0, b), buffer), trace)

    return optax.GradientTransformation(init, update)


def transformation(c: Outer) -> optax.GradientTransformation:
    """Returns what an outer optimizer makes of deltas, before they are scaled by its learning rate."""
    if c.name == "average" or (c.name in ("sgd", "nesterov") and not c.momentum):
        return optax.identity()
    if c.name == "adam":
        return optax.scale_by_adam(b1=c.momentum, b2=c.beta2, eps=c.eps)
    if c.name == "delayed_nesterov":
        return delayed_nesterov(c.momentum, c.delay)
    return optax.trace(c.momentum, nesterov=c.name == "nesterov")


def init(c: Outer, params: Any) -> Any:
    """Returns the outer optimizer's state before its first update of the global weights."""
    return transformation(c).init(params)


def update(c: Outer, params: Any, state: Any, target: Any) -> tuple[Any, Any]:
    """Makes one update of the global weights towards `target`, the mean of the workers' weights; returns weights and
    state.

    Without momentum the update is an interpolation, so that a rate of 1 gives `target` to the bit.
    """
    rate = 1.0 if c.name == "average" else c.lr
    tx = transformation(c)
    if isinstance(state, optax.EmptyState):
        return jax.tree.map(lambda g, t: (1 - rate) * g + rate * t, params, target), state
    deltas, state = tx.update(jax.tree.map(jnp.subtract, params, target), state, params)
    return jax.tree.map(lambda g, d: g - rate * d, params, deltas), state


def staleness_weight(versions: jax.Array | float, power: float) -> jax.Array | float:
    """Returns the weight of a push that started so many versions ago: 1 / (1 + s)^p (Xie et al. 2019, FedAsync)."""
    return (1.0 + versions) ** -power


def local_steps(speeds: dict[str, float], most: int) -> dict[str, int]:
    """Returns how many local steps each worker makes, in proportion to its steps a second, at least one and at most
    `most`, which the fastest makes (dynamic local updates, Liu et al. 2024)."""
    fastest = max(speeds.values(), default=0.0)
    return {name: max(1, int(most * speed / fastest)) if fastest else most for name, speed in speeds.items()}
