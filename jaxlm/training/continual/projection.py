"""Changes gradients so that they oppose no earlier task's: A-GEM and GEM.

Both change the update's gradient g as little as they can so that g · gₜ ≥ 0 for reference gradients gₜ on earlier rows.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

SWEEPS = 256  # of coordinate descent on a problem with one variable a task
RIDGE = 1e-6  # added to the diagonal, as a share of its mean: references may be parallel


def dot(a: Any, b: Any) -> jax.Array:
    """Returns the inner product of two trees, in float32."""
    products = jax.tree.map(lambda x, y: (x.astype(jnp.float32) * y.astype(jnp.float32)).sum(), a, b)
    return sum(jax.tree.leaves(products), jnp.zeros((), jnp.float32))


def agem(gradient: Any, reference: Any) -> Any:
    """Returns the gradient without its part against the reference (Chaudhry et al. 2019), or as it is if it has
    none."""
    against, size = dot(gradient, reference), dot(reference, reference)
    scale = jnp.where((against < 0) & (size > 0), against / jnp.where(size > 0, size, 1.0), 0.0)
    return jax.tree.map(lambda g, r: g - scale * r, gradient, reference)


def gem(gradient: Any, references: Sequence[Any], margin: float = 0.0) -> Any:
    """Returns the nearest gradient that opposes none of the references (Lopez-Paz & Ranzato 2017, equations 8 to 11).

    With none of them opposed the gradient is returned as it is, whatever the margin.
    """
    P_TT = jnp.stack([jnp.stack([dot(a, b) for b in references]) for a in references])
    q_T = jnp.stack([dot(a, gradient) for a in references])
    v_T = dual(P_TT, q_T, margin)
    v_T = jnp.where((q_T < 0).any(), v_T, 0.0)
    return jax.tree.map(lambda g, *r: g + sum(v * x for v, x in zip(v_T, r, strict=True)), gradient, *references)


def dual(P_TT: jax.Array, q_T: jax.Array, margin: float) -> jax.Array:
    """Returns the v that minimises ½ vᵀ P v + qᵀ v over v ≥ margin, by coordinate descent, which is exact in each
    coordinate and converges for a positive definite P."""
    T = q_T.shape[0]
    P_TT = P_TT + RIDGE * jnp.maximum(jnp.trace(P_TT) / T, 1e-30) * jnp.eye(T)

    def coordinate(i: jax.Array, v_T: jax.Array) -> jax.Array:
        rest = P_TT[i] @ v_T - P_TT[i, i] * v_T[i]
        return v_T.at[i].set(jnp.maximum(margin, -(q_T[i] + rest) / P_TT[i, i]))

    sweep = lambda _, v_T: jax.lax.fori_loop(0, T, coordinate, v_T)  # noqa: E731
    return jax.lax.fori_loop(0, SWEEPS, sweep, jnp.full((T,), margin, jnp.float32))
