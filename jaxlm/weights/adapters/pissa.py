"""PiSSA (Meng et al. 2024): LoRA whose matrices begin as the principal part of a weight, which the base loses."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.weights.adapters import lora, low_rank
from jaxlm.weights.adapters.lora import ScaledLowRank
from jaxlm.weights.adapters.method import Method, Specs, Weights
from jaxlm.weights.adapters.peft_format import Layer, PeftFormat
from jaxlm.weights.matrices import Matrix


@dataclass(frozen=True, kw_only=True)
class Pissa(ScaledLowRank):
    """PiSSA (Meng et al. 2024): LoRA that begins as the principal part of each weight."""


def specs(c: Pissa, target: Matrix) -> Specs:
    if c.rank > (most := low_rank.largest_rank(target)):
        raise ValueError(f"adapter.rank: {c.rank} does not fit {target.path}, whose rank is at most {most}")
    pair = low_rank.pair(c, target)
    return pair | dict(a0=pair["a"], b0=pair["b"])


def initial_values(c: Pissa, target: Matrix, base: jax.Array, adapter: Weights) -> Weights:
    """Returns matrices whose scaled product is the base's part of the largest singular values, twice: what is trained,
    and what the base has already."""
    w = base.astype(jnp.float32).reshape(target.layers, math.prod(target.in_shape), -1)
    u, d, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(d[:, : c.rank] / c.scale)
    a = (u[..., : c.rank] * root[:, None]).reshape(adapter["a"].shape)
    b = (root[..., None] * v[:, : c.rank]).reshape(adapter["b"].shape)
    return adapter | dict(a=a, b=b, a0=a, b0=b)


def on_plain_base(layer: Layer) -> Layer:
    """Returns an update of twice the rank: what it began as counts with the other sign."""
    return dict(
        a=np.concatenate([layer["a"], layer["a0"]], -1),
        b=np.concatenate([layer["b"], -layer["b0"]]),
    )


method = Method[Pissa](
    Config=Pissa,
    targets=low_rank.TARGETS,
    specs=specs,
    bind=low_rank.bind,
    frozen=("a0", "b0"),
    initial_values=initial_values,
    needs_whole_base=True,
    rate=lora.rate,
    factors=low_rank.factors,
    defining=lora.DEFINING,
    peft=PeftFormat[Pissa](
        reads=(),
        config=lora.peft_config(Pissa),
        settings=lora.peft_settings,
        tensors=lora.TENSORS,
        on_plain_base=on_plain_base,
        fused=low_rank.side_by_side,
    ),
)
