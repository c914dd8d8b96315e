"""Weights that are more than arrays: what layers ask of a weight, with answers that change nothing.

A plain array needs no class. Whatever else stands where a weight stood, a quantized matrix or one with an adapter, is a
subclass of `Leaf` and overrides what differs. Layers ask `leaf_of(w)`, so no layer knows of adapters or quantization.
`shard` is always the `Layout` in use.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core.spec import Spec


class Leaf(struct.PyTreeNode):
    """A weight that answers for itself. Its own methods are those of an array that is multiplied and no more."""

    vectors: ClassVar[tuple[str, ...]] = ()
    """Names of its arrays that act number by number: they stay float32."""

    def einsum(self, eq: str, x: jax.Array, shard: Any, *axes: str | None) -> jax.Array:
        """Returns `x` contracted with the weight, laid out along logical `axes`; called by `Layout.einsum`."""
        raise NotImplementedError(f"{type(self).__name__} can't be multiplied")

    def embed(self, ids_BT: jax.Array, shard: Any, rows: str | None) -> jax.Array:
        """Returns rows of the weight by their ids, `[B, T, D]`; called by `layers.embed`."""
        raise NotImplementedError(f"{type(self).__name__} is no table")

    def gathered(self, s: Spec, shard: Any) -> Any:
        """Returns the weight as a block uses it: in the compute dtype, gathered over the axes that only store it."""
        raise NotImplementedError(f"{type(self).__name__} can't be gathered")

    def readout(self, x_BTD: jax.Array, s: Spec, shard: Any) -> tuple[jax.Array, jax.Array]:
        """Returns states and a plain head `[V, D]` whose product are the logits; called by `losses.factors`."""
        return x_BTD, self.gathered(s, shard)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns one plain array that does the same."""
        raise NotImplementedError(f"{type(self).__name__} is no single matrix")

    def dense_head(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns one plain array that does the same as a head, which may be more than what it does as a table."""
        return self.dense(dtype)

    def dense_bias(self, bias: jax.Array) -> jax.Array:
        """Returns the bias that goes with `dense`."""
        return bias

    def cast(self, dtype: Any) -> "Leaf":
        """Returns the leaf with its floating-point arrays but for vectors in `dtype`, as decoding reads them."""
        changed: Leaf = jax.tree.map(lambda w: cast(w, dtype), self, is_leaf=lambda w: is_leaf(w) and w is not self)
        return changed.replace(**{name: getattr(self, name) for name in self.vectors})

    def after(self, y: jax.Array, shard: Any) -> jax.Array:
        """Returns what becomes of the layer's output once its bias is added."""
        return y

    def parallel_branch(self, x_BTD: jax.Array, shard: Any) -> jax.Array | None:
        """Returns what is added to the output of the ffn whose input is `x`; None: nothing."""
        return None

    def noted(self, x: jax.Array, inputs: Any) -> jax.Array:
        """Returns `x`. A leaf that records notes what a mixture's expert matrices read: `inputs(record)` calls
        `record(x_NI, weights_N)` for each expert, and returns what it returns, stacked."""
        return x

    def prefix_keys_values(self) -> tuple[jax.Array, jax.Array] | None:
        """Returns keys and values `[P, K, C]` that every query of the layer sees before the row's own; None: none."""
        return None


class Wrapped(Leaf):
    """A wrapped leaf holds another weight, `base`, whose product it passes on."""

    base: Any

    def einsum(self, eq: str, x: jax.Array, shard: Any, *axes: str | None) -> jax.Array:
        return shard.einsum(eq, x, self.base, *axes)


NEUTRAL = Leaf()


def is_leaf(w: Any) -> bool:
    """Returns whether a weight is more than an array."""
    return isinstance(w, Leaf)


def leaf_of(w: Any) -> Leaf:
    """Returns the leaf that a weight is; for a plain array one that changes nothing."""
    return w if isinstance(w, Leaf) else NEUTRAL


def dense(w: Any) -> jax.Array:
    """Returns the numbers of any weight as one float32 array."""
    return w.dense() if isinstance(w, Leaf) else w.astype(jnp.float32)


def dense_head(w: Any) -> jax.Array:
    """Returns the numbers of any head as one float32 array."""
    return w.dense_head() if isinstance(w, Leaf) else w.astype(jnp.float32)


def cast(w: Any, dtype: Any) -> Any:
    """Returns a weight with its floating-point arrays in `dtype`."""
    if isinstance(w, Leaf):
        return w.cast(dtype)
    return w.astype(dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w
