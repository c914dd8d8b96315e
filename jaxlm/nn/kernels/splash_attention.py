"""Computes attention by the fused kernel that JAX has for TPUs.

Scores never reach memory, and blocks that a causal mask or a window hides are not computed.

B batch, T query position, S key position, H heads, K key/value heads, C head width.
"""

import math
from functools import partial

import jax

from jaxlm.nn.layers import times
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import Mask

LANES = 128  # the width of a TPU's vector unit: rows are cut into multiples of it
INTERPRET = False  # for tests without a TPU
BLOCK = 512  # the most positions of queries and of keys that meet in one step of the kernel


def unavailable(mask: Mask, bias: bool, lengths: tuple[int, int]) -> str | None:
    """Returns why the kernel can't answer a request, or None if it can; `lengths` are those of queries and keys, if
    known."""
    if bias:
        return "has no bias on scores"
    if mask.prefix_BS is not None or mask.common:
        return "has no keys that all queries see"
    if odd_lengths := [n for n in lengths if n % LANES]:
        return f"takes rows of multiples of {LANES} positions, not {odd_lengths[0]}"
    return None


def attend(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    mask: Mask,
    *,
    shard: Layout,
    scale: float,
    softcap: float | None,
    sinks_H: jax.Array | None,
) -> jax.Array:
    """Computes `attention.attend` where rows are whole on each device; batch and heads are split by `shard`."""
    heads, kv = ("batch", None, "heads", None), ("batch", None, "kv", None)
    inputs = dict(
        q=(times(q_BTHC, scale), heads), k=(k_BSKC, kv), v=(v_BSKC, kv),
        sinks=(sinks_H, ("heads",)), own_segments=(mask.segments_BT, ("batch", None)),
        key_segments=(mask.segments_BS, ("batch", None)),
    )  # fmt: skip
    present = {name: (x, axes) for name, (x, axes) in inputs.items() if x is not None}
    local = partial(_local, mask.causal, mask.window, softcap)
    arrays = {name: shard(x, *axes) for name, (x, axes) in present.items()}
    if jax.sharding.get_abstract_mesh().empty:
        return local(arrays)
    specs = {name: shard.spec(axes) for name, (_, axes) in present.items()}
    # A kernel doesn't say what differs between devices, so that it can't be checked.
    return jax.shard_map(local, in_specs=(specs,), out_specs=shard.spec(heads), check_vma=False)(arrays)


def _local(causal: bool, window: int | None, softcap: float | None, x: dict[str, jax.Array]) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, T, H, _), S = x["q"].shape, x["k"].shape[1]
    mask: masks.Mask
    if window is not None:
        mask = masks.LocalMask((T, S), (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = masks.CausalMask((T, S)) if causal else masks.FullMask((T, S))
    q, s = math.gcd(T, BLOCK), math.gcd(S, BLOCK)
    sizes = kernel.BlockSizes(
        q, s, s, block_q_dkv=q, block_kv_dkv=s, block_kv_dkv_compute=s, block_q_dq=q, block_kv_dq=s
    )
    run = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * H), block_sizes=sizes, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attended", interpret=INTERPRET,
    )  # fmt: skip
    segments = kernel.SegmentIds(x["own_segments"], x["key_segments"]) if "own_segments" in x else None
    o_BHTC = jax.vmap(run, (0, 0, 0, 0, None))(
        *(x[name].swapaxes(1, 2) for name in ("q", "k", "v")), segments, x.get("sinks")
    )
    return o_BHTC.swapaxes(1, 2)
