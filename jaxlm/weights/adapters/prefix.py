"""Prefix tuning (Li & Liang 2021): keys and values of virtual tokens, learned for every layer.

P virtual tokens, K key/value heads, C head width.
"""

from typing import Any

import jax
from flax import struct

from jaxlm.core.config import Adapter
from jaxlm.core.spec import Spec, normal
from jaxlm.nn.layout import Layout
from jaxlm.weights.sites import Site

TARGETS = (r"(^|/)k$",)


class Prefixed(struct.PyTreeNode):
    """The matrix that makes keys, with the keys and values that stand before all."""

    base: Any
    keys_PKC: jax.Array
    values_PKC: jax.Array

    def einsum(self, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
        return shard.einsum(eq, x, self.base, *axes)

    def gathered(self, s: Spec, shard: Layout) -> "Prefixed":
        own = {n: shard(getattr(self, n).astype(shard.dtype), None, "kv", None) for n in ("keys_PKC", "values_PKC")}
        return self.replace(base=shard.gather(self.base, s), **own)


def specs(c: Adapter, s: Site) -> dict[str, Spec]:
    if len(s.out_shape) != 2:
        raise ValueError(f"adapter.method: prefix needs keys of heads, which {s.path} does not make; choose another")
    one = Spec((c.tokens, *s.out_shape), (None, *s.out_axes), normal(0.02))
    return dict(keys=one, values=one)


def bind(
    c: Adapter, s: Site, base: Any, own: dict[str, Any], common: dict[str, Any], key: jax.Array | None
) -> Prefixed:
    return Prefixed(base, own["keys"], own["values"])
