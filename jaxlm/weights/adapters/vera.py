"""VeRA (Kopiczko et al. 2024): one pair of random matrices for all targets, of which each learns factors alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.spec import Spec, zeros
from jaxlm.weights.adapters import low_rank
from jaxlm.weights.adapters.low_rank import LowRank, LowRankAdapter, kaiming
from jaxlm.weights.adapters.method import Method, Specs, Weights
from jaxlm.weights.adapters.peft_format import PeftFormat, PeftTensor
from jaxlm.weights.matrices import Matrix


@dataclass(frozen=True, kw_only=True)
class Vera(LowRankAdapter):
    """VeRA (Kopiczko et al. 2024): learned factors of random matrices that all targets share; rank 256 is usual."""


def specs(c: Vera, target: Matrix) -> Specs:
    e = Spec((c.rank,), (None,), lambda key, shape: jnp.full(shape, 0.1), role="scale")
    return dict(e=e, g=Spec(target.out_shape, target.out_axes, zeros, role="scale"))


def shared(c: Vera, targets: Mapping[str, Matrix]) -> Specs:
    """Returns one pair of matrices at random for all targets, of which each takes its part: uniform with variance 2 /
    inputs (He et al. 2015), as in the paper, since they are never trained to another size."""
    projection = kaiming(0, gain=6**0.5)
    ins = max(math.prod(t.in_shape) for t in targets.values())
    outs = max(math.prod(t.out_shape) for t in targets.values())
    return dict(a=Spec((ins, c.rank), (None, None), projection), b=Spec((c.rank, outs), (None, None), projection))


def _with_matrices(c: Vera, target: Matrix, adapter: Weights, shared: Weights) -> Weights:
    n, m = math.prod(target.in_shape), math.prod(target.out_shape)
    a = shared["a"][:n].reshape(*target.in_shape, c.rank)
    b = shared["b"][:, :m].reshape(c.rank, *target.out_shape)
    return adapter | {k: jnp.broadcast_to(x[None], (target.layers, *x.shape)) for k, x in (("a", a), ("b", b))}


def bind(
    c: Vera, target: Matrix, base: Any, adapter: Weights, shared: Weights, key: jax.Array | None
) -> LowRank:  # fmt: skip
    return low_rank.bind(c, target, base, _with_matrices(c, target, adapter, shared), shared, key)


def factors(c: Vera, target: Matrix, adapter: Weights, shared: Weights) -> tuple[np.ndarray, np.ndarray]:
    return low_rank.leaf(c, target, None, _with_matrices(c, target, adapter, shared)).factors()


def peft_config(values: Mapping[str, Any], targets: tuple[str, ...], rank: int) -> Vera:
    return Vera(targets=targets, rank=rank, dropout=float(values.get("vera_dropout", 0)))


def peft_settings(c: Vera, rank: int, others: Mapping[str, int]) -> dict[str, Any]:
    return dict(peft_type="VERA", r=c.rank, vera_dropout=c.dropout, save_projection=True, projection_prng_key=0)


method = Method[Vera](
    Config=Vera,
    targets=low_rank.TARGETS,
    specs=specs,
    bind=bind,
    shared=shared,
    factors=factors,
    defining=("rank",),
    peft=PeftFormat[Vera](
        reads=("VERA",),
        config=peft_config,
        settings=peft_settings,
        tensors=dict(e=PeftTensor("vera_lambda_d", "rank"), g=PeftTensor("vera_lambda_b", "scale")),
        shared=dict(a="base_model.vera_A", b="base_model.vera_B"),
        shared_remedy="; save it with save_projection=True",
    ),
)
