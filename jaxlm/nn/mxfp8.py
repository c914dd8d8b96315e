"""Multiplies activations by a layer's matrices in MXFP8: 32 numbers of e4m3 along the contracted dimension share a
power of two (OCP Microscaling Formats 1.0). Gradients are e4m3 too, as NVIDIA recommends where blocks are so small.

A block's power of two is the least with which its largest magnitude is in range (rounded up, as in Transformer
Engine), so nothing is cut off. The gradient of each factor contracts another dimension, along which it and the other
factor are rounded anew. Where 32 doesn't divide the contracted numbers, zeros fill the last block. On GPUs the product
is JAX's `scaled_matmul`, of which XLA makes cuDNN's `__cudnn$blockScaledDot`.

N rows, I inputs, O outputs, K contracted numbers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from jaxlm.nn.fp8 import E4M3, powers
from jaxlm.nn.narrow import Like, Place, Way, like
from jaxlm.runtime import chips
from jaxlm.runtime.mesh import platform

BLOCK = 32
E8M0 = jnp.float8_e8m0fnu
PRIMITIVE = "scaled_matmul_wrapper"
"""JAX's name of the product in a traced program, on devices that have it."""


class Blocks(struct.PyTreeNode):
    """A Blocks is a matrix `[R, K]` in MXFP8: `numbers` times the `units` of their blocks."""

    numbers: jax.Array
    """e4m3, `[R, K]` with K filled up to whole blocks."""
    units: jax.Array
    """Powers of two, e8m0, `[R, K / 32]`; NaN where the block held what isn't finite."""


def blocks(x: jax.Array) -> Blocks:
    """Returns a matrix `[R, K]` in MXFP8, with blocks along K."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)))
    parts = x.reshape(x.shape[0], -1, BLOCK)
    up, unit = powers(jnp.max(jnp.abs(parts), -1, keepdims=True), E4M3)
    return Blocks((parts.astype(jnp.float32) * up).astype(E4M3).reshape(x.shape), unit[..., 0].astype(E8M0))


class Both(struct.PyTreeNode):
    """A Both is a matrix that is rounded for its product and for the gradient of the other factor."""

    along: Blocks
    """The matrix with contracted numbers last."""
    across: Blocks
    """Its transpose, in which the other dimension is contracted."""


def _both(x: jax.Array, inputs: int) -> Both:
    """Returns activations `[N…, I…]` rounded along I and along N."""
    flat = x.reshape(-1, math.prod(x.shape[x.ndim - inputs :]))
    return Both(blocks(flat), blocks(flat.T))


def _rounded(x: jax.Array, inputs: int) -> Both:
    mesh = jax.sharding.get_abstract_mesh()
    # With explicit axes the partitioner may cut blocks as it likes, but what leaves it is said to be whole.
    explicit = not mesh.empty and mesh.are_all_axes_explicit
    return _anywhere(lambda x: _both(x, inputs), PartitionSpec() if explicit else None)(x)


def _anywhere(f: Callable[..., Any], home: Any) -> Callable[..., Any]:
    """Returns `f`, which splits and merges dimensions, for arrays of any partition. `home`: that of its result on a
    mesh of explicit axes, else None."""
    return f if home is None else jax.sharding.auto_axes(f, out_sharding=home)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(inputs: int, place: Place, x: jax.Array, w: jax.Array, x8: Both) -> jax.Array:
    """Returns `x`, whose last dimensions are the inputs, times `w`, whose first are."""
    return _forward(inputs, place, x, w, x8)[0]


def _forward(inputs: int, place: Place, x: jax.Array, w: jax.Array, x8: Both) -> tuple[jax.Array, Any]:
    def made(x8: Blocks, w: jax.Array) -> jax.Array:
        y = _dot(x8, blocks(_matrix(w, inputs).T), x.dtype, place.inputs)
        return y.reshape(*x.shape[: x.ndim - inputs], *w.shape[inputs:])

    whole = None if place.home is None else PartitionSpec()
    w8 = _anywhere(lambda w: blocks(_matrix(w, inputs)), whole)(w)
    # Of the wide factors only what their gradients look like is kept.
    return _anywhere(made, place.home)(x8.along, w), (x8.across, w8, like(place.home, x), like(place.home, w))


def _backward(inputs: int, place: Place, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x8, w8, x_like, w_like = kept
    outs = math.prod(w_like.shape[inputs:])

    def gradient(form: Like, product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return _anywhere(lambda *factors: product(*factors).reshape(form.shape), form.home)

    dx = gradient(x_like, lambda w8, g: _dot(blocks(g.reshape(-1, outs)), w8, x_like.dtype, place.outputs))(w8, g)
    dw = gradient(w_like, lambda x8, g: _dot(x8, blocks(g.reshape(-1, outs).T), w_like.dtype, place.rows))(x8, g)
    return dx, dw, None


_product.defvjp(_forward, _backward)


def _matrix(w: jax.Array, inputs: int) -> jax.Array:
    return w.reshape(math.prod(w.shape[:inputs]), -1)


def _dot(a: Blocks, b: Blocks, dtype: Any, cut: int) -> jax.Array:
    """Returns the product of `[R, K]` and `[S, K]`, `[R, S]`, summed in float32 but rounded to `dtype`. `cut`: devices
    that share K."""
    if platform() == "cpu":  # has no such products, and float32 holds each number exactly
        over = ((1,), (1,)), ((), ())
        return jax.lax.dot_general(_dense(a), _dense(b), over, preferred_element_type=jnp.dtype(dtype))
    if a.units.shape[1] % cut:  # JAX's rule would cut blocks between devices, and leave some without their unit
        a, b = (jax.tree.map(_whole_rows, m) for m in (a, b))
    x, y, x_units, y_units = (m[None] for m in (a.numbers, b.numbers, a.units, b.units))  # one batch
    return jax.nn.scaled_matmul(x, y, x_units, y_units, preferred_element_type=dtype)[0]


def _whole_rows(x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))


def _dense(m: Blocks) -> jax.Array:
    parts = m.numbers.astype(jnp.float32).reshape(*m.units.shape, BLOCK)
    return (parts * m.units.astype(jnp.float32)[..., None]).reshape(m.numbers.shape)


WAY = Way(
    words="mxfp8 products in layers (e4m3, 32 numbers share a power of two)",
    needs="a GPU from Blackwell on",
    multiplies=chips.multiplies_mxfp8,
    rounded=_rounded,
    product=_product,
)
