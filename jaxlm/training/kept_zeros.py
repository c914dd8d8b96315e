"""Keeps the zeros of pruned weights while these are trained."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.core import tree


def keep_zeros(tx: optax.GradientTransformation, paths: Collection[str]) -> optax.GradientTransformation:
    """Returns the optimizer that leaves each number at zero which is zero, in the weights of these paths.

    Its gradient is zero for whatever the optimizer makes of a whole matrix, and so is its update, decay included; the
    state is that of `tx`. No mask is stored: the weights are the mask.
    """

    def masked(updates: Any, params: Any) -> Any:
        def one(path: str, u: jax.Array) -> jax.Array:
            return jnp.where(tree.at(params, path) == 0, jnp.zeros((), u.dtype), u) if path in paths else u

        return tree.map_named(one, updates)

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
        assert params is not None
        updates, state = optax.with_extra_args_support(tx).update(masked(updates, params), state, params, **more)
        return masked(updates, params), state

    return optax.GradientTransformationExtraArgs(tx.init, update)
