"""Makes all layers of a weight small at once: a table of methods by their settings, and the function around them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.compression import Awq, Gptq, Magnitude, Nearest, Smooth, SparseGpt, Wanda
from jaxlm.weights.compress import pruning, rounding
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
}
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
