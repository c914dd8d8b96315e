"""Shares a row's positions among devices (context parallelism), and exchanges positions for heads (Jacobs et al. 2023).

B batch, S key position, H heads, K key/value heads, C width of a head. `ring_attention` is the other way to attend.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlm.nn.layout import Layout


@dataclass(frozen=True)
class ContextChoice:
    """A ContextChoice says how many devices share a row's positions, and how attention reaches all of its keys."""

    devices: int
    method: str
    """The value of `mesh.context_by`: gather, ring or heads."""

    def describe(self) -> str:
        """Returns the choice as people read it."""
        methods = {
            "gather": "each gathers all keys and values",
            "ring": "keys and values travel in a ring",
            "heads": "positions are exchanged for heads",
        }
        return f"{self.devices} devices share a row's positions; {methods[self.method]}"


def num_devices(shard: Layout) -> int:
    """Returns how many devices of the mesh that is being traced for share a row's positions."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[a] for a in shard.compute.get("seq", ()))


def layout_by_heads(shard: Layout, H: int, K: int) -> tuple[Layout, int]:
    """Returns a layout in which rows are whole and heads are split over the context axes too, and the copies of each
    key/value head.

    Where there are fewer key/value heads than devices, or they don't divide, each is sent in copies. Raises ValueError
    where the heads of queries don't divide.
    """
    table = {**shard.compute, "seq": ()}
    for axis in ("heads", "kv"):
        table[axis] = shard.compute.get(axis, ()) + shard.compute.get("seq", ())
    inner = dataclasses.replace(shard, compute=table)
    n = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in table["heads"])
    copies = math.lcm(K, n) // K
    if H % n or H % (K * copies):
        axes = "·".join(table["heads"])
        raise ValueError(
            f"mesh.context_by: heads: {H} heads of queries and {K} of keys do not divide over {n} devices of {axes}; "
            "make mesh.context smaller, or choose ring"
        )
    return inner, copies


def exchange_for_heads(shard: Layout, k_BSKC: jax.Array, copies: int, before: Layout) -> jax.Array:
    """Returns keys or values of whole rows whose heads `shard` splits, by an all-to-all; `before` is their layout until
    then."""
    if copies > 1:
        B, S, K, C = k_BSKC.shape
        k_BSKnC = jnp.broadcast_to(k_BSKC[:, :, :, None], (B, S, K, copies, C))
        k_BSKC = before(k_BSKnC.reshape(B, S, K * copies, C), "batch", "seq", "kv", None)
    return shard(k_BSKC, "batch", None, "kv", None)
