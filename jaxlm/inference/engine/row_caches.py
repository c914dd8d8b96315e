"""Moves rows and pages of a cache as whole arrays: a page is a short row."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn.cache import SLOTS

Layers = tuple[dict[str, jax.Array], ...]
"""The arrays of each layer, `[rows, …]`, with slots where `nn.cache.SLOTS` says."""


def _axis(name: str) -> int | None:
    """Returns the axis of the slots of a row's own tokens; what an encoder said has none."""
    return None if name.startswith("cross_") else SLOTS.get(name, 1)


def slots(layers: Layers) -> int:
    """Returns the number of slots of each row."""
    name, x = next((name, x) for name, x in layers[0].items() if _axis(name) is not None)
    return x.shape[SLOTS.get(name, 1)]


def rows(layers: Layers) -> int:
    """Returns the number of rows."""
    return next(iter(layers[0].values())).shape[0]


def slot_bytes(layers: Layers) -> int:
    """Returns how many bytes all layers store of a token of a row."""
    own = [(name, x) for layer in layers for name, x in layer.items() if _axis(name) is not None]
    return sum(x.size * x.dtype.itemsize // (x.shape[0] * x.shape[SLOTS.get(name, 1)]) for name, x in own)


def _each(layers: Layers, change: Callable[..., jax.Array], *others: Layers) -> Layers:
    """Returns `change(name, array, …)` of each array of all layers."""
    return tuple(
        {name: change(name, x, *(o[i][name] for o in others)) for name, x in layer.items()}
        for i, layer in enumerate(layers)
    )


def empty(like: Layers) -> Layers:
    """Returns zeros of these shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def insert(layers: Layers, row: Layers, at: jax.Array) -> Layers:
    """Returns rows with another one in place `at`, as far as its slots go."""
    zero = jnp.zeros((), jnp.int32)
    return _each(layers, lambda _, x, y: jax.lax.dynamic_update_slice(x, y, (at, *(zero for _ in y.shape[1:]))), row)


def extract(layers: Layers, at: jax.Array, like: Layers) -> Layers:
    """Returns the row in place `at` with as many slots as `like` has."""
    zero = jnp.zeros((), jnp.int32)
    return _each(layers, lambda _, x, y: jax.lax.dynamic_slice(x, (at, *(zero for _ in y.shape[1:])), y.shape), like)


def load(pool: Layers, pages_N: jax.Array, like: Layers) -> Layers:
    """Returns a row of the shapes `like` that holds what pages hold, one after the other."""

    def joined(name: str, x: jax.Array, y: Any) -> jax.Array:
        axis = _axis(name)
        if axis is None:
            return jnp.zeros(y.shape, y.dtype)
        return jnp.moveaxis(x[pages_N], 0, axis - 1).reshape(y.shape)

    return _each(pool, joined, like)


def store(pool: Layers, row: Layers, pages_N: jax.Array) -> Layers:
    """Returns pages with a row's slots in them, one after the other."""

    def cut(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
        axis = _axis(name)
        if axis is None:
            return x
        parts = y[0].reshape(*y.shape[1:axis], len(pages_N), x.shape[axis], *y.shape[axis + 1 :])
        return x.at[pages_N].set(jnp.moveaxis(parts, axis - 1, 0))

    return _each(pool, cut, row)
