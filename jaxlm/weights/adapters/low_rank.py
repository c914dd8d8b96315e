"""Updates of low rank: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024), PiSSA (Meng et al.
2024), AdaLoRA's form (Zhang et al. 2023) and VeRA (Kopiczko et al. 2024).

y = x·W + scale · ((x·a) ∘ e)·b ∘ g. R rank; W, a and b keep the dimensions of the site, such as D H C.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core.config import Adapter
from jaxlm.core.spec import Spec, normal, ones, zeros
from jaxlm.nn.layers import dropout
from jaxlm.nn.layout import Layout
from jaxlm.weights import quantized
from jaxlm.weights.sites import Site

TARGETS = (r"(^|/)(cross_)?[qv]$",)


class LowRank(struct.PyTreeNode):
    """A weight and its update."""

    base: Any
    a: jax.Array
    """Inputs, R."""
    b: jax.Array
    """R, outputs."""
    scale: float = struct.field(pytree_node=False)
    ins: int = struct.field(pytree_node=False)
    e: jax.Array | None = None
    """R: of each direction."""
    g: jax.Array | None = None
    """Of each output."""
    m: jax.Array | None = None
    """Outputs: their magnitude (DoRA)."""
    a0: jax.Array | None = None
    b0: jax.Array | None = None
    """What a and b began as, where the base has it already (PiSSA): it doesn't count."""
    rows_BR: jax.Array | None = None
    """Which directions each row has (several adapters in a batch); of more rows, those of one stand side by side."""
    key: jax.Array | None = None
    """Of dropout."""
    rate: float = struct.field(pytree_node=False, default=0.0)

    def einsum(self, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
        y = shard.einsum(eq, x, self.base, *axes)
        kept = dropout(x, self.rate, self.key)
        more = self._through(eq, kept, self.a, self.b, shard, axes)
        if self.a0 is not None and self.b0 is not None:
            more -= self._through(eq, kept, self.a0, self.b0, shard, axes)
        if self.m is None:
            return y + more
        # The norm is no path for gradients (Liu et al. 2024, section 4.3).
        share = self.m.astype(jnp.float32) / jax.lax.stop_gradient(self.norm())
        share = shard(share, *axes[len(axes) - share.ndim :]).astype(y.dtype)
        share = share.reshape((1,) * (y.ndim - share.ndim) + share.shape)
        plain = y if self.key is None or not self.rate else shard.einsum(eq, kept, self.base, *axes)
        return y + (share - 1) * plain + share * more

    def _through(self, eq: str, x: jax.Array, a: Any, b: Any, shard: Layout, axes: tuple) -> jax.Array:
        left, _, out = eq.partition("->")
        xs, _, ws = left.partition(",")
        rows, inner, outer = xs[: len(xs) - self.ins], ws[: self.ins], ws[self.ins :]
        z = shard.einsum(f"{xs},{inner}R->{rows}R", x, a, *axes[: len(rows)], None)
        if self.e is not None:
            z *= self.e.astype(z.dtype).reshape((1,) * len(rows) + (-1,))
        if self.rows_BR is not None:
            own = jnp.repeat(self.rows_BR, z.shape[0] // self.rows_BR.shape[0], 0).astype(z.dtype)
            z *= own.reshape(z.shape[0], *[1] * (len(rows) - 1), -1)
        y = shard.einsum(f"{rows}R,R{outer}->{out}", z, b, *axes) * self.scale
        return y if self.g is None else y * self.g.astype(y.dtype).reshape((1,) * len(rows) + self.g.shape)

    def gathered(self, s: Spec, shard: Layout) -> "LowRank":
        axes = s.axes[1:] if s.axes[:1] == ("layers",) else s.axes
        ins, outs = axes[: self.ins], axes[self.ins :]
        homes = dict(a=(*ins, None), b=(None, *outs), a0=(*ins, None), b0=(None, *outs), e=(None,), g=outs, m=outs)
        own = {
            n: shard(x.astype(shard.dtype), *home) for n, home in homes.items() if (x := getattr(self, n)) is not None
        }
        if self.rows_BR is not None:
            own["rows_BR"] = shard(self.rows_BR, "batch", None)
        return self.replace(base=shard.gather(self.base, s), **own)

    def norm(self) -> jax.Array:
        """Length of each output's column of base and update, float32. Of one layer, or of a stack as `merged`."""
        lead = self.a.ndim - 1 - self.ins
        return jnp.sqrt(jnp.square(self._sum()).sum(tuple(range(lead, lead + self.ins))))

    def _sum(self) -> jax.Array:
        return quantized.dense(self.base) + self.delta()

    def delta(self) -> jax.Array:
        """What is added to the base's numbers, float32."""

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

        more = product(self.a, self.b)
        return more if self.a0 is None or self.b0 is None else more - product(self.a0, self.b0)

    def merged(self) -> jax.Array:
        """One dense weight that does the same, float32."""
        if self.m is None:
            return self._sum()
        lead = self.a.ndim - 1 - self.ins
        share = self.m.astype(jnp.float32) / self.norm()
        return self._sum() * share.reshape(*share.shape[:lead], *[1] * self.ins, *share.shape[lead:])


def scale(c: Adapter) -> float:
    if c.method == "vera":
        return 1.0
    if c.method == "adalora":
        return c.alpha / (c.rank + 1e-5)
    return c.alpha / (math.sqrt(c.rank) if c.rank_stabilized else c.rank)


def kaiming(*axes: int) -> Any:
    """Uniform, as PyTorch's Linear begins: ±1 / √inputs."""

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        bound = math.prod(shape[a] for a in axes) ** -0.5
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    return init


def specs(c: Adapter, s: Site) -> dict[str, Spec]:
    """Of one layer."""
    if c.method == "vera":
        e = Spec((c.rank,), (None,), lambda key, shape: jnp.full(shape, 0.1))
        return dict(e=e, g=Spec(s.out_shape, s.out_axes, zeros))
    most = min(math.prod(s.in_shape), math.prod(s.out_shape))
    if c.rank < 1 or (c.method == "pissa" and c.rank > most):
        raise ValueError(f"adapter.rank: {c.rank} does not fit {s.path}, whose rank is at most {most}")
    ada = c.method == "adalora"
    a = Spec((*s.in_shape, c.rank), (*s.in_axes, None), normal(0.02) if ada else kaiming(*range(s.ins)))
    b = Spec((c.rank, *s.out_shape), (None, *s.out_axes), normal(0.02) if ada else zeros)
    out = dict(a=a, b=b)
    if ada:
        out["e"] = Spec((c.rank,), (None,), zeros)
    if c.method == "dora":
        out["m"] = Spec(s.out_shape, s.out_axes, ones)
    if c.method == "pissa":
        out |= dict(a0=a, b0=b)
    return out


FROZEN = ("a0", "b0")


def shared(c: Adapter, sites: dict[str, Site]) -> dict[str, Spec]:
    """VeRA: one pair of matrices at random for all sites, of which each takes its part."""
    if c.method != "vera":
        return {}
    ins, outs = (max(math.prod(getattr(s, side)) for s in sites.values()) for side in ("in_shape", "out_shape"))
    return dict(a=Spec((ins, c.rank), (None, None), kaiming(0)), b=Spec((c.rank, outs), (None, None), kaiming(0)))


def start(c: Adapter, s: Site, base: jax.Array, own: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """First values that come from the base's."""
    if c.method == "dora":
        return own | dict(m=_leaf(c, s, base, own).norm())
    if c.method != "pissa":
        return own
    w = base.astype(jnp.float32).reshape(s.layers, math.prod(s.in_shape), -1)
    u, d, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(d[:, : c.rank] / scale(c))
    a = (u[..., : c.rank] * root[:, None]).reshape(own["a"].shape)
    b = (root[..., None] * v[:, : c.rank]).reshape(own["b"].shape)
    return own | dict(a=a, b=b, a0=a, b0=b)


def _leaf(c: Adapter, s: Site, base: Any, own: dict[str, jax.Array]) -> LowRank:
    more: dict[str, Any] = {n: own[n] for n in ("e", "g", "m", "a0", "b0") if n in own}
    return LowRank(base, own["a"], own["b"], scale(c), s.ins, **more)


def bind(c: Adapter, s: Site, base: Any, own: dict[str, Any], common: dict[str, Any], key: jax.Array | None) -> LowRank:
    if common:
        n, m = math.prod(s.in_shape), math.prod(s.out_shape)
        a = common["a"][:n].reshape(*s.in_shape, c.rank)
        b = common["b"][:, :m].reshape(c.rank, *s.out_shape)
        own = own | {k: jnp.broadcast_to(x[None], (s.layers, *x.shape)) for k, x in (("a", a), ("b", b))}
    leaf = _leaf(c, s, base, own)
    return leaf if key is None or not c.dropout else leaf.replace(key=jax.random.split(key, s.layers), rate=c.dropout)
