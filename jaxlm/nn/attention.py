"""Computes attention behind one function: causal, bidirectional, prefix, sliding window, segments, bias, soft cap,
sinks and cache.

B batch, T query position, S key position, H heads, K key/value heads, G = H / K, C head width.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn import context_parallel, pipeline, ring_attention
from jaxlm.nn.kernels import packed_attention, splash_attention
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import Mask
from jaxlm.nn.merged_rows import with_merged_rows
from jaxlm.runtime import chips
from jaxlm.runtime.mesh import devices, is_mapped, platform


@dataclass(frozen=True)
class AttentionChoice:
    """An AttentionChoice says which implementation answers a request, and why."""

    implementation: str
    """The name of the implementation: xla, cudnn or splash."""
    reason: str
    dense: str = ""
    """Why documents of a row are kept apart by an array of all pairs of positions; empty: no such array is made."""

    def describe(self, one_document: bool = False) -> str:
        """Returns the choice as people read it: `xla (why)`. `one_document` says whether each row is known to be
        one."""
        if self.implementation != "cudnn":
            return f"{self.implementation} ({self.reason})"
        if one_document:
            return f"cudnn ({self.reason}; each row is one document)"
        how = f"a mask of all pairs, as {self.dense}" if self.dense else "where they begin and end"
        return f"cudnn ({self.reason}; documents of a row by {how})"


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
    """Returns why an implementation can't answer this request here, or None if it can.

    `bias` and `sinks` say whether the request has them. `widths` are those of keys and values, and `lengths` those of
    queries and keys, where they are known (else 0). `split` is the `mesh.context_by` by which devices share a row's
    positions, or empty where each has whole rows.
    """
    if implementation == "xla":
        return None
    needed_platform, description = {"cudnn": ("gpu", "an NVIDIA GPU"), "splash": ("tpu", "a TPU")}[implementation]
    if platform() != needed_platform:
        return f"needs {description}, and this program runs on {platform()}"
    if split not in ("", "heads"):
        return f"takes whole rows, which mesh.context_by={split} does not give it; set mesh.context_by=heads"
    if widths[0] != widths[1]:
        return f"has one width for keys and values, not {widths[0]} and {widths[1]}"
    if implementation == "splash":
        return splash_attention.unavailable(mask, bias, lengths)
    if dtype != "bfloat16":
        return f"computes in bfloat16, not {dtype}; set execution.dtype=bfloat16"
    if softcap is not None:
        return "has no soft cap"
    if sinks:
        return "has no attention sinks"
    capability = chips.compute_capability(devices()[0])
    widest = 128 if capability is not None and capability < (9, 0) else 256
    if widths[0] % 8 or widths[0] > widest:
        return f"takes heads whose width is a multiple of 8 up to {widest} on this GPU, not {widths[0]}"
    return None


def choose(
    implementation: str, mask: Mask, bias: bool, *request: Any, mapped: bool = False, **options: Any
) -> AttentionChoice:
    """Returns the implementation for a request, which is given as to `unavailable`, and the reason.

    `mapped` says whether `jax.vmap` maps it, over workers that train apart or a pipeline's stages. Raises ValueError
    where an implementation is asked for by name that can't answer the request.
    """

    def chosen(implementation: str, reason: str) -> AttentionChoice:
        dense = packed_attention.unavailable(mask, bias, mapped) if implementation == "cudnn" else None
        return AttentionChoice(implementation, reason, dense or "")

    if implementation != "auto":
        obstacle = unavailable(implementation, mask, bias, *request, **options)
        if obstacle:
            raise ValueError(f"execution.attention: {implementation} {obstacle}; use auto or xla")
        return chosen(implementation, "asked for by execution.attention")
    fused, device = ("splash", "TPU") if platform() == "tpu" else ("cudnn", "GPU")
    obstacle = unavailable(fused, mask, bias, *request, **options)
    if obstacle is None:
        return chosen(fused, f"fused kernel of this {device}")
    return AttentionChoice("xla", f"{fused} {obstacle}")


@dataclass(frozen=True)
class Request:
    """A Request is what a layer asks of attention, and which implementation answers it."""

    choice: AttentionChoice
    shape: tuple[int, int, int, int]
    """Positions, heads of queries and of keys, and their width."""
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    special: str
    """What else is asked for, in words: a bias, sinks, keys of another sequence; empty: nothing."""


_requests: contextvars.ContextVar[list[Request] | None] = contextvars.ContextVar("requests", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Request]]:
    """Yields the list of unlike requests that programs make which are traced within its context; those that read a
    cache are left out."""
    requests: list[Request] = []
    token = _requests.set(requests)
    try:
        yield requests
    finally:
        _requests.reset(token)


def _record(choice: AttentionChoice, q_BTHC: Any, k_BSKC: Any, mask: Mask, scale: float, softcap: float | None,
            special: dict[str, bool]) -> None:  # fmt: skip
    if (requests := _requests.get()) is None:
        return
    shape = (q_BTHC.shape[1], q_BTHC.shape[2], k_BSKC.shape[2], q_BTHC.shape[3])
    words = ", ".join(what for what, asked in special.items() if asked)
    one = Request(choice, shape, mask.causal, mask.window, scale, softcap, words)
    if one not in requests:
        requests.append(one)


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
    """Returns softmax attention, `[B, T, H, C of v]`. Every query must see at least one key.

    Scores and softmax are computed in float32. `scale` defaults to C^-1/2; `softcap` squashes scores as
    cap·tanh(score/cap) (Gemma 2); heads of queries share heads of keys where K < H; `bias_BHTS` is added to the scores
    (B may be 1); `sinks_H` joins each softmax as one more score without a value.
    """
    scale = q_BTHC.shape[-1] ** -0.5 if scale is None else scale
    split = shard.mesh.context_by if context_parallel.num_devices(shard) > 1 and mask.at_T is None else ""
    if shard.shared_keys and mask.packed:
        mask = dataclasses.replace(mask, packed=False)
    elif shard.one_document and mask.packed and mask.causal and mask.prefix_BS is None:
        mask = dataclasses.replace(mask, segments_BT=None, segments_BS=None)  # padding comes last: nobody sees it
    dense = ""
    if mask.at_T is None:
        requested, dtype, bias = shard.execution.attention, shard.execution.dtype, bias_BHTS is not None
        widths = k_BSKC.shape[-1], v_BSKC.shape[-1]
        lengths = q_BTHC.shape[1], k_BSKC.shape[1]
        choice = choose(requested, mask, bias, softcap, dtype, sinks_H is not None, widths, split, lengths)
        implementation, dense = choice.implementation, choice.dense
        special = {"a bias": bias, "sinks": sinks_H is not None, "other keys": not mask.packed}
        _record(choice, q_BTHC, k_BSKC, mask, scale, softcap, special)
    else:  # a few queries against a cache take the time of reading it, whatever the kernel
        implementation = "xla"
    if split == "ring":
        return ring_attention.attend(
            q_BTHC, k_BSKC, v_BSKC, mask, shard=shard, scale=scale, softcap=softcap, bias_BHTS=bias_BHTS,
            sinks_H=sinks_H,
        )  # fmt: skip
    inner = shard
    if split == "heads":
        inner, copies = context_parallel.layout_by_heads(shard, q_BTHC.shape[2], k_BSKC.shape[2])
        k_BSKC, v_BSKC = (context_parallel.exchange_for_heads(inner, x, copies, shard) for x in (k_BSKC, v_BSKC))
        q_BTHC = inner(q_BTHC, "batch", "seq", "heads", None)
        if bias_BHTS is not None:
            bias_BHTS = inner(bias_BHTS, None if bias_BHTS.shape[0] == 1 else "batch", "heads", "seq", None)
        sinks_H = None if sinks_H is None else inner(sinks_H, "heads")
    else:  # queries stay on their devices, and every device gathers the keys
        k_BSKC, v_BSKC = (shard(x, "batch", None, "kv", None) for x in (k_BSKC, v_BSKC))
    names = ("segments_BS", "prefix_BS") + (("segments_BT",) if inner is not shard else ())
    whole_rows: dict[str, Any] = {n: inner(x, "batch", None) for n in names if (x := getattr(mask, n)) is not None}
    mask = dataclasses.replace(mask, **whole_rows)
    if implementation == "cudnn" and mask.segments_BT is not None and not dense:
        o_BTHC = packed_attention.attend(q_BTHC, k_BSKC, v_BSKC, mask, shard=inner, scale=scale)
    elif implementation == "splash":
        o_BTHC = splash_attention.attend(
            q_BTHC, k_BSKC, v_BSKC, mask, shard=inner, scale=scale, softcap=softcap, sinks_H=sinks_H
        )
    else:
        in_blocks = context_parallel.num_devices(inner) == 1
        run: Any = {"xla": partial(_xla, in_blocks=in_blocks), "cudnn": _cudnn}[implementation]
        o_BTHC = run(q_BTHC, k_BSKC, v_BSKC, mask, scale, softcap, bias_BHTS, sinks_H)
    return shard(o_BTHC, "batch", "seq", "heads", None)


def _cudnn(q_BTHC, k_BSKC, v_BSKC, mask, scale, softcap, bias_BHTS, sinks_H):
    # cuDNN's own window looks back alone, and takes no bias beside it.
    own_window = mask.window is not None and mask.causal and bias_BHTS is None
    parts = mask.segments_BT, mask.prefix_BS, mask.common or None, None if own_window else mask.window
    needs_dense_mask = any(part is not None for part in parts)
    visible = mask.dense(0, q_BTHC.shape[1], 0, k_BSKC.shape[1]) if needs_dense_mask else None
    window = (mask.window - 1, 0) if mask.window is not None and visible is None else None
    more = {"bias": None if bias_BHTS is None else bias_BHTS.astype(q_BTHC.dtype),
            "mask": None if visible is None else visible[:, None]}  # fmt: skip
    given = {name: x for name, x in more.items() if x is not None}

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> jax.Array:
        options: dict[str, Any] = dict(zip(given, rest, strict=True)) | {"implementation": "cudnn", "scale": scale}
        options |= {} if window is None else {"local_window_size": window}
        return jax.nn.dot_product_attention(q, k, v, is_causal=mask.causal and visible is None, **options)

    if is_mapped() or pipeline.stages() > 1:  # JAX's rule for mapping the kernel takes no mask that heads share
        kernel = with_merged_rows(kernel)
        # What workers and stages have learned differs; a bias of one row would be that of all.
        given = {name: jnp.broadcast_to(x, (q_BTHC.shape[0], *x.shape[1:])) if name == "bias" else x
                 for name, x in given.items()}  # fmt: skip
    return kernel(q_BTHC, k_BSKC, v_BSKC, *given.values())


BLOCK = 128  # queries of a block: the scores of a few heads fit a CPU's cache, and the causal half is skipped
MOST_BLOCKS = 16  # longer sequences get larger blocks, so that programs don't grow with them
KEEP_SCORES = 512  # with up to so many keys the backward pass keeps a block's scores, else it computes them again


def _xla(q_BTHC, k_BSKC, v_BSKC, mask, scale, softcap, bias_BHTS, sinks_H, in_blocks):
    """Computes attention in plain XLA, in blocks of queries if `in_blocks`.

    Each block meets only the keys that causality and the window can reach, so that all scores never exist at one time.
    Operands are laid out once so that every product is a plain batched matrix product.
    """
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    q_BKTGC = q_BTHC.reshape(B, T, K, H // K, C).transpose(0, 2, 1, 3, 4)
    k_BKCS, v_BKSC = k_BSKC.transpose(0, 2, 3, 1), v_BSKC.transpose(0, 2, 1, 3)
    block: Any = partial(_block, scale=scale, softcap=softcap)
    if S > KEEP_SCORES:
        block = jax.checkpoint(block)
    outputs = []
    for start, stop, first, last in query_blocks(T, S, mask) if in_blocks else [(0, T, 0, S)]:
        bias = None if bias_BHTS is None else bias_BHTS[:, :, start:stop, first:last]
        visible = mask.dense(start, stop, first, last)
        q, k, v = q_BKTGC[:, :, start:stop], k_BKCS[..., first:last], v_BKSC[:, :, first:last]
        outputs.append(block(q, k, v, visible, bias, sinks_H))
    o_BKTGC = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, 2)
    return o_BKTGC.transpose(0, 2, 1, 3, 4).reshape(B, T, H, v_BSKC.shape[-1])


def query_blocks(T: int, S: int, mask: Mask) -> list[tuple[int, int, int, int]]:
    """Returns (first query, end of queries, first key, end of keys) of each block; one block where several gain
    nothing."""
    if T != S or T <= BLOCK or mask.prefix_BS is not None:
        return [(0, T, 0, S)]
    size = max(BLOCK, -(-T // MOST_BLOCKS))
    blocks = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        first = max(0, start - mask.window + 1) if mask.window is not None else 0
        last = stop if mask.causal else S if mask.window is None else min(S, stop + mask.window - 1)
        blocks.append((start, stop, first, last))
    return blocks


def _block(q_BKTGC, k_BKCS, v_BKSC, visible, bias_BHTS, sinks_H, scale, softcap):
    B, K, T, G, C = q_BKTGC.shape
    # Positions and a group's heads make the rows of one matrix. On a mesh either may be sharded, so XLA merges them.
    row_shape = (T * G,) if jax.sharding.get_abstract_mesh().empty else (T, G)
    q_BKRC = q_BKTGC.reshape(B, K, *row_shape, C)
    s_BKRS = jnp.einsum("bk...c,bkcs->bk...s", q_BKRC, k_BKCS, preferred_element_type=jnp.float32)
    # Queries are not scaled before: most widths have no 1/√C in bfloat16, and the products would be rounded again.
    s_BKTGS = s_BKRS.reshape(B, K, T, G, -1) * scale
    if softcap is not None:
        s_BKTGS = softcap * jnp.tanh(s_BKTGS / softcap)
    if bias_BHTS is not None:
        b, _, t, s = bias_BHTS.shape
        s_BKTGS += bias_BHTS.reshape(b, K, G, t, s).swapaxes(2, 3).astype(jnp.float32)
    if visible is not None:
        s_BKTGS = jnp.where(visible[:, None, :, None], s_BKTGS, -1e30)
    p_BKTGS = jax.nn.softmax(s_BKTGS, -1) if sinks_H is None else _softmax_with_sinks(s_BKTGS, sinks_H.reshape(K, G))
    p_BKRS = p_BKTGS.astype(v_BKSC.dtype).reshape(s_BKRS.shape)
    return jnp.einsum("bk...s,bksc->bk...c", p_BKRS, v_BKSC).reshape(B, K, T, G, -1)


def _softmax_with_sinks(s_BKTGS: jax.Array, sinks_KG: jax.Array) -> jax.Array:
    """Returns the softmax over scores and a sink, without the sink's share."""
    sink = sinks_KG[None, :, None, :, None].astype(jnp.float32)
    top = jax.lax.stop_gradient(jnp.maximum(s_BKTGS.max(-1, keepdims=True), sink))
    e_BKTGS = jnp.exp(s_BKTGS - top)
    return e_BKTGS / (e_BKTGS.sum(-1, keepdims=True) + jnp.exp(sink - top))
