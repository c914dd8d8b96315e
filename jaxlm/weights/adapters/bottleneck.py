"""Bottlenecks are small networks within layers: after attention and ffn (Houlsby et al. 2019), after the ffn (Pfeiffer
et al. 2021), or beside it (He et al. 2022). Their last matrix begins as zeros, so that a fresh adapter does nothing.

D model width, N bottleneck's width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from flax import struct

from jaxlm.core.ranges import Positive
from jaxlm.core.spec import Spec, bias, fan_in, zeros
from jaxlm.nn.layers import ACTIVATIONS, add_bias
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import Wrapped
from jaxlm.weights.adapters.method import Bind, Method, Specs, TargetedAdapter, Weights
from jaxlm.weights.matrices import Matrix


@dataclass(frozen=True, kw_only=True)
class BottleneckAdapter(TargetedAdapter):
    """Every bottleneck has these settings."""

    reduction: Positive = 16.0
    """Model width over the bottleneck's (2 is usual for parallel)."""


@dataclass(frozen=True, kw_only=True)
class Houlsby(BottleneckAdapter):
    """Bottlenecks stand after attention and ffn (Houlsby et al. 2019)."""


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(BottleneckAdapter):
    """Bottlenecks stand after the ffn (Pfeiffer et al. 2021)."""


@dataclass(frozen=True, kw_only=True)
class Parallel(BottleneckAdapter):
    """Bottlenecks stand beside the ffn and add to its output (He et al. 2022)."""


class Bottleneck(Wrapped):
    """A matrix and a network that takes its output, or that takes its input beside the whole ffn."""

    down: jax.Array
    """D N."""
    down_bias: jax.Array
    up: jax.Array
    """N D."""
    up_bias: jax.Array
    activation: str = struct.field(pytree_node=False)
    scale: float = struct.field(pytree_node=False)
    """What the network's output is multiplied by."""
    parallel: bool = struct.field(pytree_node=False)
    vectors: ClassVar[tuple[str, ...]] = ("down_bias", "up_bias")

    def after(self, y_BTD: jax.Array, shard: Layout) -> jax.Array:
        return y_BTD if self.parallel else y_BTD + self._network(y_BTD, shard)

    def parallel_branch(self, x_BTD: jax.Array, shard: Layout) -> jax.Array | None:
        return self._network(x_BTD, shard) if self.parallel else None

    def _network(self, x_BTD: jax.Array, shard: Layout) -> jax.Array:
        h_BTN = self._hidden(x_BTD, shard)
        y_BTD = shard.einsum("btn,nd->btd", ACTIVATIONS[self.activation](h_BTN), self.up, "batch", "seq", None)
        return self.scale * add_bias(y_BTD, self.up_bias)

    def _hidden(self, x_BTD: jax.Array, shard: Layout) -> jax.Array:
        """Returns what the activation takes."""
        return add_bias(shard.einsum("btd,dn->btn", x_BTD, self.down, "batch", "seq", None), self.down_bias)

    def gathered(self, s: Spec, shard: Layout) -> "Bottleneck":
        parts = dict(down=self.down, down_bias=self.down_bias, up=self.up, up_bias=self.up_bias)
        used = {n: w if n in self.vectors else w.astype(shard.dtype) for n, w in parts.items()}
        used = {n: shard(w, *[None] * w.ndim) for n, w in used.items()}
        return self.replace(base=shard.gather(self.base, s), **used)


def _network(c: BottleneckAdapter, D: int) -> Specs:
    N = round(D / c.reduction)
    if N < 1:
        raise ValueError(f"adapter.reduction: {c.reduction} leaves nothing of width {D}; choose at most {D}")
    return dict(
        down=Spec((D, N), ("embed", None), fan_in(0)),
        down_bias=bias(N),
        up=Spec((N, D), (None, "embed"), zeros),
        up_bias=bias(D),
    )


def of_output(c: BottleneckAdapter, target: Matrix) -> Specs:
    [D] = target.out_shape
    return _network(c, D)


def of_input(c: BottleneckAdapter, target: Matrix) -> Specs:
    [D] = target.in_shape
    return _network(c, D)


def binder(activation: str, scale: float = 1.0, parallel: bool = False) -> Bind[Any]:
    """Returns the `bind` of a method whose networks are such."""

    def bind(
        c: Any, target: Matrix, base: Any, adapter: Weights, shared: Weights, key: jax.Array | None
    ) -> Bottleneck:  # fmt: skip
        return Bottleneck(base, **adapter, activation=activation, scale=scale, parallel=parallel)

    return bind


houlsby = Method[Houlsby](
    Config=Houlsby, targets=(r"(^|/)(o|down)$",), specs=of_output, bind=binder("silu"), mergeable=False
)
pfeiffer = Method[Pfeiffer](
    Config=Pfeiffer, targets=(r"(^|/)down$",), specs=of_output, bind=binder("relu"), mergeable=False
)
parallel = Method[Parallel](
    Config=Parallel, targets=(r"(^|/)up$",), specs=of_input, bind=binder("relu", 4.0, True), mergeable=False
)
