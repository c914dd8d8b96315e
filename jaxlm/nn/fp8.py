"""Multiplies activations by a layer's matrices in fp8 with one scale a tensor: e4m3 forward, e5m2 for gradients
(Micikevicius et al. 2022).

The scale is that of the tensor at hand (current scaling), a power of two, so that scaling rounds nothing. Products are
dots of two fp8 arrays whose result is scaled: XLA makes one call of cuBLASLt of that (`__cublas$lt$matmul$f8`), and
where it chooses another kernel the operands still are fp8. Operands that are widened and scaled before the dot become
fp8 again in cuBLASLt's call alone: in a Triton kernel they are multiplied in the wider type.

N rows, I inputs, O outputs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.nn.narrow import Place, Way, like, partitioned
from jaxlm.runtime import chips
from jaxlm.runtime.mesh import platform

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
# The largest numbers are 0.875 · 2^9 (448) and 0.875 · 2^16 (57,344).
LARGEST_EXPONENT = {E4M3: 9, E5M2: 16}
LARGEST_FRACTION = 0.875
# Compiler options of a step on a GPU: products stand as dots for GemmRewriter, which makes cuBLASLt's calls of those in
# fp8. Triton's kernels would come first, and widen e5m2 beside e4m3.
OPTIONS: dict[str, bool] = {"xla_gpu_enable_triton_gemm": False}


class Scaled(struct.PyTreeNode):
    """A Scaled is a tensor in fp8: `numbers` times `unit`."""

    numbers: jax.Array
    unit: jax.Array
    """A power of two, float32; NaN where the tensor held what isn't finite."""


def scaled(x: jax.Array, kind: Any) -> Scaled:
    """Returns `x` in fp8, times the largest power of two with which its largest magnitude is in range.

    What isn't finite makes the unit NaN: e4m3 has no infinity, and a saturated one would pass for a number.
    """
    up, unit = powers(jnp.max(jnp.abs(x)), kind)
    return Scaled((x.astype(jnp.float32) * up).astype(kind), unit)


def powers(top: jax.Array, kind: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the largest powers of two, float32, with which these magnitudes are in range of a type of fp8, and one
    over them, which is NaN for what isn't finite."""
    top = top.astype(jnp.float32)
    fraction, exponent = jnp.frexp(top)
    exponent = jnp.where(fraction > LARGEST_FRACTION, exponent + 1, exponent)
    up = jnp.clip(LARGEST_EXPONENT[kind] - exponent, -126, 126)
    one = jnp.ones_like(top)
    return jnp.ldexp(one, up), jnp.where(jnp.isfinite(top), jnp.ldexp(one, -up), jnp.nan)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(inputs: int, place: Place, x: jax.Array, w: jax.Array, x8: Scaled) -> jax.Array:
    """Returns `x`, whose last dimensions are the inputs, times `w`, whose first are."""
    return _forward(inputs, place, x, w, x8)[0]


def _forward(inputs: int, place: Place, x: jax.Array, w: jax.Array, x8: Scaled) -> tuple[jax.Array, Any]:
    w8 = scaled(w, E4M3)
    over = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    # Of the wide factors only what their gradients look like is kept.
    return _dot(x8, w8, over, x.dtype, place.home), (x8, w8, like(place.home, x), like(place.home, w))


def _backward(inputs: int, place: Place, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x8, w8, x_like, w_like = kept
    g8, outputs = scaled(g, E5M2), w8.numbers.ndim - inputs
    rows = tuple(range(g.ndim - outputs))
    over_outputs = tuple(range(len(rows), g.ndim)), tuple(range(inputs, w8.numbers.ndim))
    dx = _dot(g8, w8, over_outputs, x_like.dtype, x_like.home)
    return dx, _dot(x8, g8, (rows, rows), w_like.dtype, w_like.home), None


_product.defvjp(_forward, _backward)


def _dot(a: Scaled, b: Scaled, over: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any, home: Any) -> jax.Array:
    """Returns the product of two tensors, summed over these dimensions of each, in float32 but rounded to `dtype`."""
    x, y = a.numbers, b.numbers
    if platform() == "cpu":  # has no products of fp8, and float32 holds each exactly
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    product = jax.lax.dot_general(x, y, (over, ((), ())), preferred_element_type=jnp.dtype(dtype), **partitioned(home))
    return product * (a.unit * b.unit).astype(dtype)


WAY = Way(
    words="fp8 products in layers (e4m3, gradients e5m2, a scale a tensor)",
    needs="a GPU from Ada or Hopper on or a TPU 7x",
    multiplies=chips.multiplies_fp8,
    rounded=lambda x, inputs: scaled(x, E4M3),
    product=_product,
    gpu_options=OPTIONS,
)
