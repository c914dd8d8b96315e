"""Chooses how layers multiply activations by their matrices in training: in the compute dtype or in few bits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core import config
from jaxlm.nn import fp8, int8, mxfp8
from jaxlm.nn.leaf import Leaf
from jaxlm.nn.narrow import Place, Way
from jaxlm.runtime.mesh import devices

WAYS: dict[str, Way] = {"fp8": fp8.WAY, "mxfp8": mxfp8.WAY, "int8": int8.WAY}
"""Ways to multiply in few bits by the value of `execution.matmul`."""


@dataclass(eq=False)
class Activations:
    """The activations of one layer that are rounded already: several matrices read the same, which is then rounded once
    and kept once for the backward pass. It holds tracers: make one in each trace of a layer."""

    way: Way
    made: dict[tuple[int, tuple[int, ...], int], tuple[jax.Array, Any]] = field(default_factory=dict)

    def of(self, x: jax.Array, shape: tuple[int, ...], inputs: int) -> Any:
        """Returns an activation reshaped and rounded, to be contracted over its last `inputs` dimensions."""
        key = id(x), shape, inputs
        if key not in self.made:
            self.made[key] = x, self.way.rounded(jax.lax.stop_gradient(x).reshape(shape), inputs)
        return self.made[key][1]


class NarrowMatrix(Leaf):
    """A matrix in the compute dtype that is multiplied in few bits, also for the gradients of both factors."""

    w: jax.Array
    seen: Activations = struct.field(pytree_node=False)
    axes: tuple[str | None, ...] = struct.field(pytree_node=False, default=())
    """Logical axes of the matrix; none: no mesh."""

    @property
    def ndim(self) -> int:
        return self.w.ndim

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return self.w.astype(dtype)

    def einsum(self, eq: str, x: jax.Array, shard: Any, *axes: str | None) -> jax.Array:
        xs, _, ws = eq.partition("->")[0].partition(",")
        inputs, mesh, product = sum(a in xs for a in ws), jax.sharding.get_abstract_mesh(), self.seen.way.product
        if mesh.empty:  # two plain matrices, so that nothing stands between the product and its scale
            inner = math.prod(self.w.shape[:inputs])
            rounded, w = self.seen.of(x, (-1, inner), 1), self.w.reshape(inner, -1)
            y = product(1, Place(), x.reshape(-1, inner), w, rounded)
            return y.reshape(*x.shape[: x.ndim - inputs], *self.w.shape[inputs:])
        explicit, rows = mesh.are_all_axes_explicit, x.ndim - inputs
        cuts = (math.prod(shard.ways(a, mesh) for a in part) for part in (axes[:rows], self.axes[:inputs], axes[rows:]))
        place = Place(shard.spec(axes) if explicit else None, *cuts)
        y = product(inputs, place, x, self.w, self.seen.of(x, x.shape, inputs))
        return y if explicit else shard(y, *axes)


def is_narrow(e: config.Execution, i: int, n: int) -> bool:
    """Returns whether layer `i` of a stack of `n` multiplies in few bits."""
    return e.matmul != "dtype" and e.matmul_skip_first <= i < n - e.matmul_skip_last


def gpu_options(e: config.Execution) -> Mapping[str, bool]:
    """Returns the compiler options that a run's products need on a GPU."""
    return WAYS[e.matmul].gpu_options if e.matmul != "dtype" else {}


def choose(e: config.Execution, layers: int | None, stages: int) -> str:
    """Returns how a run's layers multiply, in words; empty: in the compute dtype. `layers`: of the shortest stack.

    Raises ValueError where these devices can't multiply so, and where no layer would.
    """
    skipped = e.matmul_skip_first, e.matmul_skip_last
    fields = "execution.matmul_skip_first, matmul_skip_last"
    if e.matmul == "dtype":
        if any(skipped):
            raise ValueError(f"{fields}: nothing is multiplied in few bits; set matmul to {', '.join(WAYS)}")
        return ""
    way, device = WAYS[e.matmul], devices()[0]
    if device.platform != "cpu" and not way.multiplies(device):
        raise ValueError(
            f"execution.matmul: {e.matmul} needs {way.needs}, and {device.device_kind} has no {e.matmul} products; "
            "leave it at dtype"
        )
    if layers is None:
        raise ValueError(
            f"execution.matmul: {e.matmul} is for models whose layers this package runs; leave it at dtype"
        )
    if sum(skipped) >= layers:
        raise ValueError(f"{fields}: {sum(skipped)} of {layers} layers leave none for {e.matmul}; skip fewer")
    if e.matmul == "mxfp8" and stages > 1:
        raise ValueError("execution.matmul: mxfp8 is not for stages of a pipeline; set mesh.stage to 1, or take fp8")
    if any(skipped) and stages > 1:
        raise ValueError(f"{fields}: stages of a pipeline must be alike; set them to 0")
    words = way.words
    if any(skipped):
        words += f" but for the first {skipped[0]} and the last {skipped[1]}"
    return words + (", emulated on this CPU" if device.platform == "cpu" else "")
