"""Holds the keys and values of tokens that a model has read, so that decoding reads each token once."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.nn.mask import Mask
from jaxlm.nn.row_rounding import FEW_BITS, LARGEST, rounded

# The axis of the slots in stored arrays of these names: keys rest as [B, K, C, S] and values as [B, K, S, C], which the
# products over slots read in place. As [B, S, K, C] they were transposed for each token, which took 7 times as long on
# a CPU at 16 rows and 512 slots.
SLOTS = {"k": 3, "v": 2, "cross_k": 3, "cross_v": 2}
SCALE = "_scale"
SLOTS |= {name + SCALE: axis for name, axis in SLOTS.items()}


class Cache(struct.PyTreeNode):
    """A Cache holds what a model remembers of the tokens it has read.

    Rows either share one `end`: they are padded on the left, so that all write to the same slot. Or each row has an end
    of its own: its token `i` is in slot `i`, and the tokens of a call are padded on the right.
    """

    layers: tuple[dict[str, jax.Array], ...]
    """The arrays of each layer: `[B, slots, …]`, or with slots on the axis that `SLOTS` names. Fewer slots than the
    longest row make a ring, for sliding windows. What is stored in few bits has its scales beside it (`k_scale`), one
    for each head and slot."""
    end: jax.Array
    """The number of slots filled, which is where the next token goes: of all rows, or `[B]` of each row."""
    real_BS: jax.Array
    """Whether a position holds a token; the others are padding."""
    fresh: bool = struct.field(pytree_node=False, default=True)
    """Whether nothing was read yet, so that new tokens attend to nothing but themselves."""


def empty_cache(layers: list[dict[str, jax.Array]], batch_size: int, length: int) -> Cache:
    """Returns a cache that has read nothing, around the empty arrays of each layer, for rows of up to `length`
    tokens."""
    return Cache(tuple(layers), jnp.zeros((), jnp.int32), jnp.zeros((batch_size, length), bool))


def in_few_bits(cache: Cache, kind: str) -> Cache:
    """Returns an empty cache that stores keys and values in `FEW_BITS[kind]`, a byte each, and a float32 scale for each
    head and slot. Raises ValueError where a model's cache holds no such numbers."""

    def one(layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
        made: dict[str, jax.Array] = {}
        for name, x in layer.items():
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"cache: {name} of this model are no keys or values, so {kind} stores nothing; "
                                 "leave the cache in the model's own type")  # fmt: skip
            axis = SLOTS.get(name, 1)
            scale = jnp.moveaxis(jnp.moveaxis(x, axis, 1)[..., :1], 1, axis)
            made |= {name: x.astype(FEW_BITS[kind]), name + SCALE: scale.astype(jnp.float32)}
        return made

    return cache.replace(layers=tuple(one(layer) for layer in cache.layers))


def encoded(new: dict[str, jax.Array], dtypes: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns new numbers `[B, T, …, C]` as a cache stores them: in few bits by the largest magnitude of each head and
    token, with the scales `[B, T, …, 1]`, where their type in `dtypes` has few bits."""
    made: dict[str, jax.Array] = {}
    for name, x in new.items():
        if jnp.dtype(dtypes[name]) in LARGEST:
            made[name], made[name + SCALE] = rounded(x, 1, dtypes[name])
        else:
            made[name] = x.astype(dtypes[name])
    return made


def numbers(stored: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns what a layer stores as `[B, slots, …]`, few bits times their scales."""
    by_slot = {name: jnp.moveaxis(x, SLOTS.get(name, 1), 1) for name, x in stored.items()}
    return {
        name: x.astype(jnp.float32) * by_slot[name + SCALE] if name + SCALE in by_slot else x
        for name, x in by_slot.items()
        if not name.endswith(SCALE)
    }


def with_own_ends(cache: Cache) -> Cache:
    """Returns an empty cache whose rows have ends of their own. Raises ValueError where a layer's slots are a ring."""
    rows, length = cache.real_BS.shape
    for layer in cache.layers:
        for name, x in layer.items():
            if x.shape[SLOTS.get(name, 1)] < length:
                raise ValueError(f"cache: a ring of {x.shape[SLOTS.get(name, 1)]} slots has one end for all rows")
    return cache.replace(end=jnp.zeros(rows, jnp.int32), fresh=False)


def num_slots(window: int | None, length: int, slack: int = 0) -> int:
    """Returns the slots a layer needs for rows of `length`: the window, and what one call may write ahead (`slack`)."""
    return length if window is None else min(length, window + slack)


def read_on(cache: Cache | None, segments_BT: jax.Array | None, shape: tuple[int, ...]) -> Cache | None:
    """Returns the cache as it stands once `shape` = (B, T) new tokens are in it, all but its layers.

    A forward pass calls it once. Without a cache it returns None.
    """
    if cache is None:
        return None
    real_BT = jnp.ones(shape, bool) if segments_BT is None else segments_BT > 0
    if cache.end.ndim:
        end_B = cache.end + real_BT.sum(1, dtype=jnp.int32)
        return cache.replace(real_BS=jnp.arange(cache.real_BS.shape[1])[None] < end_B[:, None], end=end_B)
    real_BS = jax.lax.dynamic_update_slice(cache.real_BS, real_BT, (jnp.zeros((), jnp.int32), cache.end))
    return cache.replace(real_BS=real_BS, end=cache.end + shape[1])


def remember(
    stored: dict[str, jax.Array] | None, new: dict[str, jax.Array], mask: Mask, cache: Cache | None
) -> tuple[dict[str, jax.Array], Mask, dict[str, jax.Array] | None]:
    """Writes a layer's new keys and values, `[B, T, …]`, to its cache.

    Returns what the queries attend to, with which mask, and what the layer stores from now on. `cache` comes from
    `read_on`. Without a cache queries attend to the new keys alone, and nothing is stored. Raises ValueError where a
    ring of slots is too small for the tokens of one call.
    """
    if cache is None or stored is None:
        return new, mask, None
    if cache.end.ndim:
        return _remember_rows(stored, new, mask, cache)
    name, first = next(iter(stored.items()))
    T, size, length = new[name].shape[1], first.shape[SLOTS.get(name, 1)], cache.real_BS.shape[1]
    start = cache.end - T
    made = encoded(new, {name: stored[name].dtype for name in new})
    if not cache.fresh and size < length and mask.window is not None and size < mask.window + T - 1:
        raise ValueError(f"cache: {T} tokens at once overwrite a window of {mask.window} in a ring of {size} slots")
    stored = {name: _write(stored[name], x, start, length, SLOTS.get(name, 1)) for name, x in made.items()}
    if cache.fresh:
        return new, mask, stored
    slots = jnp.arange(size)
    at_S = slots if size == length else cache.end - 1 - (cache.end - 1 - slots) % size
    real_BS = cache.real_BS if size == length else jnp.take(cache.real_BS, jnp.maximum(at_S, 0), axis=1)
    ones_BT = jnp.ones((real_BS.shape[0], T), jnp.int32)
    at_T = start + jnp.arange(T)
    return (
        numbers(stored),
        dataclasses.replace(
            mask, segments_BT=ones_BT, segments_BS=real_BS.astype(jnp.int32), prefix_BS=None, at_T=at_T, at_S=at_S
        ),
        stored,
    )


def starts(cache: Cache, segments_BT: jax.Array | None, T: int) -> jax.Array:
    """Returns the slots of the first of T new tokens in a cache that `read_on` returned: one, or `[B]` where rows have
    ends of their own."""
    if not cache.end.ndim or segments_BT is None:
        return cache.end - T
    return cache.end - (segments_BT > 0).sum(1, dtype=jnp.int32)


def write_rows(stored: jax.Array, new: jax.Array, start_B: jax.Array, axis: int) -> jax.Array:
    """Returns a stored array with new tokens, `[B, T, …]`, from a slot of each row on; slots are on `axis`."""
    new = jnp.moveaxis(new, 1, axis).astype(stored.dtype)
    row = lambda s, n, at: jax.lax.dynamic_update_slice_in_dim(s, n, at, axis - 1)  # noqa: E731
    return jax.vmap(row)(_as_sharded(stored, new), new, start_B)


def _remember_rows(
    stored: dict[str, jax.Array], new: dict[str, jax.Array], mask: Mask, cache: Cache
) -> tuple[dict[str, jax.Array], Mask, dict[str, jax.Array]]:
    """Does what `remember` does where each row has an end of its own.

    Positions decide what a query sees: slots that its row hasn't filled yet come after it. A row's `prefix` has to be
    read by the call that begins the row.
    """
    T, S = next(iter(new.values())).shape[1], cache.real_BS.shape[1]
    start_B = starts(cache, mask.segments_BT, T)
    made = encoded(new, {name: stored[name].dtype for name in new})
    stored = {name: write_rows(stored[name], x, start_B, SLOTS.get(name, 1)) for name, x in made.items()}
    prefix_BS = None if mask.prefix_BS is None else jnp.pad(mask.prefix_BS, ((0, 0), (0, S - T)))
    at_BT = start_B[:, None] + jnp.arange(T)[None]
    mask = dataclasses.replace(
        mask, segments_BT=None, segments_BS=None, prefix_BS=prefix_BS, at_T=at_BT, at_S=jnp.arange(S)
    )
    return numbers(stored), mask, stored


def _write(stored: jax.Array, new: jax.Array, start: jax.Array, length: int, axis: int) -> jax.Array:
    new = jnp.moveaxis(new, 1, axis).astype(stored.dtype)
    T, size = new.shape[axis], stored.shape[axis]
    stored = _as_sharded(stored, new)
    if size == length or T == 1:
        return jax.lax.dynamic_update_slice_in_dim(stored, new, start % size, axis)
    n = min(T, size)
    slots = (slice(None),) * axis + ((start + T - n + jnp.arange(n)) % size,)
    return stored.at[slots].set(jax.lax.slice_in_dim(new, T - n, T, axis=axis))


def _as_sharded(stored: jax.Array, new: jax.Array) -> jax.Array:
    """Returns the stored array as the new one is sharded: a cache is born whole, its first tokens say how it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_explicit:
        return stored
    return jax.reshard(stored, jax.typeof(new).sharding.spec)
