"""IA³ (Liu et al. 2022): keys, values and what goes into the ffn's last matrix are multiplied, each number by a learned
one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.core.spec import Spec, ones
from jaxlm.nn.layers import times
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import Wrapped, dense
from jaxlm.weights.adapters.method import Method, Specs, TargetedAdapter, Weights
from jaxlm.weights.adapters.peft_format import Layer, PeftFormat, PeftTensor
from jaxlm.weights.matrices import Matrix


@dataclass(frozen=True, kw_only=True)
class Ia3(TargetedAdapter):
    """IA³ (Liu et al. 2022) learns a factor of each key, value and hidden number of the ffn."""


class Scaled(Wrapped):
    """A weight whose outputs, the bias included, or whose inputs are multiplied by learned numbers."""

    by: jax.Array
    ins: int = struct.field(pytree_node=False)
    inputs: bool = struct.field(pytree_node=False)
    vectors = ("by",)

    def einsum(self, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
        return shard.einsum(eq, times(x, self.by) if self.inputs else x, self.base, *axes)

    def after(self, y: jax.Array, shard: Layout) -> jax.Array:
        return y if self.inputs else times(y, self.by)

    def gathered(self, s: Spec, shard: Layout) -> "Scaled":
        axes = s.axes[1:] if s.axes[:1] == ("layers",) else s.axes
        home = axes[: self.ins] if self.inputs else axes[self.ins :]
        return self.replace(base=shard.gather(self.base, s), by=shard(self.by, *home))

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        w, by = dense(self.base), self.by.astype(jnp.float32)
        if self.inputs:
            return (w * by.reshape(*by.shape, *[1] * (w.ndim - by.ndim))).astype(dtype)
        lead = w.ndim - self.ins - (by.ndim - 1)
        return (w * by.reshape(*by.shape[:lead], *[1] * self.ins, *by.shape[lead:])).astype(dtype)

    def dense_bias(self, bias: jax.Array) -> jax.Array:
        return bias if self.inputs else bias * self.by


def scales_inputs(target: Matrix) -> bool:
    """Returns whether a matrix has its inputs scaled: the last ones of attention and ffn, others have their outputs."""
    return target.path.rpartition("/")[2] in ("o", "cross_o", "down")


def specs(c: Ia3, target: Matrix) -> Specs:
    if scales_inputs(target):
        return dict(by=Spec(target.in_shape, target.in_axes, ones, role="scale"))
    return dict(by=Spec(target.out_shape, target.out_axes, ones, role="scale"))


def bind(
    c: Ia3, target: Matrix, base: Any, adapter: Weights, shared: Weights, key: jax.Array | None
) -> Scaled:  # fmt: skip
    return Scaled(base, adapter["by"], target.ins, scales_inputs(target))


def ones_elsewhere(parts: Sequence[Matrix], layers: Mapping[str, Layer]) -> tuple[dict[str, Layer], int]:
    """Returns the factors of matrices which are one module in published files: of those without an adapter, ones."""
    return {p.path: layers.get(p.path) or dict(by=np.ones(p.out_shape, np.float32)) for p in parts}, 0


method = Method[Ia3](
    Config=Ia3,
    targets=(r"(^|/)(cross_)?[kv]$", r"(^|/)down$"),
    specs=specs,
    bind=bind,
    peft=PeftFormat[Ia3](
        reads=("IA3",),
        config=lambda values, targets, rank: Ia3(targets=targets),
        settings=lambda c, rank, others: dict(peft_type="IA3"),
        tensors=dict(by=PeftTensor("ia3_l", "scale", column=True, scales_inputs=scales_inputs)),
        left_out=1.0,
        fused=ones_elsewhere,
        inputs_setting="feedforward_modules",
    ),
)
