"""Compressed matrices as arrays of a checkpoint: what a run's configuration says of them gives their specs, and makes
leaves of them again. They are stored as a dict of arrays under the path of the weight (`blocks/q/int4` …)."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.compression import Stored
from jaxlm.core.spec import Spec, zeros
from jaxlm.nn.leaf import Leaf
from jaxlm.weights import few_bits, quantized
from jaxlm.weights.compress import formats, low_rank
from jaxlm.weights.factored import Factored, factor_axes
from jaxlm.weights.matrices import Matrix

FACTORS = "by"


def nearest(m: Matrix, how: Stored, w: jax.Array) -> Leaf:
    """Returns the leaf of a matrix of all layers, each number rounded to the nearest, or with the nearest of its rank;
    its inputs aren't scaled."""
    f, inputs = how.format, math.prod(m.in_shape)

    def one(w: jax.Array) -> Leaf:
        if f is None:
            found = low_rank.factored(w.reshape(inputs, -1), how.rank)
            return low_rank.leaf(found, m.in_shape, m.out_shape)
        leaf = formats.nearest(f, w.reshape(inputs, -1), m.in_shape, m.out_shape)
        return few_bits.Scaled(base=leaf, by=jnp.ones(m.in_shape), outs=m.outs) if how.scaled else leaf

    for _ in range(m.lead):
        one = jax.vmap(one)
    return one(w.astype(jnp.float32))


def arrays(leaf: Any) -> dict[str, jax.Array]:
    """Returns the arrays of a leaf by the names that they are stored under."""
    if isinstance(leaf, few_bits.Scaled):
        return arrays(leaf.base) | {FACTORS: leaf.by}
    return {name: getattr(leaf, name) for name in leaf.arrays}


def bound(m: Matrix, how: Stored, stored: Mapping[str, Any]) -> Leaf:
    """Returns the leaf that stored arrays of a matrix stand for, of all layers or of one."""
    f = how.format
    if f is None:
        return Factored(**stored, ins=m.ins, outs=m.outs)
    own = {name: x for name, x in stored.items() if name != FACTORS}
    shape: dict[str, Any] = dict(in_shape=m.in_shape, out_shape=m.out_shape)
    leaf: Leaf
    if f.kind == "int4":
        leaf = few_bits.Int4(**own, **shape, group=f.inputs)
    elif f.kind == "fp8":
        leaf = few_bits.Fp8(**own, **shape, block=f.inputs, dynamic=f.dynamic)
    elif f.kind == "mxfp4":
        leaf = few_bits.Mxfp4(**own, **shape)
    else:
        leaf = quantized.bound(own, m.outs, f.dynamic)
    return few_bits.Scaled(base=leaf, by=stored[FACTORS], outs=m.outs) if how.scaled else leaf


def specs(m: Matrix, how: Stored) -> dict[str, Spec]:
    """Returns the specs of the arrays that a matrix of all layers is stored as. ValueError: the format doesn't fit."""
    try:
        made = jax.eval_shape(partial(nearest, m, how), jax.ShapeDtypeStruct(m.spec.shape, jnp.float32))
    except ValueError as error:
        raise ValueError(f"{m.path}: {error}") from None
    whole = arrays(made)
    return {
        name: m.spec._replace(shape=x.shape, axes=_axes(m, how, name, x.shape), init=zeros, dtype=x.dtype)
        for name, x in whole.items()
    }


def _axes(m: Matrix, how: Stored, name: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Returns logical axes of a stored array. Dimensions that were merged are cut by the first of them, and what there
    is one of for several inputs or outputs stays whole along these."""
    if how.format is None:
        return dict(zip(Factored.arrays, factor_axes(m.spec.axes, m.ins, m.outs), strict=True))[name]
    lead = m.spec.axes[: m.lead]
    if name == FACTORS:
        return (*lead, *(None,) * m.ins)
    if how.format.kind in ("int8", "nf4"):
        return quantized.array_axes(name, shape, m.spec.axes, m.outs)
    inputs, outputs = shape[-2:]
    cut = name == how.format.kind and (m.ins == 1 or inputs % m.in_shape[0] == 0)
    return (*lead, m.in_axes[0] if cut else None, m.out_axes[0] if outputs == math.prod(m.out_shape) else None)
