"""Updates of low rank, which LoRA and its kin share: y = x·W + scale · ((x·a) ∘ e)·b ∘ g.

R rank; W, a and b keep the dimensions of the matrix, such as D H C.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.core.ranges import BelowOne, Count
from jaxlm.core.spec import Init, Spec, zeros
from jaxlm.nn.layers import dropout, times
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import Leaf, Wrapped, dense, is_leaf
from jaxlm.weights.adapters.method import Specs, TargetedAdapter, Weights
from jaxlm.weights.adapters.peft_format import Layer
from jaxlm.weights.matrices import Matrix

TARGETS = (r"(^|/)(cross_)?[qv]$",)


@dataclass(frozen=True, kw_only=True)
class LowRankAdapter(TargetedAdapter):
    """Every update of low rank has these settings."""

    rank: Count = 8
    dropout: BelowOne = 0.0
    """Share of the adapter's inputs that is dropped in training."""

    @property
    def scale(self) -> float:
        """Returns what the product of a and b is multiplied by."""
        return 1.0


class LowRank(Wrapped):
    """A low-rank leaf holds a weight and its update."""

    a: jax.Array
    """Inputs, R."""
    b: jax.Array
    """R, outputs."""
    scale: float = struct.field(pytree_node=False)
    ins: int = struct.field(pytree_node=False)
    e: jax.Array | None = None
    """Factors of the directions, R."""
    g: jax.Array | None = None
    """Factors of the outputs."""
    m: jax.Array | None = None
    """Magnitudes of the outputs (DoRA)."""
    length: jax.Array | None = None
    """Lengths of the outputs' columns, where the weights were rounded since; None: those of the weights."""
    a0: jax.Array | None = None
    b0: jax.Array | None = None
    """What a and b began as, where the base has it already (PiSSA): it doesn't count."""
    rows_BR: jax.Array | None = None
    """Which directions each row has (several adapters in a batch); of more rows, those of one stand side by side."""
    key: jax.Array | None = None
    """The key of dropout."""
    rate: float = struct.field(pytree_node=False, default=0.0)
    vectors = ("e", "g", "m", "length")

    def einsum(self, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
        y = shard.einsum(eq, x, self.base, *axes)
        kept = dropout(x, self.rate, self.key)
        update = self._through(eq, kept, self.a, self.b, shard, axes)
        if self.a0 is not None and self.b0 is not None:
            update -= self._through(eq, kept, self.a0, self.b0, shard, axes)
        if self.m is None:
            return y + update
        share = self._share()
        share = shard(share, *axes[len(axes) - share.ndim :])
        share = share.reshape((1,) * (y.ndim - share.ndim) + share.shape)
        plain = y if self.key is None or not self.rate else shard.einsum(eq, kept, self.base, *axes)
        y32, plain, update = (x.astype(jnp.float32) for x in (y, plain, update))
        return (y32 + (share - 1) * plain + share * update).astype(y.dtype)

    def _share(self) -> jax.Array:
        """Returns what DoRA multiplies outputs by: magnitudes over the lengths of columns, float32.

        The length is no path for gradients (Liu et al. 2024, section 4.3), and that of weights before they are rounded,
        so that a fresh adapter multiplies by one.
        """
        assert self.m is not None
        norm = self.norm() if self.length is None else self.length
        return self.m.astype(jnp.float32) / jax.lax.stop_gradient(norm)

    def _measured(self) -> "LowRank":
        """Returns the leaf with the lengths of its columns, which need the numbers that are about to be rounded."""
        return self if self.m is None or self.length is not None else self.replace(length=self.norm())

    def cast(self, dtype: Any) -> Leaf:
        return Wrapped.cast(self._measured(), dtype)

    def _through(self, eq: str, x: jax.Array, a: Any, b: Any, shard: Layout, axes: tuple) -> jax.Array:
        left, _, out = eq.partition("->")
        xs, _, ws = left.partition(",")
        rows, inner, outer = xs[: len(xs) - self.ins], ws[: self.ins], ws[self.ins :]
        z = shard.einsum(f"{xs},{inner}R->{rows}R", x, a, *axes[: len(rows)], None)
        if self.e is not None:
            z = times(z, self.e)
        if self.rows_BR is not None:
            mask = jnp.repeat(self.rows_BR, z.shape[0] // self.rows_BR.shape[0], 0).astype(z.dtype)
            z *= mask.reshape(z.shape[0], *[1] * (len(rows) - 1), -1)
        y = shard.einsum(f"{rows}R,R{outer}->{out}", z, b, *axes)
        return times(y, self.scale if self.g is None else self.scale * self.g.astype(jnp.float32))

    def gathered(self, s: Spec, shard: Layout) -> "LowRank":
        axes = s.axes[1:] if s.axes[:1] == ("layers",) else s.axes
        ins, outs = axes[: self.ins], axes[self.ins :]
        base = shard.gather(self.base, s)
        measured = (self.replace(base=base) if is_leaf(base) else self)._measured()  # few bits aren't rounded again
        parts = dict(
            a=(self.a, (*ins, None)), b=(self.b, (None, *outs)),
            a0=(self.a0, (*ins, None)), b0=(self.b0, (None, *outs)),
            e=(self.e, (None,)), g=(self.g, outs), m=(self.m, outs), length=(measured.length, outs),
        )  # fmt: skip
        present = {n: (x, home) for n, (x, home) in parts.items() if x is not None}
        used = {n: shard(x if n in self.vectors else x.astype(shard.dtype), *home) for n, (x, home) in present.items()}
        if self.rows_BR is not None:
            used["rows_BR"] = shard(self.rows_BR, "batch", None)
        return self.replace(base=base, **used)

    def norm(self) -> jax.Array:
        """Returns the length of each output's column of base and update in float32, for one layer or a stack."""
        lead = self.a.ndim - 1 - self.ins
        return jnp.sqrt(jnp.square(self._sum()).sum(tuple(range(lead, lead + self.ins))))

    def _sum(self) -> jax.Array:
        return dense(self.base) + self.delta()

    def delta(self) -> jax.Array:
        """Returns what is added to the base's numbers, float32."""

        def product(a: jax.Array, b: jax.Array) -> jax.Array:
            lead, R = a.ndim - 1 - self.ins, a.shape[-1]
            left = a.astype(jnp.float32).reshape(*a.shape[:lead], -1, R)
            if self.e is not None:
                left *= self.e.astype(jnp.float32)[..., None, :]
            out = self.scale * left @ b.astype(jnp.float32).reshape(*b.shape[: lead + 1], -1)
            out = out.reshape(*a.shape[:-1], *b.shape[lead + 1 :])
            if self.g is None:
                return out
            g = self.g.astype(jnp.float32)
            return out * g.reshape(*g.shape[:lead], *[1] * self.ins, *g.shape[lead:])

        update = product(self.a, self.b)
        return update if self.a0 is None or self.b0 is None else update - product(self.a0, self.b0)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        if self.m is None:
            return self._sum().astype(dtype)
        lead = self.a.ndim - 1 - self.ins
        share = self.m.astype(jnp.float32) / self.norm()
        return (self._sum() * share.reshape(*share.shape[:lead], *[1] * self.ins, *share.shape[lead:])).astype(dtype)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns two matrices of each layer, `[L, inputs, R]` and `[L, R, outputs]`, whose product is `delta`."""
        a, b = np.asarray(self.a, np.float32), np.asarray(self.b, np.float32) * self.scale
        if self.e is not None:
            e = np.asarray(self.e)
            a = a * e.reshape(len(e), *[1] * self.ins, -1)
        if self.g is not None:
            b = b * np.asarray(self.g)[:, None]
        if self.a0 is not None:
            a = np.concatenate([a, np.asarray(self.a0)], -1)
            b = np.concatenate([b, -self.scale * np.asarray(self.b0)], 1)
        return a, b


def kaiming(*axes: int, gain: float = 1.0) -> Init:
    """Returns an initializer that is uniform in ±gain / √inputs; 1 is how PyTorch's Linear begins."""

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        bound = gain * math.prod(shape[a] for a in axes) ** -0.5
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    return init


def largest_rank(target: Matrix) -> int:
    """Returns the rank that the target's matrix can have at most."""
    return min(math.prod(target.in_shape), math.prod(target.out_shape))


def pair(c: LowRankAdapter, target: Matrix, a: Init | None = None, b: Init = zeros) -> Specs:
    """Returns the specs of the matrices a and b of one layer, by default such that a fresh adapter does nothing."""
    if c.rank < 1:
        raise ValueError(
            f"adapter.rank: {c.rank} does not fit {target.path}, whose rank is at most {largest_rank(target)}"
        )
    return dict(
        a=Spec((*target.in_shape, c.rank), (*target.in_axes, None), a or kaiming(*range(target.ins))),
        b=Spec((c.rank, *target.out_shape), (None, *target.out_axes), b),
    )


def leaf(c: LowRankAdapter, target: Matrix, base: Any, adapter: Weights) -> LowRank:
    """Returns a target's weight with its update, without dropout."""
    return LowRank(base, scale=c.scale, ins=target.ins, **adapter)


def bind(
    c: LowRankAdapter, target: Matrix, base: Any, adapter: Weights, shared: Weights, key: jax.Array | None
) -> LowRank:
    made = leaf(c, target, base, adapter)
    return (
        made if key is None or not c.dropout else made.replace(key=jax.random.split(key, target.layers), rate=c.dropout)
    )


def factors(c: LowRankAdapter, target: Matrix, adapter: Weights, shared: Weights) -> tuple[np.ndarray, np.ndarray]:
    return leaf(c, target, None, adapter).factors()


def inner_products(x: jax.Array, y: jax.Array, side: str) -> jax.Array:
    """Returns the inner products of the directions of two stacks, `[L, R, S]`, whole on every device: of two a's
    `[L, inputs, R]`, or of two b's `[L, R, outputs]`, as `side` says."""
    inner = "xyz"[: x.ndim - 2]
    eq = f"l{inner}r,l{inner}s->lrs" if side == "a" else f"lr{inner},ls{inner}->lrs"
    mesh = jax.sharding.get_abstract_mesh()
    whole = None if mesh.empty or not mesh.are_all_axes_explicit else jax.sharding.PartitionSpec()
    return jnp.einsum(eq, x, y, out_sharding=whole)


def side_by_side(parts: Sequence[Matrix], layers: Mapping[str, Layer]) -> tuple[dict[str, Layer], int]:
    """Returns the weights of matrices which are one module in published files, and their common rank: all have the same
    a, in which their own stand side by side, and each b is zero but for the directions of its own."""
    a, start = np.concatenate([layer["a"] for layer in layers.values()], -1), 0
    out: dict[str, Layer] = {}
    for part in parts:
        b = np.zeros((a.shape[-1], *part.out_shape), np.float32)
        if part.path in layers:
            stop = start + layers[part.path]["a"].shape[-1]
            b[start:stop] = layers[part.path]["b"]
            start = stop
        out[part.path] = dict(a=a, b=b)
    return out, a.shape[-1]
