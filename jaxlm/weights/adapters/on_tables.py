"""LoRA on the table of embeddings and on the head: x = W[id] + scale · a[id]·b, and logits = x·Wᵀ + scale · (x·a)·b.

A tied head is the table, yet each has an update of its own, which the other doesn't see, as in Hugging Face PEFT.
B batch, T position, D model width, V vocabulary, R rank.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core.spec import Spec
from jaxlm.nn import layers
from jaxlm.nn.layers import times
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import Wrapped, dense
from jaxlm.weights.adapters.low_rank import LowRankAdapter
from jaxlm.weights.adapters.method import Weights


class Updated(Wrapped):
    """An Updated holds a table, a head or both in one with their updates."""

    scale: float = struct.field(pytree_node=False)
    rows: Weights | None = None
    """The update of what is looked up: a `[V, R]`, b `[R, D]`."""
    head: Weights | None = None
    """The update of the logits: a `[D, R]`, b `[R, V]`."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def embed(self, ids_BT: jax.Array, shard: Layout, rows: str | None) -> jax.Array:
        x_BTD = layers.embed(self.base, ids_BT, shard, rows)
        if self.rows is None:
            return x_BTD
        z_BTR = layers.embed(self.rows["a"], ids_BT, shard, rows)
        b_RD = shard(self.rows["b"].astype(shard.dtype), None, None)
        return x_BTD + times(shard.einsum("btr,rd->btd", z_BTR, b_RD, "batch", "seq", None), self.scale)

    def gathered(self, s: Spec, shard: Layout) -> jax.Array:
        """Returns the head where nothing was added to it. ValueError: it has an update, and who asks wants a matrix."""
        if self.head is not None:
            raise ValueError("adapter.targets: head: this model multiplies its head itself; leave head out")
        return shard.gather(self.base, s)

    def readout(self, x_BTD: jax.Array, s: Spec, shard: Layout) -> tuple[jax.Array, jax.Array]:
        """Returns states and a head that are wider by the rank: x·Wᵀ + z·b is one product of [x, z] and [W, bᵀ]."""
        x_BTD, w_VD = x_BTD.astype(shard.dtype), shard.gather(self.base, s)
        if self.head is None:
            return x_BTD, w_VD
        a_DR = shard(self.head["a"].astype(shard.dtype), None, None)
        b_VR = shard(self.head["b"].astype(shard.dtype).T, "vocab", None)
        z_BTR = times(shard.einsum("btd,dr->btr", x_BTD, a_DR, "batch", "seq", None), self.scale)
        spare = -(w_VD.shape[1] + b_VR.shape[1]) % _parts(s, shard)
        wide = [jnp.pad(m, (*[(0, 0)] * (m.ndim - 1), (0, spare))) for m in (z_BTR, b_VR)]
        x_BTD = shard(x_BTD, "batch", "seq", None)
        out = jnp.concatenate([x_BTD, wide[0]], -1), jnp.concatenate([w_VD, wide[1]], -1)
        return shard(out[0], "batch", "seq", None), shard(out[1], "vocab", None)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the table with its update."""
        return self._with(None if self.rows is None else self._product(self.rows), dtype)

    def dense_head(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the head with its update."""
        return self._with(None if self.head is None else self._product(self.head).T, dtype)

    def _product(self, pair: Weights) -> jax.Array:
        return self.scale * pair["a"].astype(jnp.float32) @ pair["b"].astype(jnp.float32)

    def _with(self, update: jax.Array | None, dtype: Any) -> jax.Array:
        base = dense(self.base)
        return (base if update is None else base + update).astype(dtype)


def _parts(s: Spec, shard: Layout) -> int:
    """Returns how many parts a head's last dimension is stored in, which its gradient is cut into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[a] for a in shard.over(s.axes[-1], shard.store))


def bind(c: LowRankAdapter, base: Any, rows: Weights | None, head: Weights | None) -> Updated:
    """Returns what takes the place of a table or a head."""
    return Updated(base, scale=c.scale, rows=rows, head=head)
