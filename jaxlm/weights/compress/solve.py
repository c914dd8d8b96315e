"""Makes all layers of a weight small at once: a table of methods by their settings, and the function around them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.compression import Awq, Gptq, Magnitude, Nearest, Smooth, SparseGpt, Svd, Wanda
from jaxlm.weights.compress import low_rank, pruning, rounding
from jaxlm.weights.compress.solution import Solution
from jaxlm.weights.compress.statistics import Statistics

SOLVERS: dict[type, Callable[..., Solution]] = {
    Nearest: rounding.nearest,
    Gptq: rounding.gptq,
    Awq: rounding.awq,
    Smooth: rounding.smooth,
    Magnitude: pruning.magnitude,
    Wanda: pruning.wanda,
    SparseGpt: pruning.sparse_gpt,
    Svd: low_rank.svd,
}
FACTORS: dict[type, Callable[..., jax.Array]] = {Awq: rounding.awq_factors, Smooth: rounding.smooth_factors}
"""How solvers that multiply the rows of a matrix before rounding find the factors."""
NEED_NOTHING = (Nearest, Magnitude)


def solve(c: Any, w: jax.Array, ins: int, outs: int, statistics: Statistics | None = None) -> Solution:
    """Returns a weight `[*lead, *ins, *outs]` made small by the method whose settings are `c`, with the record of its
    inputs, which has the same leading dimensions (layers, experts).

    `ins` and `outs` count its dimensions of inputs and of outputs. Without a record, for methods that need none, errors
    are as if inputs were uncorrelated and of mean square 1. It is a pure function, to be called within `jit`. Raises
    ValueError for settings that don't fit the weight or the record.
    """
    lead, shape = w.shape[: w.ndim - ins - outs], w.shape[w.ndim - ins - outs :]
    inputs, made = math.prod(shape[:ins]), type(c).__name__
    if statistics is None:
        if not isinstance(c, NEED_NOTHING):
            raise ValueError(f"statistics: {made} needs the record of a weight's inputs; calibrate first")
        ones = jnp.ones((*lead, inputs), jnp.float32)
        statistics = Statistics(jnp.ones(lead, jnp.float32), ones, ones, ones, None)
    if statistics.mean_square.shape != (*lead, inputs):
        raise ValueError(
            f"statistics: of inputs {statistics.mean_square.shape}, but the weight's are {(*lead, inputs)}"
        )

    def one(w: jax.Array, s: Statistics) -> Solution:
        return SOLVERS[type(c)](c, w, s, shape[:ins], shape[ins:])

    matrix = w.astype(jnp.float32).reshape(*lead, inputs, -1)
    for _ in lead:
        one = jax.vmap(one)
    return one(matrix, statistics)


def shared_factors(cs: Sequence[Any], ws: Sequence[jax.Array], statistics: Statistics) -> jax.Array:
    """Returns what the rows of weights `[*ins, *outs]` that read the same inputs are multiplied by before rounding,
    `[I]`, and the inputs divided by; `cs` are settings of one method, of each weight its own. No leading dimensions."""
    inputs = statistics.mean_square.shape[0]
    return FACTORS[type(cs[0])](cs, [w.astype(jnp.float32).reshape(inputs, -1) for w in ws], statistics)


def solve_multiplied(c: Any, w: jax.Array, ins: int, statistics: Statistics, factors: jax.Array) -> Solution:
    """Returns a weight `[*ins, *outs]` whose rows were multiplied by factors `[I]` and rounded, with the record of its
    inputs before they are divided by these."""
    matrix = w.astype(jnp.float32).reshape(factors.shape[0], -1)
    return rounding.multiplied(c, matrix, statistics, w.shape[:ins], w.shape[ins:], factors)
