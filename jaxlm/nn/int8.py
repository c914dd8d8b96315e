"""Multiplies activations by a layer's matrices in int8: each row of activations and each output of a matrix is rounded
by its own largest magnitude, and products of whole numbers are added in int32.

The gradient of activations is made in the same way, with both factors rounded along the outputs; that of the matrix, a
sum over all tokens in which rounding would add up, is a product in the compute dtype (SwitchBack, Wortsman et al. 2023;
of their variants the one with a scale for each row of both factors).

N rows, I inputs, O outputs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from jaxlm.nn.narrow import Place, Way, like, partitioned
from jaxlm.nn.row_rounding import rounded_over
from jaxlm.runtime import chips

PRODUCT = "int8_product"
"""The name of a product, once it is scaled, in a traced program."""


class Codes(struct.PyTreeNode):
    """A Codes is a tensor in int8: `codes` times `scale`."""

    codes: jax.Array
    scale: jax.Array
    """Float32, of size one in the dimensions that share a scale; not finite where these hold what isn't."""


def coded(x: jax.Array, over: tuple[int, ...]) -> Codes:
    """Returns `x` in int8 with one scale for each place in the dimensions that aren't `over`."""
    return Codes(*rounded_over(x, over, jnp.int8))


def _rounded(x: jax.Array, inputs: int) -> Codes:
    return coded(x, tuple(range(x.ndim - inputs, x.ndim)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(inputs: int, place: Place, x: jax.Array, w: jax.Array, x8: Codes) -> jax.Array:
    """Returns `x`, whose last dimensions are the inputs, times `w`, whose first are."""
    return _forward(inputs, place, x, w, x8)[0]


def _forward(inputs: int, place: Place, x: jax.Array, w: jax.Array, x8: Codes) -> tuple[jax.Array, Any]:
    over = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    return _dot(x8, coded(w, over[1]), over, x.dtype, place.home), (x, w)


def _backward(inputs: int, place: Place, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w = kept
    rows = tuple(range(x.ndim - inputs))
    over = tuple(range(len(rows), g.ndim)), tuple(range(inputs, w.ndim))
    dx = _dot(coded(g, over[0]), coded(w, over[1]), over, x.dtype, like(place.home, x).home)
    dw = jax.lax.dot_general(x, g, ((rows, rows), ((), ())), **partitioned(like(place.home, w).home))
    return dx, dw.astype(w.dtype), None


_product.defvjp(_forward, _backward)


def _dot(a: Codes, b: Codes, over: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any, home: Any) -> jax.Array:
    """Returns the product of two tensors, summed over these dimensions of each in int32, in `dtype`."""
    product = jax.lax.dot_general(
        a.codes, b.codes, (over, ((), ())), preferred_element_type=jnp.int32, **partitioned(home)
    )
    rows, outputs = a.scale.squeeze(over[0]), b.scale.squeeze(over[1])
    rows = rows.reshape(rows.shape + (1,) * outputs.ndim)
    outputs = outputs.reshape((1,) * (product.ndim - outputs.ndim) + outputs.shape)
    # Under its name remat keeps this, and not the sums of twice or four times its bytes.
    return checkpoint_name((product.astype(jnp.float32) * rows * outputs).astype(dtype), PRODUCT)


WAY = Way(
    words="int8 products in layers (a scale a token and an output; gradients of matrices as computed)",
    needs="a TPU v5e, v5p or v6e, or an NVIDIA GPU from Turing on",
    multiplies=chips.multiplies_int8,
    rounded=_rounded,
    product=_product,
)
