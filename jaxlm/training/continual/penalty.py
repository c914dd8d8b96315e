"""Computes quadratic penalties: λ/2 · Σ Ω (θ − θ*)² with importances Ω and anchors θ*.

The penalties of several tasks are one: Σᵢ Ωᵢ (θ − θᵢ)² = Ω (θ − θ*)² + constant, with Ω = Σᵢ Ωᵢ and θ* the mean of the
anchors weighted by Ωᵢ. So any number of tasks needs two trees.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Quadratic(NamedTuple):
    """A quadratic is a penalty without its strength; both are trees of the penalised weights, in float32."""

    importance: Any
    anchor: Any


def value(q: Quadratic, weights: Any) -> jax.Array:
    """Returns ½ Σ Ω (θ − θ*)². Weights that `q` has no importance of (None) add nothing."""
    hole = lambda x: x is None  # noqa: E731
    terms = jax.tree.map(
        lambda o, a, w: None if o is None or w is None else (o * jnp.square(w.astype(jnp.float32) - a)).sum(),
        q.importance, q.anchor, weights, is_leaf=hole,
    )  # fmt: skip
    return 0.5 * sum(jax.tree.leaves(terms), jnp.zeros((), jnp.float32))


def joined(before: Quadratic | None, importance: Any, weights: Any, decay: float = 1.0) -> Quadratic:
    """Returns the penalty of the earlier tasks and of one more, whose weights after training are `weights`.

    `decay`: what the earlier importances are multiplied by.
    """
    if before is None:
        return Quadratic(importance, jax.tree.map(lambda w: w.astype(jnp.float32), weights))

    def one(o: Any, a: Any, new: Any, w: Any) -> tuple[jax.Array, jax.Array]:
        o, w = decay * o, w.astype(jnp.float32)
        total = o + new
        # Where nothing is important yet the anchor doesn't count; the newest one is kept.
        share = jnp.where(total > 0, new / jnp.where(total > 0, total, 1.0), 1.0)
        return total, a + share * (w - a)

    both = jax.tree.map(one, before.importance, before.anchor, importance, weights)
    is_pair = lambda x: isinstance(x, tuple)  # noqa: E731
    return Quadratic(*(jax.tree.map(lambda pair, i=i: pair[i], both, is_leaf=is_pair) for i in (0, 1)))
