"""Rounds rows of numbers to eight bits, each by its own largest magnitude."""

from typing import Any

import jax
import jax.numpy as jnp

FEW_BITS: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
"""The number of each type that a row's largest magnitude becomes."""
LEAST = 1e-30  # of a scale, so that rows of zeros divide by something


def rounded(x: jax.Array, dims: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the codes of `x` in a type of `LARGEST` and their float32 scales, one for the last `dims` dimensions,
    which are of size one in the scales."""
    return rounded_over(x, tuple(range(x.ndim - dims, x.ndim)), dtype)


def rounded_over(x: jax.Array, over: tuple[int, ...], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the codes of `x` in a type of `LARGEST` and their float32 scales, one for all that differs in the
    dimensions `over` alone, which are of size one in the scales.

    The scale of what isn't finite isn't either, so that it passes for no number.
    """
    x, dtype = x.astype(jnp.float32), jnp.dtype(dtype)
    scale = jnp.maximum(jnp.abs(x).max(over, keepdims=True), LEAST) / LARGEST[dtype]
    codes = x / scale
    return (jnp.round(codes) if jnp.issubdtype(dtype, jnp.integer) else codes).astype(dtype), scale
