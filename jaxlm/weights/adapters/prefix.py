"""Prefix tuning (Li & Liang 2021): keys and values of virtual tokens are learned for every layer.

P virtual tokens, K key/value heads, C head width.
"""

from dataclasses import dataclass
from typing import Any

import jax

from jaxlm.core.ranges import Count
from jaxlm.core.spec import Spec, normal
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import Wrapped
from jaxlm.weights.adapters.method import Method, Specs, TargetedAdapter, Weights
from jaxlm.weights.matrices import Matrix


@dataclass(frozen=True, kw_only=True)
class Prefix(TargetedAdapter):
    """Prefix tuning (Li & Liang 2021) learns keys and values of virtual tokens in every layer."""

    tokens: Count = 20
    """How many virtual tokens there are."""


class Prefixed(Wrapped):
    """The matrix that makes keys, with the keys and values that stand before all."""

    keys_PKC: jax.Array
    values_PKC: jax.Array

    def prefix_keys_values(self) -> tuple[jax.Array, jax.Array]:
        return self.keys_PKC, self.values_PKC

    def gathered(self, s: Spec, shard: Layout) -> "Prefixed":
        keys, values = (shard(x, None, "kv", None) for x in (self.keys_PKC, self.values_PKC))  # cast for each row
        return self.replace(base=shard.gather(self.base, s), keys_PKC=keys, values_PKC=values)


def specs(c: Prefix, target: Matrix) -> Specs:
    if len(target.out_shape) != 2:
        raise ValueError(f"adapter: prefix needs keys of heads, which {target.path} does not make; choose another")
    one = Spec((c.tokens, *target.out_shape), (None, *target.out_axes), normal(0.02), role="table")
    return dict(keys=one, values=one)


def bind(
    c: Prefix, target: Matrix, base: Any, adapter: Weights, shared: Weights, key: jax.Array | None
) -> Prefixed:  # fmt: skip
    return Prefixed(base, adapter["keys"], adapter["values"])


method = Method[Prefix](
    Config=Prefix,
    targets=(r"(^|/)k$",),
    specs=specs,
    bind=bind,
    num_common_keys=lambda c: c.tokens,
    mergeable=False,
)
