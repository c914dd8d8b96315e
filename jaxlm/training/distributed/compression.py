"""Compresses deltas: what travels between workers has fewer bits, and each worker keeps the error for its next delta
(error feedback, Seide et al. 2014; Karimireddy et al. 2019).

All functions take and return float32 numbers: flat vectors where they are scaled, which they are in blocks of `BLOCK`,
the last one filled with zeros; else of any shape.
"""

import itertools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

BLOCK = 256
BITS = {"none": 32.0, "bfloat16": 16.0, "int8": 8 + 32 / BLOCK, "float4": 4 + 32 / BLOCK}
"""Bits of a number, with its share of the block's scale."""
FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a 4-bit float with two bits of exponent and one of mantissa (E2M1, OCP Microscaling Formats)."""

Packed = Mapping[str, jax.Array]


def size(kind: str, count: int) -> int:
    """Returns the bytes of `count` compressed numbers."""
    blocks = math.ceil(count / BLOCK)
    return {
        "none": 4 * count,
        "bfloat16": 2 * count,
        "int8": blocks * (BLOCK + 4),
        "float4": blocks * (BLOCK // 2 + 4),
    }[kind]


def compress(kind: str, x_N: jax.Array) -> Packed:
    """Returns the arrays that stand for a vector: `values`, and `scales` of its blocks."""
    if kind == "none":
        return {"values": x_N}
    if kind == "bfloat16":
        return {"values": x_N.astype(jnp.bfloat16)}
    x_BK = jnp.pad(x_N, (0, -x_N.size % BLOCK)).reshape(-1, BLOCK)
    largest_B = jnp.max(jnp.abs(x_BK), axis=1)
    scale_B = largest_B / (127.0 if kind == "int8" else FLOAT4[-1])
    scaled_BK = x_BK / jnp.where(scale_B > 0, scale_B, 1.0)[:, None]
    if kind == "int8":
        return {"values": jnp.round(scaled_BK).astype(jnp.int8), "scales": scale_B}
    middles = jnp.asarray([(a + b) / 2 for a, b in itertools.pairwise(FLOAT4)])
    code_BK = jnp.searchsorted(middles, jnp.abs(scaled_BK)).astype(jnp.uint8)
    code_BK = code_BK | jnp.where(scaled_BK < 0, 8, 0).astype(jnp.uint8)
    return {"values": code_BK[:, 0::2] | (code_BK[:, 1::2] << 4), "scales": scale_B}


def decompress(kind: str, packed: Packed, count: int) -> jax.Array:
    """Returns the vector of `count` numbers that compressed arrays stand for."""
    values = packed["values"]
    if kind in ("none", "bfloat16"):
        return values.astype(jnp.float32)
    if kind == "float4":
        code_BK = jnp.stack([values & 15, values >> 4], axis=-1).reshape(values.shape[0], BLOCK)
        signed = jnp.asarray([*FLOAT4, *(-x for x in FLOAT4)])
        values = signed[code_BK]
    return (values.astype(jnp.float32) * packed["scales"][:, None]).reshape(-1)[:count]


def with_feedback(kind: str, x_N: jax.Array, error_N: jax.Array, decay: float) -> tuple[Packed, jax.Array]:
    """Returns a compressed vector to which what is left of earlier errors was added, and the error to keep: what
    travelled and the kept error together are the vector and the earlier error."""
    whole_N = x_N + decay * error_N
    packed = compress(kind, whole_N)
    return packed, whole_N - decompress(kind, packed, x_N.size)
