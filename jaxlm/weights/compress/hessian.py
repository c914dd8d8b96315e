"""Computes what GPTQ and SparseGPT share: the factor of the inverse Hessian, and the sweep over inputs in which later
ones make up for the errors of earlier ones (optimal brain surgeon, in the order and blocks of Frantar et al. 2023).

I inputs, O outputs, B inputs of a block. Everything is float32 and multiplied at full precision on any device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.weights.compress.statistics import HIGHEST

Choose = Callable[[Any, Any, jax.Array, jax.Array], tuple[Any, jax.Array]]
"""(state, i, rows `[B, O]` as they are by now, factor `[B, B]`) → (state, the numbers `[O]` that row `i` becomes)."""


def prepared(hessian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a Hessian `[I, I]` in which inputs that were always zero have the mean square, and which they are."""
    squares = jnp.diagonal(hessian)
    dead = squares <= 0
    mean = squares.sum() / jnp.maximum((~dead).sum(), 1)
    mean = jnp.where(mean > 0, mean, 1)
    return hessian + jnp.diag(jnp.where(dead, mean, 0)), dead


def inverse_factor(hessian: jax.Array, damp: float) -> tuple[jax.Array, jax.Array]:
    """Returns the upper triangular U with UᵀU = (H + damp · mean(diag H) · 1)⁻¹, and the damp that was used: ten times
    more, and again, where float32 couldn't tell the least pivot with less. It is NaN if H is."""
    n = hessian.shape[0]
    mean = jnp.diagonal(hessian).mean()

    def attempt(damp: jax.Array) -> jax.Array:
        # H = R Rᵀ with R upper triangular, from the Cholesky factor of H read backwards; then U = R⁻¹.
        damped = hessian + damp * mean * jnp.eye(n, dtype=hessian.dtype)
        upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        return jax.scipy.linalg.solve_triangular(upper, jnp.eye(n, dtype=hessian.dtype), lower=False)

    def failed(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        # No pivot of a damped H, 1 / U[i, i]², is below what was added: one that is has been rounded. NaN fails too.
        told = (jnp.square(jnp.diagonal(state[0])) * state[1] * mean < 1.1).all()
        return ~told & (state[2] < 8)

    def again(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        return attempt(state[1] * 10), state[1] * 10, state[2] + 1

    first = jnp.asarray(damp, hessian.dtype)
    factor, used, _ = jax.lax.while_loop(failed, again, (attempt(first), first, jnp.zeros((), jnp.int32)))
    return factor, used


def sweep(
    w: jax.Array,
    factor: jax.Array,
    block: int,
    start: Callable[[jax.Array, jax.Array, Any], Any],
    choose: Choose,
    extra: Any = (),
) -> tuple[jax.Array, Any]:
    """Returns the numbers `[I, O]` that the rows of `w` become, one after another, and the last state of each block.

    After each row the error goes to all later rows, by `factor`, which `inverse_factor` made; rows outside of a block
    get those of the whole block in one product. `start(rows, factor, extra)` makes a block's state, with the part of
    `extra`, arrays of one entry a block.
    """
    n, outs = w.shape
    blocks, pad = -(-n // block), -n % block
    w = jnp.pad(w, ((0, pad), (0, 0)))
    ones = jnp.diag(jnp.concatenate([jnp.zeros(n, w.dtype), jnp.ones(pad, w.dtype)]))
    factor = jnp.pad(factor, ((0, pad), (0, pad))) + ones
    at = jnp.arange(n + pad)

    def one(w: jax.Array, of_block: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        first, across, extra = of_block
        inside = jax.lax.dynamic_slice(across, (jnp.zeros_like(first), first), (block, block))
        rows = jax.lax.dynamic_slice(w, (first, jnp.zeros_like(first)), (block, outs))

        def row(i: jax.Array, carry: Any) -> Any:
            rows, made, errors, state = carry
            state, new = choose(state, i, rows, inside)
            error = (rows[i] - new) / inside[i, i]
            rows = rows - inside[i][:, None] * error[None]  # the factor is upper triangular: earlier rows stay
            return rows, made.at[i].set(new), errors.at[i].set(error), state

        carry = (rows, jnp.zeros_like(rows), jnp.zeros_like(rows), start(rows, inside, extra))
        _, made, errors, state = jax.lax.fori_loop(0, block, row, carry)
        later = jnp.where((at >= first + block)[None], across, 0)
        return w - jnp.dot(later.T, errors, precision=HIGHEST), (made, state)

    firsts = jnp.arange(blocks, dtype=jnp.int32) * block
    _, (made, states) = jax.lax.scan(one, w, (firsts, factor.reshape(blocks, block, n + pad), extra))
    return made.reshape(n + pad, outs)[:n], states
