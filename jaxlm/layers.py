"""What Transformers are made of.

B batch, T query position, S key position, D model width, H heads, K key/value heads, C head width, V vocabulary.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from jaxlm import config, pipeline, rope
from jaxlm.attention import SLOTS, Cache, Mask, attend, remember, ring
from jaxlm.params import Spec
from jaxlm.sharding import Layout, but_gathered, own_einsum, platform


class Output(struct.PyTreeNode):
    """What a model's `forward` returns."""

    x_BTD: jax.Array
    """The last layer's output, normalised: what `readout` and task heads take."""
    aux_B: jax.Array | None = None
    """Auxiliary loss of each row, a mean over its tokens with its coefficients applied (a router's balance)."""
    cache: Cache | None = None
    shown_B: dict[str, jax.Array] | None = None
    """Figures of each row to show by name, means over its tokens (the share that found no place at an expert)."""


# By the names that published configurations use.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

# Activations by the name of the weight whose product they are, `attended` (attention's result) and `input` (a block's),
# that each of these kinds of remat keeps for the backward pass; the rest is computed again.
QKV = ("q", "k", "v", "cross_q", "cross_k", "cross_v", "q_b", "kv_a", "k_rotated")
KEPT: dict[str, tuple[str, ...]] = {"attention": (*QKV, "attended", "o", "cross_o"), "qkv": QKV, "full": ()}


def remat_policy(e: config.Execution) -> Any:
    """Which results of the forward pass a block keeps, and which of them in the host's memory."""
    policies, host = jax.checkpoint_policies, [name for name in e.offload if name != "optimizer"]
    if e.remat not in KEPT:
        if host:
            raise ValueError(
                f"execution.offload: {host[0]} needs execution.remat={', '.join(KEPT)}; with {e.remat} "
                "other activations than these are kept"
            )
        return but_gathered if e.remat == "none" else policies.dots_with_no_batch_dims_saveable
    saved = [name for name in KEPT[e.remat] if name not in host]
    if host:
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=saved, names_which_can_be_offloaded=host, offload_src="device",
            offload_dst="pinned_host",
        )  # fmt: skip
    return policies.save_only_these_names(*saved) if saved else policies.nothing_saveable


def _named(x: jax.Array, name: str, shard: Layout) -> jax.Array:
    """For `remat_policy`; without a policy that asks for names programs stay as they are."""
    return checkpoint_name(x, name) if shard.execution.remat in KEPT else x


def layer_norm(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, eps: float) -> jax.Array:
    """In float32 whatever the compute dtype (Ba et al. 2016)."""
    x = x_BTD.astype(jnp.float32)
    mean = jnp.mean(x, -1, keepdims=True)
    x -= mean
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
    wide = (1,) * (x.ndim - 1) + (-1,)
    y *= scale_D.reshape(wide).astype(jnp.float32)
    if bias_D is not None:
        y += bias_D.reshape(wide).astype(jnp.float32)
    return y.astype(x_BTD.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Over the dimensions of `scale`, in float32 whatever the compute dtype (Zhang & Sennrich 2019)."""
    over = tuple(range(-scale.ndim, 0))
    wide = x.astype(jnp.float32)
    y = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), over, keepdims=True) + eps)
    return (y * scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape).astype(jnp.float32)).astype(x.dtype)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape).astype(x.dtype)


def embed(table_VD: Any, ids_BT: jax.Array, shard: Layout, rows: str | None = "vocab") -> jax.Array:
    """Rows of a table, in the compute dtype. The table stays float32 so that repeated tokens' gradients add up exactly.

    `rows` is the logical axis of the table's rows: None for positions and token types.
    """
    if hasattr(table_VD, "virtual"):
        x_BTD = embed(table_VD.base, jnp.minimum(ids_BT, table_VD.shape[0] - 1), shard, rows)
        return table_VD.virtual(x_BTD, ids_BT, shard)
    cut = _by_width(shard, table_VD.shape[1])
    table_VD, ids_BT = cut(table_VD, rows, "width"), cut(ids_BT, "batch", "seq")
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.are_all_axes_explicit:
        x_BTD = table_VD.at[ids_BT].get(out_sharding=cut.spec(("batch", "stream", "width")))
    else:
        x_BTD = cut(jnp.take(table_VD, ids_BT, axis=0), "batch", "stream", "width")
    return shard(x_BTD.astype(shard.dtype), "batch", "stream", None)


def _by_width(shard: Layout, width: int) -> Layout:
    """Where the devices that share a table cut it by its width, a layout in which each looks its part of the width up
    for the batch rows of all of them: an all-to-all of the results then stands for gathering the table, and the table's
    gradient is never whole on any device."""
    mesh, batch, stored = jax.sharding.get_abstract_mesh(), shard.over("batch"), shard.over("embed", shard.store)
    if mesh.empty or not set(stored) & set(batch):
        return shard
    first = min(batch.index(a) for a in stored if a in batch)
    if not set(stored) <= set(batch) or width % math.prod(mesh.shape[a] for a in batch[first:]):
        return shard
    return dataclasses.replace(shard, compute={**shard.compute, "batch": batch[:first], "width": batch[first:]})


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share `rate` and scale the rest; without a key (evaluation) the identity."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def subkeys(key: jax.Array | None, n: int) -> list[jax.Array | None]:
    """`n` dropout keys, or `n` times None in evaluation."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def project(p: dict, name: str, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
    """`x` times the weight `name`, plus `name_bias` where the model has one, and what an adapter makes of it."""
    y = shard.einsum(eq, x, p[name], *axes)
    y = _named(add_bias(y, p[f"{name}_bias"]) if f"{name}_bias" in p else y, name, shard)
    return p[name].after(y, shard) if hasattr(p[name], "after") else y


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
    kept: Any = None,
) -> tuple[jax.Array, Any]:
    """`[B, T, D]` → `[B, T, D]` and what the layer's cache keeps.

    Weights q (D H C), k and v (D K C), o (H C D) with their biases; q_norm and k_norm (over what their shape covers),
    `sinks` (H). `sin_cos` from `rope.table`; `bias(mask, T, S)` gives `bias_BHTS` of positions.
    """
    q_BTHC = project(p, "q", "btd,dhc->bthc", x_BTD, shard, "batch", "seq", "heads", None)
    k_BTKC = project(p, "k", "btd,dkc->btkc", x_BTD, shard, "batch", "seq", "kv", None)
    v_BTKC = project(p, "v", "btd,dkc->btkc", x_BTD, shard, "batch", "seq", "kv", None)
    if "q_norm" in p:
        assert norm is not None
        q_BTHC, k_BTKC = norm(q_BTHC, p["q_norm"]), norm(k_BTKC, p["k_norm"])
    if sin_cos is not None:
        q_BTHC, k_BTKC = rope.rotate(q_BTHC, sin_cos), rope.rotate(k_BTKC, sin_cos)
    seen, mask, kept = remember(kept, dict(k=k_BTKC, v=v_BTKC), mask, cache)
    k_BSKC, v_BSKC = seen["k"].astype(q_BTHC.dtype), seen["v"].astype(q_BTHC.dtype)
    bias_BHTS = None if bias is None else bias(mask, q_BTHC.shape[1], k_BSKC.shape[1])
    if hasattr(p["k"], "keys_PKC"):
        k_BSKC, v_BSKC = _after(p["k"].keys_PKC, k_BSKC, shard), _after(p["k"].values_PKC, v_BSKC, shard)
        mask = dataclasses.replace(mask, common=p["k"].keys_PKC.shape[0])
        bias_BHTS = None if bias_BHTS is None else jnp.pad(bias_BHTS, ((0, 0), (0, 0), (0, 0), (mask.common, 0)))
    a_BTHC = attend(
        q_BTHC, k_BSKC, v_BSKC, mask, shard=shard, scale=scale, softcap=softcap, bias_BHTS=bias_BHTS,
        sinks_H=p.get("sinks"),
    )  # fmt: skip
    a_BTHC = _named(a_BTHC, "attended", shard)
    return project(p, "o", "bthc,hcd->btd", a_BTHC, shard, "batch", "seq", None), kept


def _after(first_PKC: jax.Array, x_BSKC: jax.Array, shard: Layout) -> jax.Array:
    """`[B, P + S, K, C]`: what is the same for all rows, then the rows' own."""
    home = ("batch", None, "kv", None)
    front = jnp.broadcast_to(first_PKC[None].astype(x_BSKC.dtype), (x_BSKC.shape[0], *first_PKC.shape))
    return jnp.concatenate([shard(front, *home), shard(x_BSKC, *home)], 1)


def own(kept: dict[str, jax.Array] | None) -> dict[str, jax.Array] | None:
    """What a decoder's layer keeps of its own tokens, without what it keeps of the source."""
    return kept and {name: x for name, x in kept.items() if not name.startswith("cross_")}


def cross_attention(
    p: dict,
    x_BTD: jax.Array,
    rows: dict[str, Any],
    *,
    shard: Layout,
    scale: float | None = None,
    kept: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`[B, T, D]` that looks at another sequence, `memory`, in segments of the same number → what it saw, and its keys,
    values and segments to keep. Without a memory it looks at what an earlier call kept.

    `rows`: `mask` of its own sequence, `memory` `[B, S, D]` or None, and `source_segments` of that.

    Weights cross_q, cross_k, cross_v, cross_o with their biases.
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
        assert kept is not None and "cross_k" in kept, "the first call of a cache brings the source"
        k_BSKC, v_BSKC, segments_BS = (
            jnp.moveaxis(kept[n], SLOTS.get(n, 1), 1) for n in ("cross_k", "cross_v", "cross_segments")
        )
        at_T, at_S = jnp.arange(q_BTHC.shape[1]), jnp.arange(k_BSKC.shape[1])
    if segments_BT is None:
        segments_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    # Padding has no source to look at; any key will do, and the first one is always there.
    first_B1 = shard(segments_BS, "batch", None)[:, :1]
    segments_BT = jnp.where(segments_BT > 0, segments_BT, first_B1)
    mask = Mask(False, None, segments_BT, segments_BS, at_T=at_T, at_S=at_S)
    dtype = q_BTHC.dtype
    a_BTHC = attend(q_BTHC, k_BSKC.astype(dtype), v_BSKC.astype(dtype), mask, shard=shard, scale=scale)
    a_BTHC = _named(a_BTHC, "attended", shard)
    keep = dict(cross_k=k_BSKC, cross_v=v_BSKC, cross_segments=segments_BS)
    if kept is not None:
        keep = {n: jnp.moveaxis(x, 1, SLOTS.get(n, 1)) for n, x in keep.items()}
        keep = {n: x if n == "cross_segments" else x.astype(kept["k"].dtype) for n, x in keep.items()}
    return project(p, "cross_o", "bthc,hcd->btd", a_BTHC, shard, "batch", "seq", None), keep


def mlp(p: dict, x_BTD: jax.Array, activation: str, shard: Layout) -> jax.Array:
    """up (D F), activation, down (F D); with `gate` (D F) the activated gate times up (Shazeer 2020)."""
    act = ACTIVATIONS[activation]
    up_BTF = project(p, "up", "btd,df->btf", x_BTD, shard, "batch", "seq", "ffn")
    if "gate" in p:
        h_BTF = act(project(p, "gate", "btd,df->btf", x_BTD, shard, "batch", "seq", "ffn")) * up_BTF
    else:
        h_BTF = act(up_BTF)
    y_BTD = project(p, "down", "btf,fd->btd", h_BTF, shard, "batch", "seq", None)
    more_BTD = p["up"].beside(x_BTD, shard) if hasattr(p["up"], "beside") else None
    return y_BTD if more_BTD is None else y_BTD + more_BTD


def relative_buckets(distance: jax.Array, buckets: int, longest: int, both_ways: bool) -> jax.Array:
    """Bucket of each distance, key's place minus query's (Raffel et al. 2020, section 2.1).

    Near keys have a bucket each, farther ones share them on a logarithmic scale, and all from `longest` on the last.
    Keys ahead have half of the buckets for themselves if `both_ways`, else bucket 0.
    """
    side = buckets // 2 if both_ways else buckets
    near, d = side // 2, np.arange(longest + 1, dtype=np.int32)
    # A table made by the host: a logarithm that is off by its last bit moves a distance into the next bucket.
    share = np.log(np.maximum(d, 1).astype(np.float32) / np.float32(near)) / np.float32(math.log(longest / near))
    far = near + (share * np.float32(side - near)).astype(np.int32)
    table = jnp.asarray(np.where(d < near, d, np.minimum(far, side - 1)).astype(np.int32))
    if not both_ways:
        return table[jnp.clip(-distance, 0, longest)]
    return table[jnp.minimum(abs(distance), longest)] + jnp.where(distance > 0, jnp.int32(side), jnp.int32(0))


def relative_bias(
    table_NH: jax.Array, mask: Mask, T: int, S: int, *, longest: int, both_ways: bool, shard: Layout
) -> jax.Array:
    """`bias_BHTS` (B = 1) by how far a key is from its query, from T5's table of N buckets. Places have no gaps."""
    t_T, s_S = mask.places(0, T, 0, S)
    # All distances on a circle: 0, 1 … S - 1, then the negative ones up to -1. Row t of the bias is the circle turned
    # by t, which the reshape does: its rows are one shorter than what is laid end to end.
    n = jnp.arange(T + S, dtype=jnp.int32)
    distance = s_S[0] - t_T[0] + jnp.where(n < S, n, n - (T + S))
    buckets_N = relative_buckets(distance, table_NH.shape[0], longest, both_ways)
    table_HN = shard(jnp.asarray(table_NH, jnp.float32), None, "heads").T
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.are_all_axes_explicit:
        line_HN = table_HN.at[:, buckets_N].get(out_sharding=shard.spec(("heads", None)))
    else:
        line_HN = table_HN[:, buckets_N]
    H = line_HN.shape[0]
    turned_HN = jnp.broadcast_to(line_HN[:, None], (H, T, T + S)).reshape(H, T * (T + S))[:, : T * (T + S - 1)]
    return shard(turned_HN.reshape(H, T, T + S - 1)[None, :, :, :S], None, "heads", "seq", None)


def kv_cache(
    kinds: Sequence[int | None], rows: int, length: int, heads: int, width: int, dtype: Any, slack: int = 0
) -> list[dict]:
    """Empty keys and values of layers with such windows (None: the whole row), for `attention.empty_cache`.

    `slack`: tokens that one call may read on by, beyond the first, without losing what its window still needs.
    """
    sizes = [ring(window, length, slack) for window in kinds]
    return [
        dict(k=jnp.zeros((rows, heads, width, n), dtype), v=jnp.zeros((rows, heads, n, width), dtype)) for n in sizes
    ]


# (weights, x, what else belongs to its rows, dropout key, kind of layer, what its cache keeps) → (x, what it keeps)
Block = Callable[[Any, Any, Any, jax.Array | None, Any, Any], tuple[Any, Any]]


def scanned(shard: Layout) -> bool:
    """Whether layers are a loop. XLA runs a loop's body slower on a CPU: unrolled, a forward took 0.6 of the time."""
    choice = shard.execution.scan
    return platform() != "cpu" if choice is None else choice


def run_blocks(
    block: Block,
    params: Any,
    specs: Any,
    x: Any,
    rows: Any = None,
    *,
    shard: Layout,
    key: jax.Array | None,
    kinds: Sequence[Any] | None = None,
    cache: Cache | None = None,
) -> tuple[Any, Cache | None]:
    """Apply layers in order, scanned or unrolled, with remat by name → (x, cache with what the layers keep).

    `params` is one tree of weights stacked along their first axis, or a tuple of trees, one a layer. `rows` holds all
    arrays `[B, …]` that blocks need besides `x`: they may be handed a part of the rows, so no block may take such from
    elsewhere. `kinds` says what differs between layers but their weights (a window, no rotation); it is static. A
    scan's body holds one period of the kinds. With a cache layers are always unrolled: a scan would copy the whole
    cache for each token. On a mesh with stages each has its part of the layers, but for a stack of fewer layers than
    stages, and with a cache: then all stages compute the same.
    """
    split = isinstance(params, tuple)
    n = len(params) if split else jax.tree.leaves(params)[0].shape[0]
    kinds = [None] * n if kinds is None else list(kinds)
    assert len(kinds) == n
    keys: Any = None if key is None else jax.random.split(key, n)

    def layer(kind: Any, x: Any, rows: Any, p: Any, k: Any, kept: Any) -> tuple[Any, Any]:
        x = jax.tree.map(lambda a: _named(a, "input", shard), x)
        return block(_gathered(p, specs, shard), x, rows, k, kind, kept)

    again: Any = lambda f, **_: f  # noqa: E731
    if cache is None and (shard.execution.remat != "none" or shard.gathers):
        again = partial(jax.checkpoint, policy=remat_policy(shard.execution), prevent_cse=not scanned(shard))
    if cache is None and not split and 1 < pipeline.stages() <= n:
        each = pipeline.depth(pipeline.stages(), shard.mesh.rounds, kinds)

        def stage(params: Any, x: Any, rows: Any, keys: Any) -> Any:
            return _in_order(layer, kinds[:each], x, rows, params, keys, shard)

        stage = again(stage)  # all of a stage's layers are computed again, from what the stage was handed
        return pipeline.run(stage, each, params, x, rows, keys, shard=shard), None
    layer = again(layer, static_argnums=0)
    if cache is None and not split:
        return _in_order(layer, kinds, x, rows, params, keys, shard), None
    kept = []
    for i in range(n):
        p = params[i] if split else jax.tree.map(lambda w, i=i: w[i], params)
        x, now = layer(
            kinds[i], x, rows, p, None if keys is None else keys[i], None if cache is None else cache.layers[i]
        )
        kept.append(now)
    return x, None if cache is None else cache.replace(layers=tuple(kept), fresh=False)


def _in_order(layer: Any, kinds: Sequence[Any], x: Any, rows: Any, params: Any, keys: Any, shard: Layout) -> Any:
    """Stacked layers one after another, scanned or unrolled; `keys` is None or one a layer."""
    n = len(kinds)
    if not scanned(shard):
        for i in range(n):
            p, k = jax.tree.map(lambda w, i=i: w[i], (params, keys))
            x, _ = layer(kinds[i], x, rows, p, k, None)
        return x
    for start, stop, period in stretches(kinds):

        def several(x: Any, inputs: Any, first: int = start, period: int = period) -> tuple[Any, None]:
            for i in range(period):
                p, k = jax.tree.map(lambda w, i=i: w[i], inputs) if period > 1 else inputs
                x, _ = layer(kinds[first + i], x, rows, p, k, None)
            return x, None

        def cut(w: jax.Array, start: int = start, stop: int = stop, period: int = period) -> jax.Array:
            w = w if stop - start == n else w[start:stop]
            return w if period == 1 else w.reshape(-1, period, *w.shape[1:])

        x, _ = jax.lax.scan(several, x, jax.tree.map(cut, (params, keys)))
    return x


def run_stacks(
    block: Block,
    stacks: Sequence[tuple[Any, Any, Sequence[Any]]],
    x: Any,
    rows: Any = None,
    *,
    shard: Layout,
    key: jax.Array | None,
    cache: Cache | None = None,
) -> tuple[Any, Cache | None]:
    """`run_blocks` over (params, specs, kinds) one after another: layers whose weights differ in shape."""
    kept: tuple = ()
    for (params, specs, kinds), k in zip(stacks, subkeys(key, len(stacks)), strict=True):
        part = None if cache is None else cache.replace(layers=cache.layers[len(kept) : len(kept) + len(kinds)])
        x, part = run_blocks(block, params, specs, x, rows, shard=shard, key=k, kinds=kinds, cache=part)
        kept += () if part is None else part.layers
    return x, None if cache is None else cache.replace(layers=kept, fresh=False)


def layout_of(s: Spec, shard: Layout) -> Layout:
    """The layout that a layer's weight is used by. Routers stay float32: a rounded score sends tokens elsewhere."""
    if "router" not in s.axes:
        return shard
    return dataclasses.replace(shard, execution=dataclasses.replace(shard.execution, dtype="float32"))


def _gathered(params: Any, specs: Any, shard: Layout) -> Any:
    """Weights as a block uses them."""
    return jax.tree.map(lambda w, s: layout_of(s, shard).gather(w, s), params, specs, is_leaf=own_einsum)


def stretches(kinds: Sequence[Any]) -> list[tuple[int, int, int]]:
    """(first layer, end, period) of each loop over layers: one for a repeating pattern and one for what it leaves over;
    where nothing repeats, one for each run of equal layers."""
    n = len(kinds)
    for period in range(1, n // 2 + 1):
        if all(kinds[i] == kinds[i % period] for i in range(n)):
            whole = n // period * period
            return [(0, whole, period)] + ([(whole, n, n - whole)] if whole < n else [])
    ends = list(itertools.accumulate(len(list(run)) for _, run in itertools.groupby(kinds)))
    return [(a, b, 1) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def pattern(values: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest prefix that, repeated, gives all of them: (a, b, a, b, a) → (a, b)."""
    for n in range(1, len(values)):
        if all(v == values[i % n] for i, v in enumerate(values)):
            return tuple(values[:n])
    return tuple(values)
