"""A weight before it exists: one `Spec` states shape, logical axes and initializer; everything else derives from it."""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import tree

Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]


class Spec(NamedTuple):
    """The one place where a weight is described."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """A logical name of each dimension (`embed`, `heads`, `ffn`, `vocab`) or None; `Layout` maps them to the mesh."""
    init: Init
    dtype: Any = jnp.float32

    @property
    def is_matrix(self) -> bool:
        """Whether one layer's weight has two or more dimensions: what is decayed, and what Muon may take."""
        return len(self.shape) - ("layers" in self.axes) >= 2


def is_spec(x: Any) -> bool:
    return isinstance(x, Spec)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def normal(std: float) -> Init:
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def fan_in(*axes: int, scale: float = 1.0) -> Init:
    """Normal with variance scale² / (product of the input dimensions)."""
    return lambda key, shape: (
        jax.random.normal(key, shape, jnp.float32) * (scale / math.sqrt(math.prod(shape[a] for a in axes)))
    )


def stacked(n: int, specs: Any) -> Any:
    """`n` layers of the same specs as one tree with a leading `layers` axis."""

    def one(s: Spec) -> Spec:
        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.vmap(lambda k: s.init(k, s.shape))(jax.random.split(key, n))

        return Spec((n, *s.shape), ("layers", *s.axes), init, s.dtype)

    return jax.tree.map(one, specs, is_leaf=is_spec)


def init(specs: Any, key: jax.Array) -> Any:
    """Weights. Each leaf's key comes from its path, so other weights and the mesh don't change it."""

    def one(path: tuple, s: Spec) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return s.init(jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF), s.shape).astype(s.dtype)

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)


def abstract(specs: Any, shardings: Any = None) -> Any:
    """Shapes and dtypes, with shardings where given: what a checkpoint is restored to."""
    if shardings is None:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=is_spec)
    return jax.tree.map(
        lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), specs, shardings, is_leaf=is_spec
    )


def count(specs: Any) -> int:
    return sum(math.prod(s.shape) for s in tree.flatten(specs, is_spec).values())
