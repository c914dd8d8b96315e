"""Gives every task weights of its own that no later one moves: PackNet (Mallya & Lazebnik 2018, arXiv:1711.05769).

In a task's training, of the weights of each matrix that no earlier task owns, those with the smallest magnitudes become
zero and stay so; the task owns the others, and the zeros are free for the next one. Vectors belong to the first task
that trains them. Which weights are zero is found by counting alone, so that it is exact and the same on any mesh.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import tree
from jaxlm.core.continual import PackNet

LEAST = 0.01  # the share of free weights below which there is nothing left to learn with
BITS = 31  # of a magnitude, or of a place in a matrix, as a number that isn't negative
SHARES = 15  # bits of the share that is kept, so that products of it and counts fit 32 bits


class Plan(NamedTuple):
    """A plan says what a task prunes and when."""

    axes: Callable[[str], tuple[int, ...] | None]
    """(path of a weight) → the dimensions of one matrix, of which an array may hold several; None: it is a vector."""
    keep: float
    at: int
    """The number of updates after which it is pruned."""


def share(c: PackNet, number: int) -> float:
    """Returns the share of the free weights that task `number` (1, 2, …) keeps. ValueError: all are given away."""
    if not c.tasks:
        return c.keep
    if number > c.tasks:
        raise ValueError(
            f"continual.packnet.tasks: {c.tasks} tasks share the weights and this is task {number}; start anew with "
            "a larger number"
        )
    return 1 / (c.tasks - number + 1)


def last_dense_step(c: PackNet, steps: int) -> int:
    """Returns the number of updates after which a run prunes."""
    return min(steps, max(1, round((1 - c.retrain) * steps)))


def nothing_pruned(weights: Any) -> Any:
    """Returns the mask of pruned weights before any is."""
    return jax.tree.map(lambda w: jnp.zeros(w.shape, bool), weights)


def movable(pruned: Any, owner: Any = None) -> Any:
    """Returns which weights training moves: those that aren't pruned and that no earlier task owns (`owner` 0)."""
    if owner is None:
        return jax.tree.map(jnp.logical_not, pruned)
    return jax.tree.map(lambda p, o: ~p & (o == 0), pruned, owner)


def masked(gradient: Any, pruned: Any, owner: Any = None) -> Any:
    """Returns the gradient with zeros where weights don't move, so that they count in no norm."""
    return jax.tree.map(lambda g, free: jnp.where(free, g, jnp.zeros((), g.dtype)), gradient, movable(pruned, owner))


def settled(plan: Plan, step: jax.Array, old: Any, new: Any, pruned: Any, owner: Any = None) -> tuple[Any, Any]:
    """Returns the weights after update `step` (1, 2, …) and the mask of pruned ones.

    What an optimizer makes of a gradient of zero doesn't matter: owned weights are put back bit for bit, and pruned
    ones are zero. A run that is given more steps isn't pruned twice.
    """

    def prune() -> Any:
        done = jnp.stack([p.any() for p in jax.tree.leaves(pruned)]).any()
        found = smallest(plan, new, movable(pruned, owner))
        return jax.tree.map(lambda before, now: jnp.where(done, before, now), pruned, found)

    pruned = jax.lax.cond(step == plan.at, prune, lambda: pruned)
    return within(new, old, pruned, owner), pruned


def within(new: Any, old: Any, pruned: Any, owner: Any = None) -> Any:
    """Returns the weights `new` with zeros where they are pruned, and with `old` where a task owns them."""
    zeroed = jax.tree.map(lambda n, p: jnp.where(p, jnp.zeros((), n.dtype), n), new, pruned)
    return zeroed if owner is None else jax.tree.map(lambda n, x, o: jnp.where(o == 0, n, x), zeroed, old, owner)


def kept(n: jax.Array, keep: float) -> jax.Array:
    """Returns how many of `n` weights (int32) are kept: the nearest whole number, but at least one of any."""
    k, low = round(keep * (1 << SHARES)), n & ((1 << SHARES) - 1)
    nearest = (n >> SHARES) * k + ((low * k + (1 << (SHARES - 1))) >> SHARES)
    return jnp.maximum(nearest, jnp.minimum(n, 1))


def smallest(plan: Plan, weights: Any, free: Any) -> Any:
    """Returns the mask of the free weights of each matrix that aren't kept, those of the smallest magnitude; of equal
    ones those that stand first."""
    chosen = {path: axes for path in tree.flatten(weights) if (axes := plan.axes(path)) is not None}
    flat_w, flat_free = tree.flatten(weights), tree.flatten(free)
    keys, places, counts = {}, {}, {}
    for path, axes in chosen.items():
        w, is_free = flat_w[path], flat_free[path]
        bits = jax.lax.bitcast_convert_type(jnp.abs(w.astype(jnp.float32)), jnp.int32)
        keys[path] = jnp.where(is_free, bits, jnp.iinfo(jnp.int32).max)
        places[path] = _places(w.shape, axes)
        n = is_free.sum(axes, dtype=jnp.int32, keepdims=True)
        counts[path] = n - kept(n, plan.keep)

    def below(path: str, bound: jax.Array) -> jax.Array:
        return (keys[path] < bound).sum(chosen[path], dtype=jnp.int32, keepdims=True)

    limits = _last_below(below, counts)
    needed = {path: counts[path] - below(path, limit) for path, limit in limits.items()}

    def equal_before(path: str, place: jax.Array) -> jax.Array:
        equal = (keys[path] == limits[path]) & (places[path] < place)
        return equal.sum(chosen[path], dtype=jnp.int32, keepdims=True)

    ends = _last_below(equal_before, needed)

    def one(path: str, w: jax.Array) -> jax.Array:
        if path not in chosen:
            return jnp.zeros(w.shape, bool)
        equal = (keys[path] == limits[path]) & (places[path] <= ends[path]) & (needed[path] > 0)
        return (keys[path] < limits[path]) | equal

    return tree.map_named(one, weights)


def _last_below(count: Callable[[str, jax.Array], jax.Array], wanted: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns for each path the largest number v with `count(path, v)` < wanted, bit by bit: that of rank `wanted` of
    what is counted, from 1."""

    def bit(i: jax.Array, found: dict[str, jax.Array]) -> dict[str, jax.Array]:
        tried = {path: v | jnp.left_shift(jnp.int32(1), BITS - 1 - i) for path, v in found.items()}
        return {path: jnp.where(count(path, tried[path]) < wanted[path], tried[path], v) for path, v in found.items()}

    return jax.lax.fori_loop(0, BITS, bit, jax.tree.map(jnp.zeros_like, wanted))


def _places(shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """Returns the place of each number in its own matrix."""
    place, stride = jnp.zeros(shape, jnp.int32), 1
    for axis in reversed(axes):
        place += stride * jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        stride *= shape[axis]
    return place


def for_task(weights: Any, owner: Any, number: int) -> Any:
    """Returns the weights as task `number` left them: those that later tasks own, or nobody does, are zero. Weights
    without an owner's number (None) stay."""
    hole = lambda x: x is None  # noqa: E731
    return jax.tree.map(
        lambda w, o: w if o is None else jnp.where((o > 0) & (o <= number), w, jnp.zeros((), w.dtype)),
        weights, owner, is_leaf=hole,
    )  # fmt: skip
