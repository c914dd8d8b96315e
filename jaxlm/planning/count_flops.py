"""Counts the FLOPs of matrix products that a function runs in its jaxpr, recomputation and loops included."""

import math
from typing import Any

from jax.extend import core

from jaxlm.nn import mxfp8
from jaxlm.nn.kernels import packed_attention


def count(jaxpr: Any, narrow: bool = False) -> float:
    """Returns the FLOPs of all devices together; with `narrow`, those of products whose factors are both in eight bits.

    A conditional counts as its dearest branch. A loop whose length is data counts as often as its condition allows by a
    constant, or once.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # a ClosedJaxpr of JAX has the Jaxpr inside
    return float(sum(_equation(e, narrow) for e in jaxpr.eqns))


def _equation(e: Any, narrow: bool) -> float:
    name = e.primitive.name
    if e.params.get("name") == packed_attention.FURTHER:
        return 0.0  # the first call is counted for all pairs of a row
    if narrow and (name.startswith("ragged_dot") or "dot_product_attention" in name or name == "pallas_call"):
        return 0.0
    if name == "dot_general":
        if narrow and any(x.aval.dtype.itemsize > 1 for x in e.invars):
            return 0.0
        (contracted, _), _ = e.params["dimension_numbers"]
        shape = e.invars[0].aval.shape
        return 2 * math.prod(e.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    if name == mxfp8.PRIMITIVE:
        batch, rows, inner = e.invars[0].aval.shape
        return 2.0 * batch * rows * inner * e.invars[1].aval.shape[1]
    if name.startswith("ragged_dot"):
        rows, inner = e.invars[0].aval.shape[-2:]
        return 2 * rows * inner * e.outvars[0].aval.shape[-1]
    if "dot_product_attention" in name:
        batch, queries, heads, width = e.invars[0].aval.shape  # its layout is BTNH; two products forward, five backward
        kind = e.params.get("mask_type")
        keys = e.invars[1].aval.shape[1] / (2 if kind is not None and kind.name == "CAUSAL" else 1)
        return (10 if "bwd" in name or "backward" in name else 4) * batch * queries * heads * width * keys
    if name == "pallas_call":
        estimate = e.params.get("cost_estimate")
        if estimate is not None:
            return float(estimate.flops)
        return math.prod(e.params["grid_mapping"].grid) * count(e.params["jaxpr"])  # blocks that it skips are included
    inner = [count(j, narrow) for value in e.params.values() for j in _jaxprs(value)]
    if name == "cond":
        return max(inner, default=0.0)
    times = 1
    if name == "scan":
        times = e.params["length"]
    elif name == "while":
        times = _max_trips(e.params["cond_jaxpr"].jaxpr)
    elif name == "shard_map":  # its body is written for one device
        mesh, manual = e.params["mesh"], e.params.get("manual_axes", e.params.get("axis_names"))
        times = math.prod(n for a, n in mesh.shape.items() if manual is None or a in manual)
    return times * sum(inner)


def _max_trips(condition: Any) -> int:
    limits = [v.val for e in condition.eqns if e.primitive.name == "lt" for v in e.invars[1:]
              if isinstance(v, core.Literal)]  # fmt: skip
    return int(min(limits, default=1))


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [j for v in value for j in _jaxprs(v)]
    return []
