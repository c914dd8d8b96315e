"""Merges the rows of workers or stages that `jax.vmap` maps a function over, for kernels that have no such rule of
their own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P

from jaxlm.runtime.mesh import is_explicit, reshape, spec_of


def with_merged_rows(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `f`, which takes arrays [B, …] or [1, …] and gives one [B, …], so that `jax.vmap` of it and of its
    gradient calls it once, with the rows of all, [W·B, …].

    The gradient computes `f` again, which a compiler may share with a block's recomputation. An array of which only one
    row is given must be the same for all that are mapped.
    """

    def merged(g: Callable[..., Any]) -> Any:
        mapped = custom_vmap(g)

        @mapped.def_vmap
        def rule(size: int, batched: list[bool], *arrays: jax.Array) -> tuple[Any, Any]:
            spec = next(spec_of(x) for x, b in zip(arrays, batched, strict=True) if b)
            out = mapped(*(_merge(x, size, b, spec) for x, b in zip(arrays, batched, strict=True)))

            def apart(x: jax.Array) -> jax.Array:
                return reshape(x, (size, x.shape[0] // size, *x.shape[1:]), (*spec[:2], *spec_of(x)[1:]))

            return jax.tree.map(apart, out), jax.tree.map(lambda _: True, out)

        return mapped

    def split(arrays: tuple[jax.Array, ...]) -> tuple[list[int], Callable[..., jax.Array]]:
        """Returns which arrays have gradients, and `f` of these alone."""
        floats = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]

        def of(*given: jax.Array) -> jax.Array:
            return f(*(given[floats.index(i)] if i in floats else x for i, x in enumerate(arrays)))

        return floats, of

    def for_gradients(*arrays: jax.Array) -> jax.Array:
        """Returns `f` computed as its gradient computes it, so that compilers find the two the same."""
        floats, of = split(arrays)
        return jax.vjp(of, *(arrays[i] for i in floats))[0]

    def gradients(gradient: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        floats, of = split(arrays)
        return list(jax.vjp(of, *(arrays[i] for i in floats))[1](gradient))

    @jax.custom_vjp
    def call(*arrays: jax.Array) -> jax.Array:
        return merged(f)(*arrays)

    def backward(arrays: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[Any, ...]:
        found = dict(zip(split(arrays)[0], merged(gradients)(gradient, *arrays), strict=True))
        return tuple(_laid_as(found[i], x) if i in found else None for i, x in enumerate(arrays))

    call.defvjp(lambda *arrays: (merged(for_gradients)(*arrays), arrays), backward)
    return call


def _merge(x: jax.Array, size: int, batched: bool, spec: tuple[Any, ...]) -> jax.Array:
    """Returns the rows of all that a function is mapped over; one row that is the same for all stays one. `spec` says
    which axes of an explicit mesh the mapped dimension and that of rows lie on."""
    if not batched:
        if x.shape[0] == 1:
            return x
        x = reshape(jnp.broadcast_to(x, (size, *x.shape)), (size, *x.shape), (*spec[:2], *spec_of(x)[1:]))
    both = tuple(axis for part in spec[:2] for axis in ((part,) if isinstance(part, str) else part or ()))
    return reshape(x, (size * x.shape[1], *x.shape[2:]), (both or None, *spec_of(x)[2:]))


def _laid_as(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """Returns a gradient on the axes that its array lies on."""
    return jax.sharding.reshard(gradient, P(*spec_of(x))) if is_explicit() else gradient
