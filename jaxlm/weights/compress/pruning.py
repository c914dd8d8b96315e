"""Solvers that prune are pure functions of a matrix `[I, O]` and the record of its inputs: by magnitude, Wanda and
SparseGPT, each to a share of zeros or to so many of every few inputs. I inputs, O outputs."""

import jax
import jax.numpy as jnp

from jaxlm.core.compression import Magnitude, SparseGpt, Sparsity, Wanda
from jaxlm.weights.compress.hessian import inverse_factor, prepared, sweep
from jaxlm.weights.compress.solution import Solution, measured
from jaxlm.weights.compress.statistics import Statistics

Dims = tuple[int, ...]


def checked(c: Sparsity, inputs: int) -> None:
    """Refuses a sparsity that a weight of so many inputs can't have."""
    c.check()
    if c.of and inputs % c.of:
        raise ValueError(f"kept: {c.kept} of {c.of} doesn't fit a weight of {inputs} inputs; {c.of} must divide them")


def _ranks(score: jax.Array, axis: int) -> jax.Array:
    """Returns how many scores come before each, the least first, of equal ones the earlier."""
    return jnp.argsort(jnp.argsort(score, axis, stable=True), axis, stable=True)


def pattern(c: Sparsity, score: jax.Array) -> jax.Array:
    """Returns which numbers `[I, O]` stay: of every `of` inputs of an output the `kept` with the largest scores."""
    ranks = _ranks(score.reshape(-1, c.of, score.shape[1]), 1)
    return (ranks >= c.of - c.kept).reshape(score.shape)


def among_all(share: float, score: jax.Array) -> jax.Array:
    """Returns which numbers `[I, O]` stay, with the share of them that have the least scores gone."""
    order = jnp.argsort(score.reshape(-1), stable=True)
    kept = jnp.ones(score.size, bool).at[order[: int(score.size * share)]].set(False)
    return kept.reshape(score.shape)


def by_output(share: float, score: jax.Array) -> jax.Array:
    """Returns which numbers `[I, O]` stay, with the share of each output's that have the least scores gone."""
    return _ranks(score, 0) >= int(score.shape[0] * share)


def magnitude_mask(c: Sparsity, w: jax.Array) -> jax.Array:
    """Returns which numbers of a matrix stay by their magnitudes."""
    return pattern(c, jnp.abs(w)) if c.of else among_all(c.share, jnp.abs(w))


def _solution(
    s: Statistics, w: jax.Array, made: jax.Array, mask: jax.Array, plain: jax.Array, ins: Dims, outs: Dims
) -> Solution:
    shape = (*ins, *outs)
    return Solution(made.reshape(shape), mask.reshape(shape), **measured(s, w, made, plain))


def magnitude(c: Magnitude, w: jax.Array, s: Statistics, ins: Dims, outs: Dims) -> Solution:
    """Sets the least numbers of the matrix to zero."""
    checked(c.sparsity, w.shape[0])
    mask = magnitude_mask(c.sparsity, w)
    made = jnp.where(mask, w, 0)
    return _solution(s, w, made, mask, made, ins, outs)


def wanda(c: Wanda, w: jax.Array, s: Statistics, ins: Dims, outs: Dims) -> Solution:
    """Sets numbers to zero, of each output those whose magnitude times the root of their input's mean square is least
    (Sun et al. 2024)."""
    checked(c.sparsity, w.shape[0])
    score = jnp.abs(w) * jnp.sqrt(s.mean_square)[:, None]
    mask = pattern(c.sparsity, score) if c.sparsity.of else by_output(c.sparsity.share, score)
    plain = jnp.where(magnitude_mask(c.sparsity, w), w, 0)
    return _solution(s, w, jnp.where(mask, w, 0), mask, plain, ins, outs)


def sparse_gpt(c: SparseGpt, w: jax.Array, s: Statistics, ins: Dims, outs: Dims) -> Solution:
    """Sets numbers to zero input by input, where the error that the later inputs can't make up for is least, and moves
    those against it (Frantar and Alistarh 2023).

    What magnitude alone would do better on the recorded inputs it does: of a pattern for single outputs, of a share for
    the whole matrix. Raises ValueError without a Hessian.
    """
    checked(c.sparsity, w.shape[0])
    of, n = c.sparsity.of, w.shape[0]
    hessian, dead = prepared(s.needed_hessian())
    factor, damp = inverse_factor(hessian, c.damp)
    block = -(-min(c.block, n) // of) * of if of else min(c.block, n)
    sizes = [min(block, n - first) for first in range(0, n, block)]
    gone = jnp.asarray([int(size * w.shape[1] * c.sparsity.share) for size in sizes], jnp.int32)

    def scores(rows: jax.Array, factor: jax.Array) -> jax.Array:
        return jnp.square(rows / jnp.diagonal(factor)[:, None])

    def start(rows: jax.Array, factor: jax.Array, of_block: tuple[jax.Array, jax.Array]) -> jax.Array:
        if of:
            return jnp.ones(rows.shape, bool)
        size, gone = of_block
        score = jnp.where(jnp.arange(block)[:, None] < size, scores(rows, factor), jnp.inf)
        return (_ranks(score.reshape(-1), 0) >= gone).reshape(rows.shape)

    def choose(mask: jax.Array, i: jax.Array, rows: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
        if of:  # a pattern's mask is that of its inputs as they are when its first comes
            first = i - i % of
            zero = jnp.zeros_like(first)
            now = jax.lax.dynamic_slice(scores(rows, factor), (first, zero), (of, rows.shape[1]))
            chosen = jax.lax.dynamic_update_slice(mask, pattern(c.sparsity, now), (first, zero))
            mask = jnp.where(i % of == 0, chosen, mask)
        return mask, jnp.where(mask[i], rows[i], 0)

    made, masks = sweep(
        jnp.where(dead[:, None], 0, w), factor, block, start, choose, (jnp.asarray(sizes, jnp.int32), gone)
    )
    mask, plain_mask = masks.reshape(-1, w.shape[1])[:n], magnitude_mask(c.sparsity, w)
    plain = jnp.where(plain_mask, w, 0)
    ours, theirs = s.error(made - w), s.error(plain - w)
    better = (ours <= theirs)[None] if of else (ours.sum() <= theirs.sum())[None, None]
    made, mask = jnp.where(better, made, plain), jnp.where(better, mask, plain_mask)
    return _solution(s, w, made, mask, plain, ins, outs).replace(damp=damp)
