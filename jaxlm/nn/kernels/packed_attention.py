"""Computes attention within the documents of packed rows by cuDNN, which is told where each document begins and ends.

cuDNN takes a batch of sequences of unlike lengths that lie one after another in memory (its ragged layout), and does
not compute what lies between two of them; no array of all pairs of positions exists. JAX reaches this layout by
functions that are not public (`jax._src.cudnn`): which of their versions are known is said in `_versions`, and nothing
else of jaxlm depends on them.

B batch, T position, H query heads, K key/value heads, C head width, P = B · T positions of all rows, D documents that
one call of the kernel takes.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxlm.nn import pipeline
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import Mask
from jaxlm.runtime import chips
from jaxlm.runtime.mesh import devices, is_mapped

POSITIONS = 256  # of a row for each document that a call has room for: what doesn't fit goes into further calls
MOST = 8  # documents a row that a call has room for: cuDNN's float32 sums for queries take as many times a row's
FURTHER = "further_documents"  # names the calls beyond the first in a program, whose pairs the first is counted for


@dataclass(frozen=True)
class How:
    """A How is what all documents of a request have in common."""

    causal: bool
    window: int | None
    scale: float


def unavailable(mask: Mask, bias: bool, mapped: bool = False) -> str | None:
    """Returns why documents of a request can't be kept apart by their lengths, or None if they can.

    `bias` says whether scores have one, and `mapped` whether `jax.vmap` maps it, over workers that train apart or a
    pipeline's stages.
    """
    if bias:
        return "there is a bias on scores"
    if mask.prefix_BS is not None or mask.common or not mask.packed:
        return "there are keys that other documents' or later queries see, too"
    if mask.window is not None and not mask.causal:
        return "cuDNN has no window to both sides"
    if mapped or is_mapped() or pipeline.stages() > 1:
        return "this is mapped over workers or stages"
    if (capability := chips.compute_capability(devices()[0])) is None or capability < (9, 0):
        return "this needs a Hopper GPU (compute capability 9.0) or a later one"
    return _versions()


def _versions() -> str | None:
    """Returns why this JAX's way to cuDNN's ragged layout is none that is known here, or None if it is."""
    known = {"scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length"}
    modifier = {"score_mod_name", "score_mod_jaxpr"}  # from jax 0.11 on
    try:
        kernels = _private()
        operands = kernels.operands
    except (ImportError, AttributeError) as missing:
        return f"jax {jax.__version__} has no such interface to cuDNN ({missing})"
    for name, more in (("forward", {"is_training"}), ("backward", set())):
        asked = operands[name]
        if asked not in (known | more, known | more | modifier):
            return f"jax {jax.__version__} has another interface to cuDNN than those that are known ({name})"
    return None


@dataclass(frozen=True)
class _Private:
    """A _Private holds what is used of JAX's private module."""

    forward: Any
    backward: Any
    causal: Any
    everything: Any
    layout: int
    operands: dict[str, set[str]]


def _private() -> _Private:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    lowered: dict[str, Callable[..., Any]] = {
        "forward": cudnn._dot_product_attention_fwd_cuda_lowering,
        "backward": cudnn._dot_product_attention_bwd_cuda_lowering,
    }
    some = inspect.Parameter.VAR_POSITIONAL  # operands of a function of scores
    names = {n: [p.name for p in inspect.signature(f).parameters.values() if p.kind != some]
             for n, f in lowered.items()}  # fmt: skip
    arrays = {"ctx", "query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets",
              "page_table_k", "page_table_v", "activation", "fwd_output", "grad_output"}  # fmt: skip
    return _Private(
        cudnn._dot_product_attention_fwd_p, cudnn._dot_product_attention_bwd_p, cudnn.MaskType.CAUSAL,
        cudnn.MaskType.NO_MASK, cudnn.AttentionLayout.BTNH.value,
        {name: set(each) - arrays for name, each in names.items()},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the rows


def attend(
    q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, mask: Mask, *, shard: Layout, scale: float
) -> jax.Array:
    """Computes `attention.attend` where rows are whole on each device; batch and heads are split by `shard`.

    Raises ValueError where a device's part of the batch is larger than cuDNN can count.
    """
    assert mask.segments_BT is not None
    heads, kv, row = ("batch", None, "heads", None), ("batch", None, "kv", None), ("batch", None)
    arrays = [shard(x, *axes) for x, axes in ((q_BTHC, heads), (k_BTKC, kv), (v_BTKC, kv), (mask.segments_BT, row))]
    local = partial(_local, How(mask.causal, mask.window, scale))
    if jax.sharding.get_abstract_mesh().empty:
        return local(*arrays)
    specs = tuple(shard.spec(axes) for axes in (heads, kv, kv, row))
    # A kernel doesn't say what differs between devices, so that it can't be checked.
    return jax.shard_map(local, in_specs=specs, out_specs=shard.spec(heads), check_vma=False)(*arrays)


def _local(how: How, q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, segments_BT: jax.Array) -> jax.Array:
    if q_BTHC.size >= 1 << 31:
        raise ValueError(
            f"train.micro_batches: queries of {q_BTHC.size:,} numbers a device are more than the 2^31 - 1 that cuDNN "
            "counts; raise it, so that a device has fewer rows at a time"
        )
    return _attend(how, q_BTHC, k_BTKC, v_BTKC, number_documents(segments_BT))


def number_documents(segments_BT: jax.Array) -> jax.Array:
    """Returns the number of the document that each position is of, from 0 on over all rows: `[B, T]`.

    A document is a run of one segment. Padding makes documents too, so that no position is left out.
    """
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    begins_BT = jnp.concatenate([jnp.ones_like(changes_BT, shape=(len(changes_BT), 1)), changes_BT], 1)
    return jnp.cumsum(begins_BT.reshape(-1), dtype=jnp.int32).reshape(segments_BT.shape) - 1


def room(T: int) -> int:
    """Returns the documents a row that a call has room for; rows lend each other what they don't need."""
    return max(2, min(MOST, T // POSITIONS))  # with one alone, JAX takes rows for sequences


def offsets(number_BT: jax.Array, call: Any, D: int) -> jax.Array:
    """Returns the position at which each document of a call begins, and at which the last one ends, `[D + 1]`, counted
    over all rows. Documents that there aren't begin and end at the end."""
    first_D = call * D + jnp.arange(D + 1, dtype=jnp.int32)
    # Counting is one pass on a GPU; a binary search would be a loop of many small kernels.
    return jnp.sum(number_BT.reshape(1, -1) < first_D[:, None], 1, dtype=jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: How, q: jax.Array, k: jax.Array, v: jax.Array, number_BT: jax.Array) -> jax.Array:
    def one(call: Any) -> list[jax.Array]:
        return [forward(how, q, k, v, offsets(number_BT, call, _documents(number_BT)), False)[0]]

    return _in_calls(number_BT, one)[0]


def _attend_forward(how: How, q: jax.Array, k: jax.Array, v: jax.Array, number_BT: jax.Array) -> Any:
    def one(call: Any) -> list[jax.Array]:
        offsets_D = offsets(number_BT, call, _documents(number_BT))
        o_BTHC, sums_DHT = forward(how, q, k, v, offsets_D, True)
        assert sums_DHT is not None
        return [o_BTHC, _by_position(sums_DHT, number_BT, offsets_D, call)]

    # Named like the result, so that blocks that keep this for the backward pass need not call the kernel again.
    o_BTHC, sums_BTH = (checkpoint_name(x, "attended") for x in _in_calls(number_BT, one))
    return o_BTHC, (q, k, v, number_BT, o_BTHC, sums_BTH)


def _attend_backward(how: How, saved: Any, do_BTHC: jax.Array) -> Any:
    q, k, v, number_BT, o_BTHC, sums_BTH = saved

    def one(call: Any) -> list[jax.Array]:
        offsets_D = offsets(number_BT, call, _documents(number_BT))
        return backward(how, q, k, v, o_BTHC, _by_document(sums_BTH, offsets_D), do_BTHC, offsets_D)

    return *_in_calls(number_BT, one), None


_attend.defvjp(_attend_forward, _attend_backward)


def _documents(number_BT: jax.Array) -> int:
    B, T = number_BT.shape
    return B * room(T)


def _in_calls(number_BT: jax.Array, one: Callable[[Any], list[jax.Array]]) -> list[jax.Array]:
    """Returns arrays `[B, T, …]` of which each call of the kernel, `one(call)`, gives the positions of its documents.

    A second call, and more, are only made where there are more documents than a call has room for.
    """
    D = _documents(number_BT)

    def further(arrays: list[jax.Array], number_BT: jax.Array) -> list[jax.Array]:
        calls = number_BT[-1, -1] // D + 1

        def more(state: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
            call, before = state
            mine_BT = number_BT // D == call  # what a call gives elsewhere is whatever was in memory
            pairs = zip(one(call), before, strict=True)
            return call + 1, [jnp.where(mine_BT.reshape(*mine_BT.shape, *[1] * (x.ndim - 2)), x, y) for x, y in pairs]

        return jax.lax.while_loop(lambda s: s[0] < calls, more, (jnp.int32(1), arrays))[1]

    further.__name__ = FURTHER
    return jax.jit(further)(one(0), number_BT)


def _by_position(sums_DHT: jax.Array, number_BT: jax.Array, offsets_D: jax.Array, call: Any) -> jax.Array:
    """Returns each position's log-sum of exponentials, `[B, T, H]`, of a call's, which lie by documents."""
    D, _, T = sums_DHT.shape
    number_P = jnp.clip(number_BT.reshape(-1) - call * D, 0, D - 1)
    at_P = jnp.clip(jnp.arange(number_P.size, dtype=jnp.int32) - offsets_D[number_P], 0, T - 1)
    return sums_DHT.swapaxes(1, 2)[number_P, at_P].reshape(*number_BT.shape, -1)


def _by_document(sums_BTH: jax.Array, offsets_D: jax.Array) -> jax.Array:
    """Returns log-sums as the kernel wants them, `[D, H, T]`: each document's from its beginning on."""
    B, T, H = sums_BTH.shape
    sums_HP = jnp.pad(sums_BTH.reshape(B * T, H).T, ((0, 0), (0, T)))
    return jax.vmap(lambda at: jax.lax.dynamic_slice(sums_HP, (jnp.int32(0), at), (H, T)))(offsets_D[:-1])


# ---------------------------------------------------------------------------------------------------------- the kernel


def forward(
    how: How, q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, offsets_D: jax.Array, sums: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Calls cuDNN for the documents between `offsets_D`, `[D + 1]`. Returns `[B, T, H, C]`, where positions of other
    documents hold anything, and, if asked for `sums`, the log-sums of exponentials `[D, H, T]` from each document's
    beginning on."""
    kernels = _private()
    out = kernels.forward.bind(
        q_BTHC, k_BTKC, v_BTKC, *_places(q_BTHC, k_BTKC, offsets_D),
        **_settings(kernels, how, "forward"), is_training=sums,
    )  # fmt: skip
    return out[0], out[1] if sums else None


def backward(
    how: How, q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, o_BTHC: jax.Array, sums_DHT: jax.Array,
    do_BTHC: jax.Array, offsets_D: jax.Array,
) -> list[jax.Array]:  # fmt: skip
    """Calls cuDNN for the gradients of queries, keys and values of the documents between `offsets_D`."""
    kernels = _private()
    return kernels.backward.bind(
        q_BTHC, k_BTKC, v_BTKC, *_places(q_BTHC, k_BTKC, offsets_D), sums_DHT, o_BTHC,
        do_BTHC.astype(q_BTHC.dtype), **_settings(kernels, how, "backward"),
    )  # fmt: skip


def _settings(kernels: _Private, how: How, name: str) -> dict[str, Any]:
    given = dict(
        scale=how.scale, seed=0, dropout_rate=0.0, variadic_args=(False, False), layout=kernels.layout,
        mask_type=kernels.causal if how.causal else kernels.everything, sliding_window_length=how.window,
    )  # fmt: skip
    return dict.fromkeys(kernels.operands[name] - {"is_training"}) | given


def _places(q_BTHC: jax.Array, k_BTKC: jax.Array, offsets_D: jax.Array) -> list[jax.Array]:
    """Returns the operands of the kernel between values and log-sums: no bias; lengths and offsets of queries' and of
    keys' documents; no pages of a cache.

    cuDNN counts offsets in numbers, and JAX wants its arrays by rows: of offsets, one more a row than cuDNN reads.
    """
    B, T = q_BTHC.shape[:2]
    none = jnp.zeros(0, q_BTHC.dtype)
    length_BD = jnp.diff(offsets_D).reshape(B, -1)
    padded_D = jnp.pad(offsets_D, (0, B - 1), constant_values=np.int32(B * T))
    q_offset_BD, k_offset_BD = ((padded_D * np.int32(x.shape[2] * x.shape[3])).reshape(B, -1) for x in (q_BTHC, k_BTKC))
    return [none, length_BD, length_BD, q_offset_BD, k_offset_BD, none, none]
