"""Small networks within layers: after attention and ffn (Houlsby et al. 2019), after the ffn (Pfeiffer et al. 2021), or
beside it (He et al. 2022). Their last matrix begins as zeros, so that a fresh adapter does nothing."""

from typing import Any

import jax
from flax import struct

from jaxlm.core.config import Adapter
from jaxlm.core.spec import Spec, bias, fan_in, zeros
from jaxlm.nn.layers import ACTIVATIONS, add_bias
from jaxlm.nn.layout import Layout
from jaxlm.weights.sites import Site

# By method: which matrices, the activation, what the output is multiplied by.
TARGETS = {
    "houlsby": (r"(^|/)(o|down)$",),
    "pfeiffer": (r"(^|/)down$",),
    "parallel": (r"(^|/)up$",),
}
SHAPE = {"houlsby": ("silu", 1.0), "pfeiffer": ("relu", 1.0), "parallel": ("relu", 4.0)}


class Bottleneck(struct.PyTreeNode):
    base: Any
    down: jax.Array
    """D N."""
    down_bias: jax.Array
    up: jax.Array
    """N D."""
    up_bias: jax.Array
    method: str = struct.field(pytree_node=False)

    def einsum(self, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
        return shard.einsum(eq, x, self.base, *axes)

    def after(self, y_BTD: jax.Array, shard: Layout) -> jax.Array:
        return y_BTD if self.method == "parallel" else y_BTD + self._network(y_BTD, shard)

    def beside(self, x_BTD: jax.Array, shard: Layout) -> jax.Array | None:
        """To be added to the output of the ffn whose input this is."""
        return self._network(x_BTD, shard) if self.method == "parallel" else None

    def _network(self, x_BTD: jax.Array, shard: Layout) -> jax.Array:
        activation, scale = SHAPE[self.method]
        h_BTN = add_bias(shard.einsum("btd,dn->btn", x_BTD, self.down, "batch", "seq", None), self.down_bias)
        y_BTD = shard.einsum("btn,nd->btd", ACTIVATIONS[activation](h_BTN), self.up, "batch", "seq", None)
        return scale * add_bias(y_BTD, self.up_bias)

    def gathered(self, s: Spec, shard: Layout) -> "Bottleneck":
        own = {n: shard(w.astype(shard.dtype), *[None] * w.ndim)
               for n in ("down", "down_bias", "up", "up_bias") for w in [getattr(self, n)]}  # fmt: skip
        return self.replace(base=shard.gather(self.base, s), **own)


def specs(c: Adapter, s: Site) -> dict[str, Spec]:
    [D] = s.in_shape if c.method == "parallel" else s.out_shape
    N = round(D / c.reduction)
    if N < 1:
        raise ValueError(f"adapter.reduction: {c.reduction} leaves nothing of width {D}; choose at most {D}")
    return dict(
        down=Spec((D, N), ("embed", None), fan_in(0)),
        down_bias=bias(N),
        up=Spec((N, D), (None, "embed"), zeros),
        up_bias=bias(D),
    )


def bind(
    c: Adapter, s: Site, base: Any, own: dict[str, Any], common: dict[str, Any], key: jax.Array | None
) -> Bottleneck:
    return Bottleneck(base, own["down"], own["down_bias"], own["up"], own["up_bias"], c.method)
