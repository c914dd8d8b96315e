"""Holds the layers that Transformers share: norms, embeddings, dropout, projections and feed-forward networks.

B batch, T query position, S key position, D model width, H heads, K key/value heads, C head width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from jaxlm.nn.cache import Cache
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import is_leaf, leaf_of
from jaxlm.nn.remat import named


class Output(struct.PyTreeNode):
    """An Output is what a model's `forward` returns."""

    x_BTD: jax.Array
    """The last layer's output, normalised, which `readout` and task heads take."""
    aux_B: jax.Array | None = None
    """Auxiliary loss of each row, a mean over its tokens with its coefficients applied (a router's balance)."""
    cache: Cache | None = None
    shown_B: dict[str, jax.Array] | None = None
    """Figures of each row to show by name, as means over its tokens (the share of choices that an expert dropped)."""


# The keys are the names that published configurations use.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}


def layer_norm(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, eps: float) -> jax.Array:
    """Normalises to mean 0 and variance 1, in float32 whatever the compute dtype (Ba et al. 2016)."""
    x = x_BTD.astype(jnp.float32)
    mean = jnp.mean(x, -1, keepdims=True)
    x -= mean
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + (-1,)
    y *= scale_D.reshape(shape).astype(jnp.float32)
    if bias_D is not None:
        y += bias_D.reshape(shape).astype(jnp.float32)
    return y.astype(x_BTD.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Normalises to mean square 1 over the dimensions of `scale`, in float32 whatever the compute dtype (Zhang &
    Sennrich 2019)."""
    axes = tuple(range(-scale.ndim, 0))
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axes, keepdims=True) + eps)
    return (y * scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape).astype(jnp.float32)).astype(x.dtype)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a bias, rounded to the dtype of `x`, to the last dimensions of `x`, in that dtype.

    The sum is one of float32 numbers, which is rounded to the same as one in a narrower dtype, but lets the bias's
    gradient add up over tokens in float32.
    """
    kind = jnp.finfo(x.dtype)
    bias = jax.lax.reduce_precision(bias.astype(jnp.float32), kind.nexp, kind.nmant)
    return (x.astype(jnp.float32) + bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)).astype(x.dtype)


def times(x: jax.Array, by: jax.Array | float) -> jax.Array:
    """Multiplies the last dimensions of `x` by a vector or a number in float32, and returns the dtype of `x`.

    A factor in bfloat16 would be wrong by up to 0.4 %, and its gradient would stop growing after some hundred tokens.
    """
    by = jnp.asarray(by, jnp.float32)
    return (x.astype(jnp.float32) * by.reshape((1,) * (x.ndim - by.ndim) + by.shape)).astype(x.dtype)


def embed(table_VD: Any, ids_BT: jax.Array, shard: Layout, rows: str | None = "vocab") -> jax.Array:
    """Looks rows of a table up, in the compute dtype.

    The table stays float32 so that repeated tokens' gradients add up exactly. `rows` is the logical axis of the table's
    rows: None for positions and token types.
    """
    if is_leaf(table_VD):
        return table_VD.embed(ids_BT, shard, rows)
    by_width = _by_width(shard, table_VD.shape[1])
    table_VD, ids_BT = by_width(table_VD, rows, "width"), by_width(ids_BT, "batch", "seq")
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.are_all_axes_explicit:
        x_BTD = table_VD.at[ids_BT].get(out_sharding=by_width.spec(("batch", "stream", "width")))
    else:
        x_BTD = by_width(jnp.take(table_VD, ids_BT, axis=0), "batch", "stream", "width")
    return shard(x_BTD.astype(shard.dtype), "batch", "stream", None)


def _by_width(shard: Layout, width: int) -> Layout:
    """Returns a layout in which each device looks its part of the width up for the batch rows of all devices that share
    the table.

    That holds where these devices cut the table by its width, else it returns `shard`. An all-to-all of the results
    then stands for gathering the table, and the table's gradient is never whole on any device.
    """
    mesh, batch, stored = jax.sharding.get_abstract_mesh(), shard.over("batch"), shard.over("embed", shard.store)
    if mesh.empty or not set(stored) & set(batch):
        return shard
    first = min(batch.index(a) for a in stored if a in batch)
    if not set(stored) <= set(batch) or width % math.prod(mesh.shape[a] for a in batch[first:]):
        return shard
    return dataclasses.replace(shard, compute={**shard.compute, "batch": batch[:first], "width": batch[first:]})


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of the elements and scales the rest; without a key (evaluation) it is the identity.

    In bfloat16 1 / (1 - rate) lies between two numbers, which are drawn such that the mean stays as it was.
    """
    if key is None or rate == 0:
        return x
    low, high = (float(x) for x in _around(1 / (1 - rate), x.dtype))
    share = (high - 1 / (1 - rate)) / (high - low) if high > low else 1.0
    drawn = jax.random.uniform(key, x.shape)
    scale = jnp.where(drawn < (1 - rate) * share, low, high)
    return x * checkpoint_name(jnp.where(drawn < 1 - rate, scale, 0.0).astype(x.dtype), "dropout")


def _around(value: float, dtype: Any) -> tuple[Any, Any]:
    """Returns the numbers of a dtype next to a value: the largest one up to it, and the least one from it."""
    nearest = np.asarray(value, dtype)
    if dtype == np.float32 or float(nearest) == value:
        return nearest, nearest
    other = np.nextafter(nearest, np.asarray(np.inf if float(nearest) < value else -np.inf, dtype))
    return (nearest, other) if float(nearest) < value else (other, nearest)


def subkeys(key: jax.Array | None, n: int) -> list[jax.Array | None]:
    """Returns `n` dropout keys, or `n` times None in evaluation."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def project(p: dict, name: str, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
    """Multiplies `x` by the weight `name`, adds `name_bias` where the model has one, and lets an adapter change the
    result."""
    y = shard.einsum(eq, x, p[name], *axes)
    y = named(add_bias(y, p[f"{name}_bias"]) if f"{name}_bias" in p else y, name, shard)
    y = leaf_of(p[name]).after(y, shard)
    if shard.taps is not None:
        shard.taps.note(name, y)
    return y


def dense_layer(
    p: dict, specs: Any, name: str, activation: str, x_BTD: jax.Array, shard: Layout, seq: str | None = None
) -> jax.Array:
    """Applies the dense layer `name` and an activation to states. `seq` is the logical axis of their positions."""
    w_DD = shard.gather(p[name], specs[name])
    y_BTD = shard.einsum("btd,de->bte", x_BTD, w_DD, "batch", seq, None)
    return ACTIVATIONS[activation](add_bias(y_BTD, p[f"{name}_bias"]) if f"{name}_bias" in p else y_BTD)


def mlp(p: dict, x_BTD: jax.Array, activation: str, shard: Layout) -> jax.Array:
    """Applies a feed-forward network: up (D F), activation, down (F D).

    With `gate` (D F) the activated gate multiplies up (Shazeer 2020).
    """
    activate = ACTIVATIONS[activation]
    up_BTF = project(p, "up", "btd,df->btf", x_BTD, shard, "batch", "seq", "ffn")
    if "gate" in p:
        h_BTF = activate(project(p, "gate", "btd,df->btf", x_BTD, shard, "batch", "seq", "ffn")) * up_BTF
    else:
        h_BTF = activate(up_BTF)
    y_BTD = project(p, "down", "btf,fd->btd", h_BTF, shard, "batch", "seq", None)
    branch_BTD = leaf_of(p["up"]).parallel_branch(x_BTD, shard)
    return y_BTD if branch_BTD is None else y_BTD + branch_BTD
