"""Attention behind one function: causal, bidirectional, sliding window, segments, bias, soft cap.

B batch, T query position, S key position, H heads, K key/value heads, G = H / K, C head width.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.sharding import Layout


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see. Segment 0 is padding; arrays are None where the question doesn't arise."""

    causal: bool
    window: int | None = None
    """Only the last `window` positions, the query's own included."""
    segments_BT: jax.Array | None = None
    segments_BS: jax.Array | None = None

    def dense(self, start: int, stop: int, first: int, last: int) -> jax.Array | None:
        """Boolean `[B or 1, stop - start, last - first]` for a block of queries and a span of keys; None: all seen."""
        t, s = jnp.arange(start, stop)[:, None], jnp.arange(first, last)[None, :]
        seen = None
        if self.causal:
            seen = (t >= s)[None]
        if self.window is not None:
            near = (t - s < self.window) if self.causal else (abs(t - s) < self.window)
            seen = near[None] if seen is None else seen & near[None]
        if self.segments_BT is not None and self.segments_BS is not None:
            same = self.segments_BT[:, start:stop, None] == self.segments_BS[:, None, first:last]
            seen = same if seen is None else seen & same
        return seen


def unavailable(implementation: str, mask: Mask, bias: bool, softcap: float | None, dtype: str) -> str | None:
    """Why an implementation can't answer this request here, or None if it can."""
    if implementation == "xla":
        return None
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, and this program runs on {jax.default_backend()}"
    if dtype != "bfloat16":
        return f"computes in bfloat16, not {dtype}; set execution.dtype=bfloat16"
    if softcap is not None:
        return "has no soft cap"
    return None


def choose(implementation: str, mask: Mask, bias: bool, softcap: float | None, dtype: str) -> tuple[str, str]:
    """The implementation for a request and the reason. One that was asked for by name and can't run is an error."""
    if implementation != "auto":
        why = unavailable(implementation, mask, bias, softcap, dtype)
        if why:
            raise ValueError(f"execution.attention: {implementation} {why}; use auto or xla")
        return implementation, "asked for by execution.attention"
    why = unavailable("cudnn", mask, bias, softcap, dtype)
    return ("cudnn", "fused kernel of this GPU") if why is None else ("xla", f"cudnn {why}")


def attend(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    mask: Mask,
    *,
    shard: Layout,
    scale: float | None = None,
    softcap: float | None = None,
    bias_HTS: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention → `[B, T, H, C]`. Scores and softmax in float32. Every query must see at least one key.

    `scale` defaults to C^-1/2; `softcap` squashes scores as cap·tanh(score / cap) (Gemma 2); grouped-query where K < H.
    """
    scale = q_BTHC.shape[-1] ** -0.5 if scale is None else scale
    name, _ = choose(shard.execution.attention, mask, bias_HTS is not None, softcap, shard.execution.dtype)
    # Under context parallelism queries stay sharded by position and every device gathers the keys.
    k_BSKC, v_BSKC = (shard(x, "batch", None, "kv", None) for x in (k_BSKC, v_BSKC))
    if mask.segments_BS is not None:
        mask = Mask(mask.causal, mask.window, mask.segments_BT, shard(mask.segments_BS, "batch", None))
    run = {"xla": _xla, "cudnn": _cudnn}[name]
    return shard(run(q_BTHC, k_BSKC, v_BSKC, mask, scale, softcap, bias_HTS), "batch", "seq", "heads", None)


def _cudnn(q_BTHC, k_BSKC, v_BSKC, mask, scale, softcap, bias_HTS):
    segmented = mask.segments_BT is not None
    seen = mask.dense(0, q_BTHC.shape[1], 0, k_BSKC.shape[1]) if segmented or mask.window else None
    return jax.nn.dot_product_attention(
        q_BTHC,
        k_BSKC,
        v_BSKC,
        bias=None if bias_HTS is None else bias_HTS[None].astype(q_BTHC.dtype),
        mask=None if seen is None else seen[:, None],
        is_causal=mask.causal and seen is None,
        scale=scale,
        implementation="cudnn",
    )


BLOCK = 128  # queries a block: scores of a few heads fit a CPU's cache, and the causal half is skipped
MOST_BLOCKS = 16
KEEP_SCORES = 512  # positions up to which the backward pass keeps a block's scores instead of computing them again


def _xla(q_BTHC, k_BSKC, v_BSKC, mask, scale, softcap, bias_HTS):
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
    for start, stop, first, last in query_blocks(T, S, mask):
        bias = None if bias_HTS is None else bias_HTS[:, start:stop, first:last]
        seen = mask.dense(start, stop, first, last)
        out.append(block(q_BKTGC[:, :, start:stop], k_BKCS[..., first:last], v_BKSC[:, :, first:last], seen, bias))
    o_BKTGC = out[0] if len(out) == 1 else jnp.concatenate(out, 2)
    return o_BKTGC.transpose(0, 2, 1, 3, 4).reshape(B, T, H, C)


def query_blocks(T: int, S: int, mask: Mask) -> list[tuple[int, int, int, int]]:
    """(first query, end, first key, end) of each block. One block where blocks would gain nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if T != S or T <= BLOCK or (not mesh.empty and mesh.shape.get("context", 1) > 1):
        return [(0, T, 0, S)]
    size = max(BLOCK, -(-T // MOST_BLOCKS))
    out = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        first = max(0, start - mask.window + 1) if mask.window is not None else 0
        last = stop if mask.causal else S if mask.window is None else min(S, stop + mask.window - 1)
        out.append((start, stop, first, last))
    return out


def _block(q_BKTGC, k_BKCS, v_BKSC, seen, bias_HTS, softcap):
    B, K, T, G, C = q_BKTGC.shape
    # Positions and a group's heads are the rows of one matrix; on a mesh either may be sharded, and XLA merges them.
    rows = (T * G,) if jax.sharding.get_abstract_mesh().empty else (T, G)
    q_BKRC = q_BKTGC.reshape(B, K, *rows, C)
    s_BKRS = jnp.einsum("bk...c,bkcs->bk...s", q_BKRC, k_BKCS, preferred_element_type=jnp.float32)
    s_BKTGS = s_BKRS.reshape(B, K, T, G, -1)
    if softcap is not None:
        s_BKTGS = softcap * jnp.tanh(s_BKTGS / softcap)
    if bias_HTS is not None:
        s_BKTGS += bias_HTS.reshape(1, K, G, *bias_HTS.shape[1:]).swapaxes(2, 3).astype(jnp.float32)
    if seen is not None:
        s_BKTGS = jnp.where(seen[:, None, :, None], s_BKTGS, -1e30)
    p_BKRS = jax.nn.softmax(s_BKTGS, -1).astype(v_BKSC.dtype).reshape(s_BKRS.shape)
    return jnp.einsum("bk...s,bksc->bk...c", p_BKRS, v_BKSC).reshape(B, K, T, G, C)
