"""Orthogonal LoRA (O-LoRA, Wang et al. 2023): every task of a sequence has an update of low rank of its own, in
directions that those of the tasks before don't use.

What earlier tasks learned stays as it is: their matrices stand side by side as `previous_a` and `previous_b`, which
aren't trained, and the model's update is the sum of all. P is the rank of the earlier ones together, R that of the new
one.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import tree
from jaxlm.core.config import Adapter
from jaxlm.core.ranges import Natural, NonNegative
from jaxlm.core.spec import Init
from jaxlm.weights.adapters import lora, low_rank
from jaxlm.weights.adapters.lora import Lora, ScaledLowRank
from jaxlm.weights.adapters.method import Growth, Method, Specs, Weights
from jaxlm.weights.adapters.peft_format import Layer, PeftFormat
from jaxlm.weights.matrices import Matrix

TINY = 1e-12  # in square roots, whose slope at zero has no end


@dataclass(frozen=True, kw_only=True)
class OrthogonalLora(ScaledLowRank):
    """Orthogonal LoRA (Wang et al. 2023): LoRA whose directions are kept orthogonal to those of earlier tasks, which
    stay as they are. A run that starts from a run with it, or with LoRA, adds an update of its own."""

    orthogonality: NonNegative = 0.5
    """λ₁ of λ₁ · Σ |a_beforeᵀ · a|, over all pairs of an earlier direction and a new one (`l1` in the paper's code)."""
    norm: NonNegative = 0.0
    """λ₂ of λ₂ · Σ (‖a‖₂ + ‖b‖₂), over all new matrices."""
    previous: Natural = 0
    """The rank of earlier tasks' updates together; the model that a run starts from says it."""


def specs(c: OrthogonalLora, target: Matrix) -> Specs:
    if not c.previous:
        return low_rank.pair(c, target)
    own = low_rank.pair(c, target, a=_drawn_anew(low_rank.kaiming(*range(target.ins)), c.previous))
    before = low_rank.pair(dataclasses.replace(c, rank=c.previous), target)
    return own | dict(previous_a=before["a"], previous_b=before["b"])


def _drawn_anew(init: Init, number: int) -> Init:
    """Returns an initializer that draws other numbers: with the same seed the directions of an earlier task would begin
    as those of the new one."""
    return lambda key, shape: init(jax.random.fold_in(key, number), shape)


def joined(target: Matrix, adapter: Weights) -> Weights:
    """Returns one a and one b of all tasks, the earlier ones first, of one layer or a stack of them."""
    if "previous_a" not in adapter:
        return dict(a=adapter["a"], b=adapter["b"])
    axis = adapter["b"].ndim - len(target.out_shape) - 1
    return dict(
        a=jnp.concatenate([adapter["previous_a"], adapter["a"]], -1),
        b=jnp.concatenate([adapter["previous_b"], adapter["b"]], axis),
    )


def bind(
    c: OrthogonalLora, target: Matrix, base: Any, adapter: Weights, shared: Weights, key: jax.Array | None
) -> low_rank.LowRank:
    return low_rank.bind(c, target, base, joined(target, adapter), shared, key)


def factors(c: OrthogonalLora, target: Matrix, adapter: Weights, shared: Weights) -> tuple[np.ndarray, np.ndarray]:
    return low_rank.factors(c, target, joined(target, adapter), shared)


def penalty(c: OrthogonalLora, params: Any) -> jax.Array:
    """Returns λ₁ · Σ |a_beforeᵀ · a| + λ₂ · Σ (‖a‖₂ + ‖b‖₂), over all layers of all targets, float32."""
    flat, total = tree.flatten(params["adapter"]), jnp.zeros((), jnp.float32)
    for path, x in flat.items():
        side = path.rpartition("/")[2]
        if side in ("a", "b") and c.norm:
            total += c.norm * jnp.sqrt(jnp.square(x).sum(tuple(range(1, x.ndim))) + TINY).sum()
        if side == "a" and c.previous and c.orthogonality:
            before = flat[f"{path.removesuffix('a')}previous_a"]
            total += c.orthogonality * jnp.abs(low_rank.inner_products(before, x, "a")).sum()
    return total


def settings_after(c: OrthogonalLora, before: Adapter) -> OrthogonalLora:
    """Returns the settings of a run that starts from a model with the adapter `before`."""
    if not isinstance(before, Lora | OrthogonalLora):
        return dataclasses.replace(c, previous=0)
    return dataclasses.replace(c, previous=before.rank + (before.previous if isinstance(before, OrthogonalLora) else 0))


def grown(c: OrthogonalLora, before: Lora | OrthogonalLora, target: Matrix, adapter: Weights) -> Weights:
    """Returns the matrices of earlier tasks from all of the adapter before; its scale goes into b."""
    every = joined(target, adapter)
    return dict(previous_a=every["a"], previous_b=every["b"] * (before.scale / c.scale))


def on_plain_base(layer: Layer) -> Layer:
    """Returns one update of all tasks' ranks together."""
    if "previous_a" not in layer:
        return layer
    return dict(
        a=np.concatenate([layer["previous_a"], layer["a"]], -1), b=np.concatenate([layer["previous_b"], layer["b"]])
    )


method = Method[OrthogonalLora](
    Config=OrthogonalLora,
    targets=low_rank.TARGETS,
    specs=specs,
    bind=bind,
    frozen=("previous_a", "previous_b"),
    rate=lora.rate,
    penalty=penalty,
    factors=factors,
    growth=Growth[OrthogonalLora](bases=(Lora, OrthogonalLora), settings=settings_after, weights=grown),
    peft=PeftFormat[OrthogonalLora](
        reads=(),
        config=lora.peft_config(OrthogonalLora),
        settings=lora.peft_settings,
        tensors=lora.TENSORS,
        on_plain_base=on_plain_base,
        fused=low_rank.side_by_side,
    ),
)
