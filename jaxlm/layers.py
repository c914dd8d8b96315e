"""What Transformers are made of.

B batch, T query position, S key position, D model width, H heads, K key/value heads, C head width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.sharding import Layout

# Which results of the forward pass a block keeps for the backward pass; the rest is computed again.
REMAT: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def layer_norm(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> jax.Array:
    """In float32 whatever the compute dtype (Ba et al. 2016)."""
    x = x_BTD.astype(jnp.float32)
    mean = jnp.mean(x, -1, keepdims=True)
    x -= mean
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
    wide = (1,) * (x.ndim - 1) + (-1,)
    return (y * scale_D.reshape(wide).astype(jnp.float32) + bias_D.reshape(wide).astype(jnp.float32)).astype(
        x_BTD.dtype
    )


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """In float32 whatever the compute dtype (Zhang & Sennrich 2019)."""
    x = x_BTD.astype(jnp.float32)
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
    return (y * scale_D.reshape((1,) * (x.ndim - 1) + (-1,)).astype(jnp.float32)).astype(x_BTD.dtype)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape).astype(x.dtype)


def rope(x_BTHC: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, halves paired as in Llama's published weights (Su et al. 2021)."""
    half = x_BTHC.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BTC = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
    sin, cos = jnp.sin(angle_BTC)[:, :, None], jnp.cos(angle_BTC)[:, :, None]
    x1, x2 = jnp.split(x_BTHC.astype(jnp.float32), 2, -1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x_BTHC.dtype)


def embed(table_VD: jax.Array, ids_BT: jax.Array, shard: Layout, rows: str | None = "vocab") -> jax.Array:
    """Rows of a table, in the compute dtype. The table stays float32 so that repeated tokens' gradients add up exactly.

    `rows` is the logical axis of the table's rows: None for positions and token types.
    """
    table_VD = shard(table_VD, rows, None)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.are_all_axes_explicit:
        x_BTD = table_VD.at[ids_BT].get(out_sharding=shard.spec(("batch", "seq", None)))
    else:
        x_BTD = shard(jnp.take(table_VD, ids_BT, axis=0), "batch", "seq", None)
    return x_BTD.astype(shard.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share `rate` and scale the rest; without a key (evaluation) the identity."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def subkeys(key: jax.Array | None, n: int) -> list[jax.Array | None]:
    """`n` dropout keys, or `n` times None in evaluation."""
    return [None] * n if key is None else list(jax.random.split(key, n))


Block = Callable[[Any, jax.Array, jax.Array | None], jax.Array]


def scanned(shard: Layout) -> bool:
    """Whether layers are a loop. XLA runs a loop's body slower on a CPU: unrolled, a forward took 0.6 of the time."""
    choice = shard.execution.scan
    return jax.default_backend() != "cpu" if choice is None else choice


def run_blocks(
    block: Block, params: Any, specs: Any, x_BTD: jax.Array, *, shard: Layout, key: jax.Array | None
) -> jax.Array:
    """Apply stacked layers in order: `block(weights, x, dropout key) -> x`; scanned or unrolled, with remat by name."""
    layers = jax.tree.leaves(params)[0].shape[0]
    keys = None if key is None else jax.random.split(key, layers)

    def layer(x_BTD: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        p, k = inputs
        return block(shard.gather(p, specs), x_BTD, k), None

    if shard.execution.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[shard.execution.remat], prevent_cse=not scanned(shard))
    if scanned(shard):
        return jax.lax.scan(layer, x_BTD, (params, keys))[0]
    for i in range(layers):
        x_BTD, _ = layer(x_BTD, jax.tree.map(lambda w, i=i: w[i], (params, keys)))
    return x_BTD
