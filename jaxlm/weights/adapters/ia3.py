"""IA³ (Liu et al. 2022): keys, values and what goes into the ffn's last matrix, each number times a learned one."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core.config import Adapter
from jaxlm.core.spec import Spec, ones
from jaxlm.nn.layout import Layout
from jaxlm.weights import quantized
from jaxlm.weights.sites import Site

TARGETS = (r"(^|/)(cross_)?[kv]$", r"(^|/)down$")


class Scaled(struct.PyTreeNode):
    base: Any
    by: jax.Array
    """Of the outputs, the bias included, or of the inputs."""
    ins: int = struct.field(pytree_node=False)
    inputs: bool = struct.field(pytree_node=False)

    def einsum(self, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
        return shard.einsum(eq, _times(x, self.by) if self.inputs else x, self.base, *axes)

    def after(self, y: jax.Array, shard: Layout) -> jax.Array:
        """With the bias added already."""
        return y if self.inputs else _times(y, self.by)

    def gathered(self, s: Spec, shard: Layout) -> "Scaled":
        axes = s.axes[1:] if s.axes[:1] == ("layers",) else s.axes
        home = axes[: self.ins] if self.inputs else axes[self.ins :]
        return self.replace(base=shard.gather(self.base, s), by=shard(self.by.astype(shard.dtype), *home))

    def merged(self) -> jax.Array:
        w, by = quantized.dense(self.base), self.by.astype(jnp.float32)
        if self.inputs:
            return w * by.reshape(*by.shape, *[1] * (w.ndim - by.ndim))
        lead = w.ndim - self.ins - (by.ndim - 1)
        return w * by.reshape(*by.shape[:lead], *[1] * self.ins, *by.shape[lead:])

    def merged_bias(self, bias: jax.Array) -> jax.Array:
        return bias if self.inputs else bias * self.by


def _times(x: jax.Array, by: jax.Array) -> jax.Array:
    return x * by.astype(x.dtype).reshape((1,) * (x.ndim - by.ndim) + by.shape)


def of_inputs(s: Site) -> bool:
    """Last matrices of attention and ffn are scaled where numbers go in, others where they come out."""
    return s.path.rpartition("/")[2] in ("o", "cross_o", "down")


def specs(c: Adapter, s: Site) -> dict[str, Spec]:
    shape, axes = (s.in_shape, s.in_axes) if of_inputs(s) else (s.out_shape, s.out_axes)
    return dict(by=Spec(shape, axes, ones))


def bind(c: Adapter, s: Site, base: Any, own: dict[str, Any], common: dict[str, Any], key: jax.Array | None) -> Scaled:
    return Scaled(base, own["by"], s.ins, of_inputs(s))
