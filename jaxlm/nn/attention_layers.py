"""Provides self-attention and cross-attention with their projections, biases, caches and relative positions."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn import rope
from jaxlm.nn.attention import attend
from jaxlm.nn.cache import SLOTS, Cache, encoded, num_slots, numbers, remember
from jaxlm.nn.layers import project
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import leaf_of
from jaxlm.nn.mask import Mask
from jaxlm.nn.remat import named


def self_attention(
    p: dict,
    x_BTD: jax.Array,
    mask: Mask,
    *,
    shard: Layout,
    sin_cos: tuple[jax.Array, jax.Array] | None = None,
    norm: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Callable[[Mask, int, int], jax.Array] | None = None,
    cache: Cache | None = None,
    layer_cache: Any = None,
) -> tuple[jax.Array, Any]:
    """Applies self-attention to `[B, T, D]`; returns `[B, T, D]` and what the layer's cache stores from now on.

    `p` holds the weights q (D H C), k and v (D K C), o (H C D) with their biases; q_norm and k_norm (over the
    dimensions of their shape), and `sinks` (H). `sin_cos` comes from `rope.table`; `bias(mask, T, S)` returns the
    `bias_BHTS` of positions; `layer_cache` is what the layer's cache stores so far.
    """
    q_BTHC = project(p, "q", "btd,dhc->bthc", x_BTD, shard, "batch", "seq", "heads", None)
    k_BTKC = project(p, "k", "btd,dkc->btkc", x_BTD, shard, "batch", "seq", "kv", None)
    v_BTKC = project(p, "v", "btd,dkc->btkc", x_BTD, shard, "batch", "seq", "kv", None)
    if "q_norm" in p:
        assert norm is not None
        q_BTHC, k_BTKC = norm(q_BTHC, p["q_norm"]), norm(k_BTKC, p["k_norm"])
    if sin_cos is not None:
        q_BTHC, k_BTKC = rope.rotate(q_BTHC, sin_cos), rope.rotate(k_BTKC, sin_cos)
    visible, mask, layer_cache = remember(layer_cache, dict(k=k_BTKC, v=v_BTKC), mask, cache)
    k_BSKC, v_BSKC = visible["k"].astype(q_BTHC.dtype), visible["v"].astype(q_BTHC.dtype)
    bias_BHTS = None if bias is None else bias(mask, q_BTHC.shape[1], k_BSKC.shape[1])
    if (prefix := leaf_of(p["k"]).prefix_keys_values()) is not None:
        k_BSKC, v_BSKC = _prepend(prefix[0], k_BSKC, shard), _prepend(prefix[1], v_BSKC, shard)
        mask = dataclasses.replace(mask, common=prefix[0].shape[0])
        bias_BHTS = None if bias_BHTS is None else jnp.pad(bias_BHTS, ((0, 0), (0, 0), (0, 0), (mask.common, 0)))
    a_BTHC = attend(
        q_BTHC, k_BSKC, v_BSKC, mask, shard=shard, scale=scale, softcap=softcap, bias_BHTS=bias_BHTS,
        sinks_H=p.get("sinks"),
    )  # fmt: skip
    a_BTHC = named(a_BTHC, "attended", shard)
    return project(p, "o", "bthc,hcd->btd", a_BTHC, shard, "batch", "seq", None), layer_cache


def _prepend(first_PKC: jax.Array, x_BSKC: jax.Array, shard: Layout) -> jax.Array:
    """Returns `[B, P + S, K, C]`: keys or values that all rows share, then each row's own."""
    axes = ("batch", None, "kv", None)
    # Cast after, so that gradients of all rows add up in the dtype that the shared ones rest in.
    shared_BPKC = jnp.broadcast_to(first_PKC[None], (x_BSKC.shape[0], *first_PKC.shape)).astype(x_BSKC.dtype)
    return jnp.concatenate([shard(shared_BPKC, *axes), shard(x_BSKC, *axes)], 1)


def without_source(layer_cache: dict[str, jax.Array] | None) -> dict[str, jax.Array] | None:
    """Returns what a decoder's layer stores of its own tokens, without what it stores of the source."""
    return layer_cache and {name: x for name, x in layer_cache.items() if not name.startswith("cross_")}


def cross_attention(
    p: dict,
    x_BTD: jax.Array,
    rows: dict[str, Any],
    *,
    shard: Layout,
    scale: float | None = None,
    layer_cache: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Applies attention from `[B, T, D]` to another sequence, `memory`, in segments of the same number.

    Returns `[B, T, D]`, and the memory's keys, values and segments to store in a cache. Without a memory it attends to
    what an earlier call stored. `rows` holds `mask` of the queries' own sequence, `memory` `[B, S, D]` or None, and
    `source_segments` of the memory. `p` holds the weights cross_q, cross_k, cross_v, cross_o with their biases.
    """
    memory_BSD, segments_BT, segments_BS = rows["memory"], rows["mask"].segments_BT, rows["source_segments"]
    q_BTHC = project(p, "cross_q", "btd,dhc->bthc", x_BTD, shard, "batch", "seq", "heads", None)
    if memory_BSD is not None:
        k_BSKC = project(p, "cross_k", "bsd,dkc->bskc", memory_BSD, shard, "batch", "seq", "kv", None)
        v_BSKC = project(p, "cross_v", "bsd,dkc->bskc", memory_BSD, shard, "batch", "seq", "kv", None)
        if segments_BS is None:
            segments_BS = jnp.ones(memory_BSD.shape[:2], jnp.int32)
        at_T = at_S = None
    else:
        assert layer_cache is not None and "cross_k" in layer_cache, "the first call of a cache brings the source"
        seen = numbers(layer_cache)
        k_BSKC, v_BSKC, segments_BS = (seen[n] for n in ("cross_k", "cross_v", "cross_segments"))
        at_T, at_S = jnp.arange(q_BTHC.shape[1]), jnp.arange(k_BSKC.shape[1])
    if segments_BT is None:
        segments_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    # Padding has no source to attend to, but a softmax needs a key: the first one always exists.
    first_B1 = shard(segments_BS, "batch", None)[:, :1]
    segments_BT = jnp.where(segments_BT > 0, segments_BT, first_B1)
    mask = Mask(False, None, segments_BT, segments_BS, at_T=at_T, at_S=at_S)
    dtype = q_BTHC.dtype
    a_BTHC = attend(q_BTHC, k_BSKC.astype(dtype), v_BSKC.astype(dtype), mask, shard=shard, scale=scale)
    a_BTHC = named(a_BTHC, "attended", shard)
    cross_cache = dict(cross_k=k_BSKC, cross_v=v_BSKC, cross_segments=segments_BS)
    if layer_cache is not None:
        own, dtype = layer_cache["k"].dtype, segments_BS.dtype
        cross_cache = encoded(cross_cache, dict(cross_k=own, cross_v=own, cross_segments=dtype))
        cross_cache = {n: jnp.moveaxis(x, 1, SLOTS.get(n, 1)) for n, x in cross_cache.items()}
    return project(p, "cross_o", "bthc,hcd->btd", a_BTHC, shard, "batch", "seq", None), cross_cache


def relative_buckets(distance: jax.Array, buckets: int, longest: int, both_ways: bool) -> jax.Array:
    """Returns the bucket of each distance, the key's position minus the query's (Raffel et al. 2020, section 2.1).

    Near keys have a bucket each, farther ones share them on a logarithmic scale, and all from `longest` on the last.
    Keys ahead have half of the buckets for themselves if `both_ways`, else bucket 0.
    """
    side = buckets // 2 if both_ways else buckets
    near, d = side // 2, np.arange(longest + 1, dtype=np.int32)
    # The host makes a table, as a logarithm that is off by its last bit moves a distance into the next bucket.
    share = np.log(np.maximum(d, 1).astype(np.float32) / np.float32(near)) / np.float32(math.log(longest / near))
    far = near + (share * np.float32(side - near)).astype(np.int32)
    table = jnp.asarray(np.where(d < near, d, np.minimum(far, side - 1)).astype(np.int32))
    if not both_ways:
        return table[jnp.clip(-distance, 0, longest)]
    return table[jnp.minimum(abs(distance), longest)] + jnp.where(distance > 0, jnp.int32(side), jnp.int32(0))


def relative_bias(
    table_NH: jax.Array, mask: Mask, T: int, S: int, *, longest: int, both_ways: bool, shard: Layout
) -> jax.Array:
    """Returns `bias_BHTS` by a key's distance from its query, from T5's table of N buckets; B is 1 unless rows have
    positions of their own.

    Positions must follow each other without gaps.
    """
    t_T, s_S = mask.positions(0, T, 0, S)
    if t_T.ndim == 2:
        buckets_BTS = relative_buckets(s_S[None, None] - t_T[..., None], table_NH.shape[0], longest, both_ways)
        return shard(_rows_of(table_NH, buckets_BTS, shard).transpose(0, 3, 1, 2), None, "heads", "seq", None)
    # All distances lie on a circle: 0, 1 … S - 1, then the negative ones up to -1. Row t of the bias is the circle
    # turned by t. The reshape turns it, as its rows are one shorter than the circles that are laid end to end.
    n = jnp.arange(T + S, dtype=jnp.int32)
    distance = s_S[0] - t_T[0] + jnp.where(n < S, n, n - (T + S))
    buckets_N = relative_buckets(distance, table_NH.shape[0], longest, both_ways)
    circle_HN = _rows_of(table_NH, buckets_N, shard).T
    H = circle_HN.shape[0]
    turned_HN = jnp.broadcast_to(circle_HN[:, None], (H, T, T + S)).reshape(H, T * (T + S))[:, : T * (T + S - 1)]
    return shard(turned_HN.reshape(H, T, T + S - 1)[None, :, :, :S], None, "heads", "seq", None)


def _rows_of(table_NH: jax.Array, buckets: jax.Array, shard: Layout) -> jax.Array:
    """Returns the table's row of each bucket, `[…, H]` in float32."""
    table_NH = shard(jnp.asarray(table_NH, jnp.float32), None, "heads")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_explicit:
        return table_NH[buckets]
    return table_NH.at[buckets].get(out_sharding=shard.spec((*(None for _ in buckets.shape), "heads")))


def kv_cache(
    windows: Sequence[int | None], batch_size: int, length: int, heads: int, width: int, dtype: Any, slack: int = 0
) -> list[dict]:
    """Returns empty keys and values of layers with these windows (None: the whole row), for `cache.empty_cache`.

    `slack` says how many tokens beyond the first one call may read without losing what its window still needs.
    """
    sizes = [num_slots(window, length, slack) for window in windows]
    return [
        dict(k=jnp.zeros((batch_size, heads, width, n), dtype), v=jnp.zeros((batch_size, heads, n, width), dtype))
        for n in sizes
    ]
