"""How numbers are rounded to each format: scales of groups of inputs, the nearest codes, and the leaf that holds them.

Solvers see a matrix `[I, O]`, whose inputs are rounded in groups of `size`. I inputs, O outputs, G groups.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core.compression import Format
from jaxlm.nn.leaf import Leaf
from jaxlm.weights import quantized
from jaxlm.weights.few_bits import FP4, Fp8, Int4, Mxfp4, in_pairs, power_of_two, spread

LEAST = 1e-30  # of a scale, so that groups of zeros divide by something
E4M3 = 448.0  # the largest number of float8_e4m3fn


class Grid(NamedTuple):
    """A Grid says which numbers can be stored: for a group `[O]`, for many `[G, O]`, for each number `[I, O]`."""

    scale: jax.Array
    zero: jax.Array
    """The code of 0, as float32."""


def _absolute(w: jax.Array, steps: float) -> jax.Array:
    return jnp.maximum(jnp.abs(w).max(0) / steps, LEAST)


def _fit_int8(f: Format, w: jax.Array) -> Grid:
    scale = _absolute(w, 127.0)
    return Grid(scale, jnp.zeros_like(scale))


def _fit_int4(f: Format, w: jax.Array) -> Grid:
    if not f.zero_point:
        scale = _stored(_absolute(w, 7.0))
        return Grid(scale, jnp.full_like(scale, 8.0))
    low, high = jnp.minimum(w.min(0), 0), jnp.maximum(w.max(0), 0)
    scale = _stored(jnp.maximum((high - low) / 15, LEAST))
    return Grid(scale, jnp.clip(jnp.round(-low / scale), 0, 15))


def _stored(scale: jax.Array) -> jax.Array:
    """Rounds a scale to bfloat16, by bits: compilers may drop a pair of casts."""
    return jax.lax.reduce_precision(scale, 8, 7)


def _fit_fp8(f: Format, w: jax.Array) -> Grid:
    scale = _absolute(w, E4M3)
    if f.inputs:
        outs = w.shape[1]
        blocks = jnp.pad(scale, (0, -outs % f.inputs)).reshape(-1, f.inputs).max(1)
        scale = spread(blocks[:, None], f.inputs, outs)[:, 0]
    return Grid(scale, jnp.zeros_like(scale))


def _fit_mxfp4(f: Format, w: jax.Array) -> Grid:
    """Fits the power of two of which the largest number is from 4 to below 8, or the next, whichever squared error is
    less."""
    _, exponent = jnp.frexp(jnp.abs(w).max(0, keepdims=True))
    powers = [power_of_two(jnp.clip(exponent + 124 + i, 1, 254).astype(jnp.uint8)) for i in (0, 1)]
    tried = [Grid(power, jnp.zeros_like(power)) for power in powers]
    # Errors are measured in the power: squares of tiny numbers would all be zero.
    loss = [jnp.square((_decode_mxfp4(_encode_mxfp4(f, w, g), g) - w) / powers[0]).sum(0) for g in tried]
    scale = jnp.where(loss[0] <= loss[1], powers[0][0], powers[1][0])
    return Grid(scale, jnp.zeros_like(scale))


def _encode_int(low: float, high: float) -> Callable[[Format, jax.Array, Grid], jax.Array]:
    return lambda f, w, g: jnp.clip(jnp.round(w / g.scale) + g.zero, low, high)


def _encode_fp8(f: Format, w: jax.Array, g: Grid) -> jax.Array:
    return jnp.clip(w / g.scale, -E4M3, E4M3).astype(jnp.float8_e4m3fn).astype(jnp.float32)


def _encode_mxfp4(f: Format, w: jax.Array, g: Grid) -> jax.Array:
    size = jnp.abs(w / g.scale)
    code = sum((size > (a + b) / 2).astype(jnp.float32) for a, b in itertools.pairwise(FP4))
    return jnp.where((w < 0) & (code > 0), code + 8, code)


def _decode_linear(codes: jax.Array, g: Grid) -> jax.Array:
    return (codes - g.zero) * g.scale


def _decode_mxfp4(codes: jax.Array, g: Grid) -> jax.Array:
    negative = codes >= 8
    code = jnp.where(negative, codes - 8, codes)
    size: Any = sum((code == i).astype(jnp.float32) * level for i, level in enumerate(FP4) if level)
    return jnp.where(negative, -size, size) * g.scale


def _int8_leaf(f: Format, codes: jax.Array, g: Grid, ins: tuple[int, ...], outs: tuple[int, ...]) -> Leaf:
    scale = g.scale.reshape(*(1,) * len(ins), *outs)
    whole = codes.astype(jnp.int8).reshape(*ins, *outs)
    return quantized.Int8(int8=whole, scale=scale, outs=len(outs), dynamic=f.dynamic)


def _int4_leaf(f: Format, codes: jax.Array, g: Grid, ins: tuple[int, ...], outs: tuple[int, ...]) -> Leaf:
    return Int4(
        int4=in_pairs(codes), scale=g.scale.astype(jnp.bfloat16), in_shape=ins, out_shape=outs, group=f.inputs,
        zero=g.zero.astype(jnp.uint8) if f.zero_point else None,
    )  # fmt: skip


def _fp8_leaf(f: Format, codes: jax.Array, g: Grid, ins: tuple[int, ...], outs: tuple[int, ...]) -> Leaf:
    scale = g.scale[:, :: f.inputs] if f.inputs else g.scale
    return Fp8(
        fp8=codes.astype(jnp.float8_e4m3fn), scale=scale, in_shape=ins, out_shape=outs, block=f.inputs,
        dynamic=f.dynamic,
    )  # fmt: skip


def _mxfp4_leaf(f: Format, codes: jax.Array, g: Grid, ins: tuple[int, ...], outs: tuple[int, ...]) -> Leaf:
    exponent = jax.lax.bitcast_convert_type(g.scale, jnp.uint32) >> 23
    return Mxfp4(mxfp4=in_pairs(codes), scale=exponent.astype(jnp.uint8), in_shape=ins, out_shape=outs)


@dataclass(frozen=True)
class Rounding:
    """A Rounding is how one kind of format rounds a group of inputs; codes are whole numbers or fp8's as float32."""

    fit: Callable[[Format, jax.Array], Grid]
    """The grid `[O]` of a group `[g, O]`."""
    encode: Callable[[Format, jax.Array, Grid], jax.Array]
    """The nearest codes of numbers, whose grid broadcasts to them."""
    decode: Callable[[jax.Array, Grid], jax.Array]
    leaf: Callable[..., Leaf]
    """(format, codes `[I, O]`, grid `[G, O]`, dimensions of inputs, of outputs) → the leaf."""


KINDS = {
    "int8": Rounding(_fit_int8, _encode_int(-127, 127), _decode_linear, _int8_leaf),
    "int4": Rounding(_fit_int4, _encode_int(0, 15), _decode_linear, _int4_leaf),
    "fp8": Rounding(_fit_fp8, _encode_fp8, _decode_linear, _fp8_leaf),
    "mxfp4": Rounding(_fit_mxfp4, _encode_mxfp4, _decode_mxfp4, _mxfp4_leaf),
}


def rounding(f: Format) -> Rounding:
    """Returns how a format rounds. Raises ValueError for NF4, whose scales are rounded with those of all outputs."""
    if f.kind not in KINDS:
        raise ValueError(f"format: {f.kind} is rounded to the nearest alone; take another format for this method")
    return KINDS[f.kind]


def size(f: Format, inputs: int) -> int:
    """Returns how many inputs share a scale."""
    return f.inputs or inputs


def grids(f: Format, w: jax.Array) -> Grid:
    """Returns the grid `[G, O]` of every group of a matrix `[I, O]`, of which the last may be smaller."""
    n, g = w.shape[0], size(f, w.shape[0])
    groups = jnp.pad(w, ((0, -n % g), (0, 0))).reshape(-1, g, w.shape[1])
    return jax.vmap(lambda w: rounding(f).fit(f, w))(groups)


def each(f: Format, g: Grid, inputs: int) -> Grid:
    """Returns the grid of every number `[I, O]`."""
    return Grid(*(spread(x, size(f, inputs), inputs) for x in g))


def rounded(f: Format, w: jax.Array, g: Grid) -> jax.Array:
    """Returns the nearest numbers that a grid has, which broadcasts to `w`."""
    return rounding(f).decode(rounding(f).encode(f, w, g), g)


def leaf(f: Format, w: jax.Array, g: Grid, ins: tuple[int, ...], outs: tuple[int, ...]) -> Leaf:
    """Returns the leaf of a matrix `[I, O]` by its grids `[G, O]`; `ins` and `outs` are its dimensions in the model."""
    r = rounding(f)
    return r.leaf(f, r.encode(f, w, each(f, g, w.shape[0])), g, ins, outs)


def nearest(f: Format, w: jax.Array, ins: tuple[int, ...], outs: tuple[int, ...]) -> Leaf:
    """Returns the leaf whose every number is the nearest to that of a matrix `[I, O]`."""
    if f.kind == "nf4":
        return quantized.bound(quantized.nf4(w.reshape(*ins, *outs), len(ins), len(outs)), len(outs))
    return leaf(f, w, grids(f, w), ins, outs)


def nbytes(f: Format, inputs: int, outs: int) -> int:
    """Returns how many bytes a matrix `[I, O]` takes in a format."""
    made = jax.eval_shape(
        lambda w: nearest(f, w, (inputs,), (outs,)), jax.ShapeDtypeStruct((inputs, outs), jnp.float32)
    )
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(made))
