"""How much each weight matters to what was learned: sums over examples of a function of each one's gradient.

The square of a batch's mean gradient is no estimate of the Fisher information: it shrinks as the batch grows. Here each
row has a gradient of its own, so that the batch size changes nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

RowLoss = Callable[[Any, Any], jax.Array]
"""(weights, a batch of one row) → the quantity whose gradient is taken."""


def over_rows(loss: RowLoss, each: Callable[[jax.Array], jax.Array], weights: Any, batch: Any, present_B: Any) -> Any:
    """Returns Σ over rows of `each`(gradient of the row's loss), a tree like `weights`, in float32.

    batch: leaves `[B, …]`. present_B: 1 where there is a row, 0 where there is padding. One gradient exists at a time.
    """

    def add(total: Any, x: tuple[Any, jax.Array]) -> tuple[Any, None]:
        row, present = x
        gradient = jax.grad(loss)(weights, jax.tree.map(lambda leaf: leaf[None], row))
        return jax.tree.map(lambda t, g: t + present * each(g.astype(jnp.float32)), total, gradient), None

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    return jax.lax.scan(add, zeros, (batch, present_B))[0]


def mean_over(sums: Callable[[Any, Any], tuple[Any, jax.Array]], weights: Any, batches: Iterable[Any]) -> Any:
    """Returns the mean over all rows of all batches. `sums(weights, batch)` gives a batch's sum and its number of rows.
    ValueError: there is no row."""
    total, rows = None, 0.0
    for batch in batches:
        part, n = sums(weights, batch)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        rows += float(n)
    if total is None or not rows:
        raise ValueError(
            "continual: the earlier data has no rows to estimate importances on; name some in continual.old"
        )
    return jax.tree.map(lambda x: x / rows, total)
