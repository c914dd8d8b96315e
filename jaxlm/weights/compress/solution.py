"""Declares what a solver returns: the weight as it is from now on, and how far its outputs moved."""

from typing import Any

import jax
from flax import struct

from jaxlm.weights.compress.statistics import Statistics


class Solution(struct.PyTreeNode):
    """A Solution holds a weight made small. Errors are mean squares over tokens, summed over outputs."""

    weight: Any
    """The leaf; of pruning the array with its zeros."""
    mask: jax.Array | None
    """Which numbers stay, of pruning; None: all."""
    error: jax.Array
    """The error of the outputs on the inputs that were recorded."""
    plain_error: jax.Array
    """That of rounding to the nearest, of pruning by magnitude, or of the nearest factors whatever the inputs are: the
    plain method of the same size."""
    power: jax.Array
    """The mean square of the outputs themselves."""
    damp: jax.Array | None = None
    """The damp of the Hessian that was used, which may be more than was asked for."""


def measured(statistics: Statistics, w: jax.Array, made: jax.Array, plain: jax.Array) -> dict[str, jax.Array]:
    """Returns the errors of a solution for a matrix `[I, O]`, with those of the plain method."""
    return dict(
        error=statistics.error(made - w).sum(),
        plain_error=statistics.error(plain - w).sum(),
        power=statistics.error(w).sum(),
    )
