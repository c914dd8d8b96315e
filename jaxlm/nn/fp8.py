"""Multiplies activations by a layer's matrices in fp8 with one scale a tensor: e4m3 forward, e5m2 for gradients
(Micikevicius et al. 2022).

The scale is that of the tensor at hand (current scaling), a power of two, so that scaling rounds nothing. Products are
dots of two fp8 arrays whose result is scaled: XLA makes one call of cuBLASLt of that (`__cublas$lt$matmul$f8`), and
where it chooses another kernel the operands still are fp8. Operands that are widened and scaled before the dot become
fp8 again in cuBLASLt's call alone: in a Triton kernel they are multiplied in the wider type.

N rows, I inputs, O outputs.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core import config
from jaxlm.nn.leaf import Leaf
from jaxlm.runtime import chips
from jaxlm.runtime.mesh import devices, platform

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
# The largest numbers are 0.875 · 2^9 (448) and 0.875 · 2^16 (57,344).
LARGEST_EXPONENT = {E4M3: 9, E5M2: 16}
LARGEST_FRACTION = 0.875
# Compiler options of a step on a GPU: products stand as dots for GemmRewriter, which makes cuBLASLt's calls of those in
# fp8. Triton's kernels would come first, and widen e5m2 beside e4m3.
OPTIONS: dict[str, bool] = {"xla_gpu_enable_triton_gemm": False}


class Scaled(struct.PyTreeNode):
    """A Scaled is a tensor in fp8: `numbers` times `unit`."""

    numbers: jax.Array
    unit: jax.Array
    """A power of two, float32; NaN where the tensor held what isn't finite."""


def scaled(x: jax.Array, kind: Any) -> Scaled:
    """Returns `x` in fp8, times the largest power of two with which its largest magnitude is in range.

    What isn't finite makes the unit NaN: e4m3 has no infinity, and a saturated one would pass for a number.
    """
    top = jnp.max(jnp.abs(x)).astype(jnp.float32)
    fraction, exponent = jnp.frexp(top)
    exponent = jnp.where(fraction > LARGEST_FRACTION, exponent + 1, exponent)
    up = jnp.clip(LARGEST_EXPONENT[kind] - exponent, -126, 126)
    one = jnp.ones((), jnp.float32)
    unit = jnp.where(jnp.isfinite(top), jnp.ldexp(one, -up), jnp.nan)
    return Scaled((x.astype(jnp.float32) * jnp.ldexp(one, up)).astype(kind), unit)


@dataclass(eq=False)
class Activations:
    """The activations of one layer that are in fp8 already: several matrices read the same, which is then rounded once
    and kept once for the backward pass. It holds tracers: make one in each trace of a layer."""

    made: dict[tuple[int, tuple[int, ...]], tuple[jax.Array, Scaled]] = field(default_factory=dict)

    def of(self, x: jax.Array, shape: tuple[int, ...]) -> Scaled:
        """Returns an activation in fp8, reshaped."""
        key = id(x), shape
        if key not in self.made:
            self.made[key] = x, scaled(jax.lax.stop_gradient(x).reshape(shape), E4M3)
        return self.made[key][1]


class Fp8Matrix(Leaf):
    """A matrix in the compute dtype that is multiplied in fp8, also for the gradients of both factors."""

    w: jax.Array
    seen: Activations = struct.field(pytree_node=False)

    @property
    def ndim(self) -> int:
        return self.w.ndim

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return self.w.astype(dtype)

    def einsum(self, eq: str, x: jax.Array, shard: Any, *axes: str | None) -> jax.Array:
        xs, _, ws = eq.partition("->")[0].partition(",")
        inputs, mesh = sum(a in xs for a in ws), jax.sharding.get_abstract_mesh()
        if mesh.empty:  # two plain matrices, so that nothing stands between the product and its scale
            inner = math.prod(self.w.shape[:inputs])
            x8, w = self.seen.of(x, (-1, inner)), self.w.reshape(inner, -1)
            y = _product(1, None, x.reshape(-1, inner), w, x8)
            return y.reshape(*x.shape[: x.ndim - inputs], *self.w.shape[inputs:])
        explicit = mesh.are_all_axes_explicit
        y = _product(inputs, shard.spec(axes) if explicit else None, x, self.w, self.seen.of(x, x.shape))
        return y if explicit else shard(y, *axes)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(inputs: int, home: Any, x: jax.Array, w: jax.Array, x8: Scaled) -> jax.Array:
    """Returns `x`, whose last dimensions are the inputs, times `w`, whose first are. `home`: the result's partition on
    a mesh of explicit axes."""
    return _forward(inputs, home, x, w, x8)[0]


def _forward(inputs: int, home: Any, x: jax.Array, w: jax.Array, x8: Scaled) -> tuple[jax.Array, Any]:
    w8 = scaled(w, E4M3)
    over = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    # Of the wide factors only what their gradients look like is kept.
    return _dot(x8, w8, over, x.dtype, home), (x8, w8, *_likes(home, x, w))


def _backward(inputs: int, home: Any, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x8, w8, x_like, w_like = kept
    g8, outputs = scaled(g, E5M2), w8.numbers.ndim - inputs
    rows = tuple(range(g.ndim - outputs))
    over_outputs = tuple(range(len(rows), g.ndim)), tuple(range(inputs, w8.numbers.ndim))
    dx = _dot(g8, w8, over_outputs, x_like.dtype, x_like.home)
    return dx, _dot(x8, g8, (rows, rows), w_like.dtype, w_like.home), None


_product.defvjp(_forward, _backward)


class _Like(struct.PyTreeNode):
    """A _Like says the type and the partition of a factor's gradient."""

    dtype: Any = struct.field(pytree_node=False)
    home: Any = struct.field(pytree_node=False)


def _likes(home: Any, *factors: jax.Array) -> tuple[_Like, ...]:
    return tuple(_Like(x.dtype, None if home is None else jax.typeof(x).sharding.spec) for x in factors)


def _dot(a: Scaled, b: Scaled, over: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any, home: Any) -> jax.Array:
    """Returns the product of two tensors, summed over these dimensions of each, in float32 but rounded to `dtype`."""
    x, y, options = a.numbers, b.numbers, {} if home is None else {"out_sharding": home}
    if platform() == "cpu":  # has no products of fp8, and float32 holds each exactly
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    product = jax.lax.dot_general(x, y, (over, ((), ())), preferred_element_type=jnp.dtype(dtype), **options)
    return product * (a.unit * b.unit).astype(dtype)


def choose(e: config.Execution, layers: int | None, stages: int) -> str:
    """Returns how a run's layers multiply, in words; empty: in the compute dtype. `layers`: of the shortest stack.

    Raises ValueError where these devices can't multiply fp8, and where no layer would.
    """
    skipped = e.fp8_skip_first, e.fp8_skip_last
    if e.matmul != "fp8":
        if any(skipped):
            raise ValueError("execution.fp8_skip_first, fp8_skip_last: nothing is multiplied in fp8; set matmul=fp8")
        return ""
    device = devices()[0]
    if device.platform != "cpu" and not chips.multiplies_fp8(device):
        raise ValueError(
            f"execution.matmul: fp8 needs a GPU from Ada or Hopper on or a TPU 7x, and {device.device_kind} has no fp8 "
            "products; leave it at dtype"
        )
    if layers is None:
        raise ValueError("execution.matmul: fp8 is for models whose layers this package runs; leave it at dtype")
    if sum(skipped) >= layers:
        raise ValueError(
            f"execution.fp8_skip_first, fp8_skip_last: {sum(skipped)} of {layers} layers leave none for fp8; skip fewer"
        )
    if any(skipped) and stages > 1:
        raise ValueError("execution.fp8_skip_first, fp8_skip_last: stages of a pipeline must be alike; set them to 0")
    words = "fp8 products in layers (e4m3, gradients e5m2, a scale a tensor)"
    if any(skipped):
        words += f" but for the first {skipped[0]} and the last {skipped[1]}"
    return words + (", emulated on this CPU" if device.platform == "cpu" else "")
