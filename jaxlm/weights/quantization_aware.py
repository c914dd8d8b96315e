"""Trains matrices as if they were stored in few bits: products see them rounded, gradients reach them as they are
(the straight-through estimator of Bengio et al. 2013)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core.compression import Format
from jaxlm.core.spec import Spec
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import Wrapped, dense
from jaxlm.weights.compress import formats


class Rounded(Wrapped):
    """A rounded weight is used as the numbers of a format that are nearest to its own."""

    format: Format = struct.field(pytree_node=False)
    in_shape: tuple[int, ...] = struct.field(pytree_node=False)
    out_shape: tuple[int, ...] = struct.field(pytree_node=False)

    @property
    def ndim(self) -> int:
        return int(self.base.ndim)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        w = self.base.astype(jnp.float32)

        def one(w: jax.Array) -> jax.Array:
            flat = w.reshape(math.prod(self.in_shape), -1)
            return dense(formats.nearest(self.format, flat, self.in_shape, self.out_shape)).reshape(w.shape)

        for _ in range(w.ndim - len(self.in_shape) - len(self.out_shape)):
            one = jax.vmap(one)
        return (w + jax.lax.stop_gradient(one(w) - w)).astype(dtype)

    def gathered(self, s: Spec, shard: Layout) -> jax.Array:
        made: jax.Array = shard.gather(self.dense(), s)
        return made

    def cast(self, dtype: Any) -> Any:
        return self.dense(dtype)
