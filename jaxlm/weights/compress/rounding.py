"""Solvers that round are pure functions of a matrix `[I, O]`, as our products multiply it, and the record of its
inputs: to the nearest, GPTQ, AWQ and SmoothQuant. I inputs, O outputs.

AWQ and SmoothQuant are a search for factors of the rows, shared by all matrices that read the same inputs, and rounding
to the nearest. What makes the inputs is divided by the factors, or a leaf divides them each time (`Scaled`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlm.core.compression import Awq, Gptq, Nearest, Smooth
from jaxlm.nn.leaf import Leaf, dense
from jaxlm.weights.compress import formats
from jaxlm.weights.compress.formats import Grid
from jaxlm.weights.compress.hessian import inverse_factor, prepared, sweep
from jaxlm.weights.compress.solution import Solution, measured
from jaxlm.weights.compress.statistics import Statistics
from jaxlm.weights.few_bits import Scaled

BLOCK = 128  # inputs of a block, where groups don't say it
Dims = tuple[int, ...]


def _solution(
    s: Statistics, w: jax.Array, leaf: Leaf, plain: jax.Array | None = None, damp: jax.Array | None = None
) -> Solution:
    made = dense(leaf).reshape(w.shape)
    return Solution(leaf, None, damp=damp, **measured(s, w, made, made if plain is None else plain))


def nearest(c: Nearest, w: jax.Array, s: Statistics, ins: Dims, outs: Dims) -> Solution:
    """Rounds each number to the nearest that the format has."""
    return _solution(s, w, formats.nearest(c.format, w, ins, outs))


def gptq(c: Gptq, w: jax.Array, s: Statistics, ins: Dims, outs: Dims) -> Solution:
    """Rounds inputs one after another, and moves the later ones against the error (Frantar et al. 2023).

    An output for which rounding to the nearest is nearer on the recorded inputs keeps that. Raises ValueError without a
    Hessian, and for NF4.
    """
    f, n, fit = c.format, w.shape[0], formats.rounding(c.format).fit
    hessian, _ = prepared(s.needed_hessian())
    order = jnp.argsort(-jnp.diagonal(hessian)) if c.act_order else jnp.arange(n)
    factor, damp = inverse_factor(hessian[order][:, order], c.damp)
    grid = formats.grids(f, w)
    each = formats.each(f, grid, n)
    plain = formats.rounded(f, w, each)
    # Blocks of fp8 share their scale between outputs, which choose each for itself below.
    if f.inputs and not c.act_order and f.kind != "fp8":
        made, grids = sweep(
            w, factor, f.inputs,
            start=lambda rows, inside, extra: fit(f, rows),
            choose=lambda grid, i, rows, inside: (grid, formats.rounded(f, rows[i], grid)),
        )  # fmt: skip
    else:
        pad = -n % BLOCK

        def in_blocks(x: jax.Array) -> jax.Array:
            return jnp.pad(x[order], ((0, pad), (0, 0)), constant_values=1).reshape(-1, BLOCK, w.shape[1])

        made, _ = sweep(
            w[order], factor, BLOCK,
            start=lambda rows, inside, grid: grid,
            choose=lambda grid, i, rows, inside: (grid, formats.rounded(f, rows[i], Grid(grid.scale[i], grid.zero[i]))),
            extra=Grid(in_blocks(each.scale), in_blocks(each.zero)),
        )  # fmt: skip
        made, grids = jnp.zeros_like(made).at[order].set(made), grid
    better = (s.error(made - w) <= s.error(plain - w))[None]
    made = jnp.where(better, made, plain)
    grids = Grid(*(jnp.where(better, a, b) for a, b in zip(grids, grid, strict=True)))
    return _solution(s, w, formats.leaf(f, made, grids, ins, outs), plain, damp)


def awq_scale(c: Awq, magnitudes: jax.Array, ratio: jax.Array) -> jax.Array:
    """Returns what AWQ multiplies the rows of inputs by: their mean magnitudes to a power, whose largest and least are
    each other's inverses (Lin et al. 2024)."""
    scale = jnp.maximum(magnitudes**ratio, 1e-4)
    return scale / jnp.sqrt(scale.max() * scale.min())


def awq_factors(cs: Sequence[Awq], ws: Sequence[jax.Array], s: Statistics) -> jax.Array:
    """Returns what the rows of matrices `[I, O]` that read the same inputs are multiplied by before rounding, `[I]`:
    that power of the inputs' magnitudes for which the errors of all their outputs together are least. The power 0 is
    rounding to the nearest. Raises ValueError for NF4."""

    def tried(ratio: jax.Array) -> jax.Array:
        scale = awq_scale(cs[0], s.mean_abs, ratio)[:, None]
        errors = jnp.zeros(())
        for c, w in zip(cs, ws, strict=True):
            rows = w * scale
            made = formats.rounded(c.format, rows, formats.each(c.format, formats.grids(c.format, rows), len(w)))
            errors += s.error(made / scale - w).sum()
        return errors

    ratios = jnp.arange(cs[0].ratios, dtype=jnp.float32) / cs[0].ratios
    return awq_scale(cs[0], s.mean_abs, ratios[jnp.argmin(jax.lax.map(tried, ratios))])


def multiplied(c: Awq | Smooth, w: jax.Array, s: Statistics, ins: Dims, outs: Dims, factors: jax.Array) -> Solution:
    """Multiplies the rows of a matrix by factors and rounds to the nearest: a leaf for inputs that are divided by the
    factors. Its errors are those of the matrix and inputs as they were."""
    leaf = formats.nearest(c.format, w * factors[:, None], ins, outs)
    made = dense(leaf).reshape(w.shape) / factors[:, None]
    plain = dense(formats.nearest(c.format, w, ins, outs)).reshape(w.shape)
    return Solution(leaf, None, **measured(s, w, made, plain))


def _own(made: Solution, factors: jax.Array, ins: Dims, outs: Dims) -> Solution:
    """Returns a solution whose leaf divides its inputs itself."""
    weight: Leaf = Scaled(base=made.weight, by=(1 / factors).reshape(ins), outs=len(outs))
    return made.replace(weight=weight)


def awq(c: Awq, w: jax.Array, s: Statistics, ins: Dims, outs: Dims) -> Solution:
    """Multiplies the rows of large inputs before rounding; the leaf divides its inputs again. Raises ValueError for
    NF4."""
    factors = awq_factors([c], [w], s)
    return _own(multiplied(c, w, s, ins, outs, factors), factors, ins, outs)


def smooth_scale(c: Smooth, largest_inputs: jax.Array, largest_weights: jax.Array) -> jax.Array:
    """Returns what SmoothQuant divides each input by, `[I]`: max|x|^α / max|w|^(1 − α) (Xiao et al. 2023).

    It is 1 for inputs, or rows of weights, that are all zero."""
    scale = jnp.maximum(largest_inputs**c.alpha / jnp.maximum(largest_weights, 1e-5) ** (1 - c.alpha), 1e-5)
    return jnp.where((largest_inputs > 0) & (largest_weights > 0), scale, 1)


def smooth_factors(cs: Sequence[Smooth], ws: Sequence[jax.Array], s: Statistics) -> jax.Array:
    """Returns what matrices `[I, O]` that read the same inputs multiply their rows by, `[I]`: by the largest number in
    that row of any of them."""
    return smooth_scale(cs[0], s.largest, jnp.max(jnp.stack([jnp.abs(w).max(1) for w in ws]), 0))


def smooth(c: Smooth, w: jax.Array, s: Statistics, ins: Dims, outs: Dims) -> Solution:
    """Divides inputs, and multiplies rows of the weight, so that both have less range; then rounds to the nearest."""
    factors = smooth_factors([c], [w], s)
    return _own(multiplied(c, w, s, ins, outs, factors), factors, ins, outs)
