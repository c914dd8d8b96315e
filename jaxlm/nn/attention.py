"""Attention behind one function: causal, bidirectional, prefix, sliding window, segments, bias, soft cap, sinks, cache.

B batch, T query position, S key position, H heads, K key/value heads, G = H / K, C head width.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn import context_parallel
from jaxlm.nn.kernels import splash_attention
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import Mask
from jaxlm.runtime.mesh import platform


def unavailable(
    implementation: str,
    mask: Mask,
    bias: bool,
    softcap: float | None,
    dtype: str,
    sinks: bool = False,
    widths: tuple[int, int] = (0, 0),
    split: str = "",
    lengths: tuple[int, int] = (0, 0),
) -> str | None:
    """Why an implementation can't answer this request here, or None if it can. `widths` and `lengths`: of keys and
    values, and of queries and keys, where they are known; `split`: how rows are split, if so."""
    if implementation == "xla":
        return None
    needs, which = {"cudnn": ("gpu", "an NVIDIA GPU"), "splash": ("tpu", "a TPU")}[implementation]
    if platform() != needs:
        return f"needs {which}, and this program runs on {platform()}"
    if split not in ("", "heads"):
        return f"takes whole rows, which mesh.context_by={split} does not give it; set mesh.context_by=heads"
    if widths[0] != widths[1]:
        return f"has one width for keys and values, not {widths[0]} and {widths[1]}"
    if implementation == "splash":
        return splash_attention.lacks(mask, bias, lengths)
    if dtype != "bfloat16":
        return f"computes in bfloat16, not {dtype}; set execution.dtype=bfloat16"
    if softcap is not None:
        return "has no soft cap"
    return "has no attention sinks" if sinks else None


def choose(implementation: str, *request: Any, **more: Any) -> tuple[str, str]:
    """The implementation for a request (as `unavailable` takes it) and the reason. One that was asked for by name and
    can't run is an error."""
    if implementation != "auto":
        why = unavailable(implementation, *request, **more)
        if why:
            raise ValueError(f"execution.attention: {implementation} {why}; use auto or xla")
        return implementation, "asked for by execution.attention"
    fused, of = ("splash", "TPU") if platform() == "tpu" else ("cudnn", "GPU")
    why = unavailable(fused, *request, **more)
    return (fused, f"fused kernel of this {of}") if why is None else ("xla", f"{fused} {why}")


def attend(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    mask: Mask,
    *,
    shard: Layout,
    scale: float | None = None,
    softcap: float | None = None,
    bias_BHTS: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention → `[B, T, H, C of v]`. Scores and softmax in float32. Every query must see at least one key.

    `scale` defaults to C^-1/2; `softcap` squashes scores as cap·tanh(score / cap) (Gemma 2); grouped-query where K < H;
    `bias_BHTS` is added to the scores (B may be 1); `sinks_H` joins each softmax as one more score without a value.
    """
    scale = q_BTHC.shape[-1] ** -0.5 if scale is None else scale
    split = shard.mesh.context_by if context_parallel.ways(shard) > 1 and mask.at_T is None else ""
    if mask.at_T is None:
        asked, dtype, bias = shard.execution.attention, shard.execution.dtype, bias_BHTS is not None
        widths = k_BSKC.shape[-1], v_BSKC.shape[-1]
        lengths = q_BTHC.shape[1], k_BSKC.shape[1]
        name, _ = choose(asked, mask, bias, softcap, dtype, sinks_H is not None, widths, split, lengths)
    else:  # a few queries against a cache: bound by reading it, whatever the kernel
        name = "xla"
    if split == "ring":
        return context_parallel.ring(
            q_BTHC, k_BSKC, v_BSKC, mask, shard=shard, scale=scale, softcap=softcap, bias_BHTS=bias_BHTS,
            sinks_H=sinks_H,
        )  # fmt: skip
    inner = shard
    if split == "heads":
        inner, copies = context_parallel.by_heads(shard, q_BTHC.shape[2], k_BSKC.shape[2])
        k_BSKC, v_BSKC = (context_parallel.exchanged(inner, x, copies, shard) for x in (k_BSKC, v_BSKC))
        q_BTHC = inner(q_BTHC, "batch", "seq", "heads", None)
        if bias_BHTS is not None:
            bias_BHTS = inner(bias_BHTS, None if bias_BHTS.shape[0] == 1 else "batch", "heads", "seq", None)
        sinks_H = None if sinks_H is None else inner(sinks_H, "heads")
    else:  # queries stay where they are, and every device gathers the keys
        k_BSKC, v_BSKC = (shard(x, "batch", None, "kv", None) for x in (k_BSKC, v_BSKC))
    names = ("segments_BS", "prefix_BS") + (("segments_BT",) if inner is not shard else ())
    whole: dict[str, Any] = {n: inner(x, "batch", None) for n in names if (x := getattr(mask, n)) is not None}
    mask = dataclasses.replace(mask, **whole)
    if name == "splash":
        o_BTHC = splash_attention.attend(
            q_BTHC, k_BSKC, v_BSKC, mask, shard=inner, scale=scale, softcap=softcap, sinks_H=sinks_H
        )
    else:
        run: Any = {"xla": partial(_xla, whole=context_parallel.ways(inner) == 1), "cudnn": _cudnn}[name]
        o_BTHC = run(q_BTHC, k_BSKC, v_BSKC, mask, scale, softcap, bias_BHTS, sinks_H)
    return shard(o_BTHC, "batch", "seq", "heads", None)


def _cudnn(q_BTHC, k_BSKC, v_BSKC, mask, scale, softcap, bias_BHTS, sinks_H):
    dense = mask.segments_BT is not None or mask.prefix_BS is not None or mask.window or mask.common
    seen = mask.dense(0, q_BTHC.shape[1], 0, k_BSKC.shape[1]) if dense else None
    return jax.nn.dot_product_attention(
        q_BTHC,
        k_BSKC,
        v_BSKC,
        bias=None if bias_BHTS is None else bias_BHTS.astype(q_BTHC.dtype),
        mask=None if seen is None else seen[:, None],
        is_causal=mask.causal and seen is None,
        scale=scale,
        implementation="cudnn",
    )


BLOCK = 128  # queries a block: scores of a few heads fit a CPU's cache, and the causal half is skipped
MOST_BLOCKS = 16
KEEP_SCORES = 512  # positions up to which the backward pass keeps a block's scores instead of computing them again


def _xla(q_BTHC, k_BSKC, v_BSKC, mask, scale, softcap, bias_BHTS, sinks_H, whole):
    """Plain XLA in blocks of queries: each sees only the keys that causality and the window can reach, so that all
    scores never exist at one time. Operands are laid out once so that every product is a plain batched matrix product.
    """
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    q_BKTGC = (q_BTHC * jnp.asarray(scale, q_BTHC.dtype)).reshape(B, T, K, H // K, C).transpose(0, 2, 1, 3, 4)
    k_BKCS, v_BKSC = k_BSKC.transpose(0, 2, 3, 1), v_BSKC.transpose(0, 2, 1, 3)
    block: Any = partial(_block, softcap=softcap)
    if S > KEEP_SCORES:
        block = jax.checkpoint(block)
    out = []
    for start, stop, first, last in query_blocks(T, S, mask) if whole else [(0, T, 0, S)]:
        bias = None if bias_BHTS is None else bias_BHTS[:, :, start:stop, first:last]
        seen = mask.dense(start, stop, first, last)
        q, k, v = q_BKTGC[:, :, start:stop], k_BKCS[..., first:last], v_BKSC[:, :, first:last]
        out.append(block(q, k, v, seen, bias, sinks_H))
    o_BKTGC = out[0] if len(out) == 1 else jnp.concatenate(out, 2)
    return o_BKTGC.transpose(0, 2, 1, 3, 4).reshape(B, T, H, v_BSKC.shape[-1])


def query_blocks(T: int, S: int, mask: Mask) -> list[tuple[int, int, int, int]]:
    """(first query, end, first key, end) of each block. One block where blocks would gain nothing."""
    if T != S or T <= BLOCK or mask.prefix_BS is not None:
        return [(0, T, 0, S)]
    size = max(BLOCK, -(-T // MOST_BLOCKS))
    out = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        first = max(0, start - mask.window + 1) if mask.window is not None else 0
        last = stop if mask.causal else S if mask.window is None else min(S, stop + mask.window - 1)
        out.append((start, stop, first, last))
    return out


def _block(q_BKTGC, k_BKCS, v_BKSC, seen, bias_BHTS, sinks_H, softcap):
    B, K, T, G, C = q_BKTGC.shape
    # Positions and a group's heads are the rows of one matrix; on a mesh either may be sharded, and XLA merges them.
    rows = (T * G,) if jax.sharding.get_abstract_mesh().empty else (T, G)
    q_BKRC = q_BKTGC.reshape(B, K, *rows, C)
    s_BKRS = jnp.einsum("bk...c,bkcs->bk...s", q_BKRC, k_BKCS, preferred_element_type=jnp.float32)
    s_BKTGS = s_BKRS.reshape(B, K, T, G, -1)
    if softcap is not None:
        s_BKTGS = softcap * jnp.tanh(s_BKTGS / softcap)
    if bias_BHTS is not None:
        b, _, t, s = bias_BHTS.shape
        s_BKTGS += bias_BHTS.reshape(b, K, G, t, s).swapaxes(2, 3).astype(jnp.float32)
    if seen is not None:
        s_BKTGS = jnp.where(seen[:, None, :, None], s_BKTGS, -1e30)
    p_BKTGS = jax.nn.softmax(s_BKTGS, -1) if sinks_H is None else _softmax_with(s_BKTGS, sinks_H.reshape(K, G))
    p_BKRS = p_BKTGS.astype(v_BKSC.dtype).reshape(s_BKRS.shape)
    return jnp.einsum("bk...s,bksc->bk...c", p_BKRS, v_BKSC).reshape(B, K, T, G, -1)


def _softmax_with(s_BKTGS: jax.Array, sinks_KG: jax.Array) -> jax.Array:
    """Softmax over scores and a sink, without the sink's share."""
    sink = sinks_KG[None, :, None, :, None].astype(jnp.float32)
    top = jax.lax.stop_gradient(jnp.maximum(s_BKTGS.max(-1, keepdims=True), sink))
    e_BKTGS = jnp.exp(s_BKTGS - top)
    return e_BKTGS / (e_BKTGS.sum(-1, keepdims=True) + jnp.exp(sink - top))
