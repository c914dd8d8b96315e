"""Computes cross entropy without ever holding the logits of a whole batch.

N tokens of one device, D model width, V vocabulary (of this device where the head is sharded).
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from jaxlm.core.spec import Spec
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import is_leaf
from jaxlm.runtime import chips
from jaxlm.runtime.mesh import devices, platform


@struct.dataclass
class Readout:
    """A Readout holds the factors of a model's logits before anyone multiplies them: logits = x · wᵀ + bias."""

    x_BTD: jax.Array
    w_VD: Any
    """[V, D] in the compute dtype, sharded by `vocab` alone."""
    bias_V: jax.Array | None = None
    softcap: float | None = struct.field(pytree_node=False, default=None)
    """Logits are squashed as cap·tanh(logit / cap) (Gemma 2)."""
    ids_in_use: int | None = struct.field(pytree_node=False, default=None)
    """Rows from here on are padding of the vocabulary, to which smoothing gives no share; None: there is none."""


def factors(x_BTD: jax.Array, w: Any, s: Spec, shard: Layout) -> Readout:
    """Returns the factors of the logits of states and a head, or the table that it is tied to, as `s` declares it. A
    `Leaf` answers for itself."""
    if is_leaf(w):
        return Readout(*w.readout(x_BTD, s, shard))
    return Readout(x_BTD, shard.gather(w, s))


def logits(r: Readout, shard: Layout) -> jax.Array:
    """Returns all logits, `[B, T, V]` in float32, for generation and tests."""
    out = jnp.einsum("btd,vd->btv", r.x_BTD, r.w_VD, preferred_element_type=jnp.float32)
    out = out if r.bias_V is None else out + r.bias_V[None, None].astype(jnp.float32)
    return out if r.softcap is None else r.softcap * jnp.tanh(out / r.softcap)


class Sums(NamedTuple):
    """A Sums holds sums over tokens, each times its weight."""

    loss: Any
    """The quantity that is minimised: smoothed cross entropy plus z-loss, in nats."""
    nll: Any
    """Negative log likelihood, in nats."""
    correct: Any
    """Targets whose logit is the largest."""


def cross_entropy(
    r: Readout,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    shard: Layout,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Sums:
    """Returns weighted sums over all tokens of all devices.

    Logits exist for `execution.loss_chunk` tokens at a time and in float32. Where gradients are asked for they are
    formed in the same forward pass, so no logits are kept or computed twice. A head may be sharded by vocabulary: each
    device reduces its own columns. `z_loss` weighs log²Z (Chowdhery et al. 2022, section 5). Raises ValueError where
    `mesh.context` doesn't divide the positions.

    The derivative by a weight is what its target adds to each sum; it is there where nothing else is differentiated,
    and zero beside other derivatives.
    """
    mesh = jax.sharding.get_abstract_mesh()
    bias_V = r.bias_V if r.bias_V is not None else jnp.zeros(r.w_VD.shape[:1], jnp.float32)
    arrays: tuple[Any, ...] = (r.x_BTD, r.w_VD, bias_V.astype(jnp.float32), targets_BT, weights_BT.astype(jnp.float32))
    tokens, vocab = shard.spec(("batch", "seq")), shard.spec(("vocab",))
    width: tuple[str, ...] = ()
    if mesh.empty:
        tokens, vocab = P(), P()
    elif r.x_BTD.shape[1] % mesh.shape["context"]:
        raise ValueError(f"loss: {r.x_BTD.shape[1]} target positions do not divide over mesh.context; pad them")
    else:
        head_VD, width = shard.whole(arrays[1], "vocab", "embed")
        arrays = (
            shard(arrays[0], "batch", "seq", None),
            head_VD,
            shard(arrays[2], "vocab"),
            *(shard(a, "batch", "seq") for a in arrays[3:]),
        )
    used = r.ids_in_use if r.ids_in_use is not None else r.w_VD.shape[0]
    chunk = shard.execution.loss_chunk
    return _sums(*arrays, _Plan(label_smoothing, z_loss, r.softcap, chunk, tokens, vocab, width, used))


def over_logits(
    f: Callable[..., Any], readouts: Sequence[Readout], *arrays: jax.Array, shard: Layout, differentiable: bool = True
) -> Any:
    """Returns `f(*logits, *arrays)` of all tokens, leaves `[B, T, …]`, where `f` gets a few tokens of all rows at a
    time: the logits `[B, N, V]` in float32 of each readout, and those tokens' part of each array `[B, T, …]`.

    Logits exist for `execution.loss_chunk` tokens at a time; in the backward pass they are computed anew.
    """
    (B, T, _), V = readouts[0].x_BTD.shape, readouts[0].w_VD.shape[0]
    n = max(1, -(-T // max(1, _chunk(B * T, V, shard.execution.loss_chunk) // B)))
    size, pad = -(-T // n), -T % -(-T // n)

    def parts(a: jax.Array) -> jax.Array:
        a = shard(
            a, "batch", *[None] * (a.ndim - 1)
        )  # every device cuts its own rows, whatever shared them in the model
        padded = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, -1, size, *a.shape[2:]), 1, 0)

    def one(part: tuple[list[jax.Array], list[jax.Array]]) -> Any:
        states, others = part
        each = [
            shard(logits(dataclasses.replace(r, x_BTD=x_BND), shard), "batch", None, "vocab")
            for r, x_BND in zip(readouts, states, strict=True)
        ]
        return f(*each, *others)

    cut = ([parts(r.x_BTD) for r in readouts], [parts(a) for a in arrays])
    chunks = jax.lax.map(jax.checkpoint(one) if differentiable else one, cut)
    return jax.tree.map(lambda c: jnp.moveaxis(c, 0, 1).reshape(B, -1, *c.shape[3:])[:, :T], chunks)


def log_likelihoods(r: Readout, targets_BT: jax.Array, *, shard: Layout) -> jax.Array:
    """Returns the log probability of each target, `[B, T]`, in nats and without gradients.

    For gradients of a function of it, give its derivatives to `cross_entropy` as weights. Logits exist for
    `execution.loss_chunk` tokens of all rows at a time.
    """

    def one(z_BNV: jax.Array, targets_BN: jax.Array) -> jax.Array:
        hit_BNV = jax.lax.broadcasted_iota(targets_BN.dtype, z_BNV.shape, 2) == targets_BN[..., None]
        return jnp.where(hit_BNV, z_BNV, 0.0).sum(-1) - jax.nn.logsumexp(z_BNV, -1)

    return over_logits(one, [jax.lax.stop_gradient(r)], targets_BT, shard=shard, differentiable=False)


class _Plan(NamedTuple):
    """A _Plan holds what is static of a loss: its coefficients, and how tokens, vocabulary and width are sharded."""

    label_smoothing: float
    z_loss: float
    softcap: float | None
    chunk: int
    tokens: P
    vocab: P
    width: tuple[str, ...]
    """Mesh axes that the head's gradient is cut over by its width when it is summed."""
    used: int
    """Rows of the whole vocabulary that smoothing shares itself out among."""

    @property
    def token_axes(self) -> tuple[str, ...]:
        return _names(self.tokens)

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        return _names(self.vocab)


def _names(spec: P) -> tuple[str, ...]:
    return tuple(a for part in spec if part for a in ((part,) if isinstance(part, str) else part))


LOGIT_BYTES = 32 << 20  # float32 logits of one chunk on a CPU: its last cache level may hold them beside the head
SHARE = 1 / 64  # of an accelerator's memory for these logits: each chunk reads and writes the whole head's gradient


def logit_bytes(kind: str) -> float:
    """Returns the bytes of the float32 logits that a device of this kind makes at one time."""
    chip = chips.of_kind(kind)
    return max(256 << 20, 0 if chip is None else SHARE * chip.hbm)


def _chunk(n: int, vocab: int, requested: int) -> int:
    """Returns the tokens of a chunk: about as many as the cache holds on a CPU, more on an accelerator."""
    most = LOGIT_BYTES if platform() == "cpu" else logit_bytes(devices()[0].device_kind)
    return min(n, requested or max(128, int(most) // (4 * vocab)))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _sums(x_BTD, w_VD, bias_V, targets_BT, weights_BT, plan):
    """Returns the sums without gradients: for evaluation, and whatever is not differentiated."""
    return _everywhere(x_BTD, w_VD, bias_V, targets_BT, weights_BT, plan, "sums")


def _forward(x_BTD, w_VD, bias_V, targets_BT, weights_BT, plan):
    factors = (x_BTD, w_VD, bias_V)
    want = "gradients" if any(a.perturbed for a in factors) else "targets"
    x, w, bias, targets, weights = (a.value for a in (*factors, targets_BT, weights_BT))
    sums, more = _everywhere(x, w, bias, targets, weights, plan, want)
    return sums, (more, None) if want == "gradients" else (None, more)


def _backward(plan, residuals, cotangent):
    gradients, each = residuals
    g = Sums(*(jnp.zeros((), jnp.float32) if isinstance(c, SymbolicZero) else c for c in cotangent))
    if gradients is None:
        return None, None, None, None, g.loss * each.loss + g.nll * each.nll + g.correct * each.correct
    dx_BTD, dw_VD, db_V = gradients  # of the loss: nll and correct are for reading only
    dx_BTD, dw_VD = ((d.astype(jnp.float32) * g.loss).astype(d.dtype) for d in (dx_BTD, dw_VD))
    return dx_BTD, dw_VD, db_V * g.loss, None, None


_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _everywhere(x_BTD, w_VD, bias_V, targets_BT, weights_BT, plan, want):
    """Lets every device scan its own tokens against its own part of the vocabulary; sums and gradients meet at the
    end. `want`: the sums alone, with the gradients of the factors, or with what each target adds if its weight is 1."""
    local = partial(_scan, plan=plan, want=want)
    if not plan.tokens and not plan.vocab:
        return local(x_BTD, w_VD, bias_V, targets_BT, weights_BT)
    x, w, t = P(*plan.tokens, None), P(*plan.vocab, None), plan.tokens
    sums = Sums(P(), P(), P())
    more = {
        "gradients": (x, P(*(plan.vocab or (None,)), plan.width or None), plan.vocab),
        "targets": Sums(t, t, t),
    }
    return jax.shard_map(
        local,
        in_specs=(x, w, plan.vocab, t, t),
        out_specs=(sums, more[want]) if want in more else sums,
        check_vma=False,  # each result is reduced by hand over exactly the axes its spec leaves out
    )(x_BTD, w_VD, bias_V, targets_BT, weights_BT)


def _scan(x_BTD, w_VD, bias_V, targets_BT, weights_BT, *, plan, want):
    label_smoothing, z_loss, vocab_axes, token_axes = (
        plan.label_smoothing,
        plan.z_loss,
        plan.vocab_axes,
        plan.token_axes,
    )
    B, T, D = x_BTD.shape
    V = w_VD.shape[0]
    size = _chunk(B * T, V, plan.chunk)
    pad = -(B * T) % size
    flat = [jnp.pad(a.reshape(B * T, *a.shape[2:]), ((0, pad),) + ((0, 0),) * (a.ndim - 2)) for a in
            (x_BTD, targets_BT, weights_BT)]  # fmt: skip
    parts = [a.reshape(-1, size, *a.shape[1:]) for a in flat]
    first = _vocab_start(vocab_axes) * V
    padded = plan.used < V * _ways(vocab_axes)

    def add_chunk(carry, part):
        sums, dw_VD, db_V = carry
        x_ND, targets_N, weights_N = part
        z_NV = jnp.dot(x_ND, w_VD.T, preferred_element_type=jnp.float32) + bias_V[None]
        if plan.softcap is not None:
            t_NV = jnp.tanh(z_NV / plan.softcap)
            z_NV = plan.softcap * t_NV
        top_N = _reduce(jax.lax.pmax, jax.lax.stop_gradient(z_NV.max(-1)), vocab_axes)
        e_NV = jnp.exp(z_NV - top_N[:, None])
        total_N = _reduce(jax.lax.psum, e_NV.sum(-1), vocab_axes)
        log_z_N = top_N + jnp.log(total_N)
        hit_NV = jax.lax.broadcasted_iota(targets_N.dtype, z_NV.shape, 1) == (targets_N - first)[:, None]
        picked_N = _reduce(jax.lax.psum, _picked(z_NV, targets_N - first, hit_NV), vocab_axes)
        nll_N = log_z_N - picked_N
        loss_N = nll_N + z_loss * jnp.square(log_z_N)
        if label_smoothing:
            real_NV = jax.lax.broadcasted_iota(jnp.int32, z_NV.shape, 1) < plan.used - first
            shared_NV = jnp.where(real_NV, z_NV, 0.0) if padded else z_NV
            mean_N = _reduce(jax.lax.psum, shared_NV.sum(-1), vocab_axes) / plan.used
            loss_N += label_smoothing * (picked_N - mean_N)
        new = Sums(
            (loss_N * weights_N).sum(), (nll_N * weights_N).sum(), jnp.where(picked_N >= top_N, weights_N, 0.0).sum()
        )
        sums = jax.tree.map(jnp.add, sums, new)
        if want != "gradients":
            each = Sums(loss_N, nll_N, (picked_N >= top_N).astype(jnp.float32))
            return (sums, dw_VD, db_V), each if want == "targets" else None
        factor_N = weights_N * (1 + 2 * z_loss * log_z_N) / total_N
        d_NV = e_NV * factor_N[:, None] - jnp.where(hit_NV, ((1 - label_smoothing) * weights_N)[:, None], 0.0)
        if label_smoothing:
            share_N1 = (label_smoothing / plan.used) * weights_N[:, None]
            d_NV -= jnp.where(real_NV, share_N1, 0.0) if padded else share_N1
        if plan.softcap is not None:
            d_NV *= 1 - jnp.square(t_NV)
        db_V += d_NV.sum(0)
        d_NV = d_NV.astype(w_VD.dtype)
        dx_ND = jnp.dot(d_NV, w_VD, preferred_element_type=jnp.float32)
        dw_VD += jnp.dot(d_NV.T, x_ND, preferred_element_type=jnp.float32)
        return (sums, dw_VD, db_V), dx_ND.astype(x_ND.dtype if not vocab_axes else jnp.float32)

    zero = jnp.zeros((), jnp.float32)
    shape = (V, D) if want == "gradients" else (0, 0)
    start = (Sums(zero, zero, zero), jnp.zeros(shape, jnp.float32), jnp.zeros(V, jnp.float32))
    (sums, dw_VD, db_V), dx = jax.lax.scan(add_chunk, start, tuple(parts))
    sums = jax.tree.map(lambda s: _reduce(jax.lax.psum, s, token_axes), sums)
    if want == "sums":
        return sums
    if want == "targets":
        return sums, jax.tree.map(lambda each: each.reshape(-1)[: B * T].reshape(B, T), dx)
    db_V, dw_VD = _reduce(jax.lax.psum, db_V, token_axes), dw_VD.astype(w_VD.dtype)
    if plan.width:
        dw_VD = jax.lax.psum_scatter(dw_VD, plan.width, scatter_dimension=1, tiled=True)
    dw_VD = _reduce(jax.lax.psum, dw_VD, tuple(a for a in token_axes if a not in plan.width))
    dx = _reduce(jax.lax.psum, dx.reshape(-1, D)[: B * T].reshape(B, T, D), vocab_axes).astype(x_BTD.dtype)
    # The blocks' backward pass waits for the head's sums, or the float32 of a whole head lies beside it until its end.
    dx, dw_VD = jax.lax.optimization_barrier((dx, dw_VD))
    return sums, (dx, dw_VD, db_V)


def _picked(z_NV: jax.Array, at_N: jax.Array, hit_NV: jax.Array) -> jax.Array:
    """Returns each row's logit at its target, or 0 where that is another device's. TPUs are slow to gather, and fuse a
    sum over the row with what else reads it; elsewhere that is a pass over all logits."""
    if platform() == "tpu":
        return jnp.where(hit_NV, z_NV, 0.0).sum(-1)
    V = z_NV.shape[1]
    z_N = jnp.take_along_axis(z_NV, at_N.clip(0, V - 1)[:, None], axis=1)[:, 0]
    return jnp.where((at_N >= 0) & (at_N < V), z_N, 0.0)


def _reduce(f: Any, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return f(x, axes) if axes else x


def _ways(axes: tuple[str, ...]) -> int:
    return jax.lax.axis_size(axes) if axes else 1


def _vocab_start(axes: tuple[str, ...]) -> jax.Array | int:
    return jax.lax.axis_index(axes) if axes else 0
