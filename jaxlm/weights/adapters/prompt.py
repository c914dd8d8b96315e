"""Soft prompts: virtual tokens before the text whose embeddings are learned (Lester et al. 2021), or made by a network
that is learned (P-tuning, Liu et al. 2021).

P virtual tokens, D model width, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core.config import Adapter
from jaxlm.core.spec import Spec, bias, fan_in, normal
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import EVERYONE


class Prompted(struct.PyTreeNode):
    """A table of embeddings that goes on with those of virtual tokens, ids V, V + 1 …"""

    base: jax.Array
    rows_PD: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def virtual(self, x_BTD: jax.Array, ids_BT: jax.Array, shard: Layout) -> jax.Array:
        """`x`, what the table found for the ids, with the virtual tokens' rows in their places."""
        V, P = self.base.shape[0], self.rows_PD.shape[0]
        rows_PD = shard(self.rows_PD, None, None)
        hit_BTP = (ids_BT[..., None] == V + jnp.arange(P)[None, None]).astype(rows_PD.dtype)
        found_BTD = shard.einsum("btp,pd->btd", shard(hit_BTP, "batch", "seq", None), rows_PD, "batch", "seq", None)
        ids_BT = shard(ids_BT, "batch", "stream")
        return jnp.where((ids_BT >= V)[..., None], found_BTD.astype(x_BTD.dtype), x_BTD)

    def gathered(self, s: Spec, shard: Layout) -> jax.Array:
        """As a head: virtual tokens are never predicted."""
        return shard.gather(self.base, s)


def specs(c: Adapter, width: int) -> dict[str, Spec]:
    table = dict(rows=Spec((c.tokens, width), (None, "embed"), normal(0.02)))
    if c.method == "prompt":
        return table
    n, w = c.hidden or width, fan_in(0)
    return table | dict(
        w1=Spec((width, n), (None, None), w), b1=bias(n),
        w2=Spec((n, n), (None, None), w), b2=bias(n),
        w3=Spec((n, width), (None, None), w), b3=bias(width),
    )  # fmt: skip


def rows(own: dict[str, jax.Array]) -> jax.Array:
    """`[P, D]`: the virtual tokens' embeddings."""
    x = own["rows"]
    if "w1" not in own:
        return x
    x = jax.nn.relu(x @ own["w1"] + own["b1"][None])
    x = jax.nn.relu(x @ own["w2"] + own["b2"][None])
    return x @ own["w3"] + own["b3"][None]


def start(embed_VD: jax.Array, ids: Any, own: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Virtual tokens that begin as the embeddings of real ones, `ids`."""
    return own | dict(rows=jnp.take(embed_VD, jnp.asarray(ids), axis=0).astype(jnp.float32))


def before(batch: dict, names: tuple[str, str, str], first: int, n: int, everyone: bool, shard: Layout) -> dict:
    """The batch with virtual tokens (ids from `first`) before each row; `names` of its tokens, positions, segments.

    In a decoder every segment of a row sees them, as packed rows want it; elsewhere they are of the row's one segment.
    """
    tokens, positions, segments = names
    rows = (batch[tokens].shape[0], n)

    def put(front: jax.Array, x: jax.Array) -> jax.Array:
        front = shard(jnp.broadcast_to(front, rows).astype(x.dtype), "batch", None)
        return shard(jnp.concatenate([front, shard(x, "batch", None)], 1), "batch", "seq")

    def filled(value: int) -> jax.Array:
        return jnp.full((1, n), value, jnp.int32)

    count = jnp.arange(n, dtype=jnp.int32)[None]
    seen = batch[segments] if segments in batch else jnp.ones_like(batch[tokens])
    out = batch | {tokens: put(first + count, batch[tokens]), segments: put(filled(EVERYONE if everyone else 1), seen)}
    if positions in batch:
        out[positions] = put(count, batch[positions] + n)
    for name in ("types", "prefix"):
        if name in batch and tokens == "tokens":
            out[name] = put(filled(0), batch[name])
    return out
