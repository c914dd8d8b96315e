"""Frozen weights are stored in few bits: NF4 with its scales quantized again (Dettmers et al. 2023), int8, bfloat16.

A quantized weight is stored as a dict of arrays under its own path (`blocks/q/nf4`, `blocks/q/scale` …); `bound` makes
of it a leaf that answers `shard.einsum`, so models know nothing of it. Numbers are made anew for each product, in the
backward pass too: a training step never keeps a dense copy.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec

from jaxlm.core.spec import Spec, zeros
from jaxlm.nn.block_stack import scanned
from jaxlm.nn.kernels import few_bit_matmul
from jaxlm.nn.layers import times
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import Leaf
from jaxlm.nn.row_rounding import rounded

BLOCK = 64
# Quantiles of a normal distribution that hold equal shares of it, with an exact zero; the largest is 1.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def block_size(n: int) -> int:
    """Returns how many numbers of a dimension of `n` share a scale: 64, or the largest power of two below that divides
    `n`."""
    size = math.gcd(n, BLOCK)
    if size < 2:
        raise ValueError(f"nf4: {n} inputs have no even number to share a byte; leave base=bfloat16")
    return size


class Quantized(Leaf):
    """A quantized leaf is a frozen matrix of few bits. Its arrays are never cast: scales need all their digits."""

    def cast(self, dtype: Any) -> "Quantized":
        return self

    def gathered(self, s: Spec, shard: Layout) -> Any:
        return _gathered(self, s, shard)


class Nf4(Quantized):
    """NF4 codes are stored in blocks along the last input dimension, two in a byte, the first in its high half.

    The scale of a block, its largest magnitude, is 8 bits between the least and the largest of its outputs' scales.
    """

    nf4: jax.Array
    """The codes, uint8, of the weight's shape with half of its last input dimension."""
    scale: jax.Array
    """One number for each block, uint8."""
    low: jax.Array
    """One number for all outputs of a block, float32."""
    step: jax.Array
    outs: int = struct.field(pytree_node=False)
    """How many output dimensions there are: the input that blocks lie along stands before them."""
    axes: tuple[Any, ...] = struct.field(pytree_node=False, default=())
    """Mesh axes of the dense weight, once it was gathered for a layer."""
    arrays = ("nf4", "scale", "low", "step")

    @property
    def ndim(self) -> int:
        return self.nf4.ndim

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        unpack = partial(_unpacked, self.outs, dtype)
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.are_all_axes_explicit:
            # The split into blocks is left to the partitioner, and only its result is said. Weights that were gathered
            # for a layer know where they live; others are whole.
            unpack = jax.sharding.auto_axes(unpack, out_sharding=PartitionSpec(*self.axes))
        return unpack(self.nf4, self.scale, self.low, self.step)

    def einsum(self, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
        return frozen_product(lambda x, w: shard.einsum(eq, x, w.dense(x.dtype), *axes), shard)(x, self)


class Int8(Quantized):
    """Each output has one scale, that of its largest magnitude."""

    int8: jax.Array
    scale: jax.Array
    """One number for each output, float32, of the weight's shape with inputs of size one."""
    outs: int = struct.field(pytree_node=False)
    axes: tuple[Any, ...] = struct.field(pytree_node=False, default=())
    dynamic: bool = struct.field(pytree_node=False, default=False)
    """Whether inputs are rounded to int8 too, so that the product is one of whole numbers."""
    arrays = ("int8", "scale")

    @property
    def ndim(self) -> int:
        return self.int8.ndim

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return (self.int8.astype(jnp.float32) * self.scale).astype(dtype)

    def einsum(self, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
        def product(x: jax.Array, w: Int8) -> jax.Array:
            y = shard.einsum(eq, x, w.int8.astype(x.dtype), *axes)
            return times(y, w.scale.reshape(w.scale.shape[w.scale.ndim - w.outs :]))

        def of_whole_numbers(x: jax.Array, w: Int8) -> jax.Array:
            y = product_of_codes(eq, x, w.int8, shard, *axes)
            return times(y, w.scale.reshape(w.scale.shape[w.scale.ndim - w.outs :])).astype(x.dtype)

        made = frozen_product(straight_through(of_whole_numbers, product) if self.dynamic else product, shard)
        if not self.dynamic and few_bit_matmul.takes(x, self.ndim - self.outs):
            made = few_bit_matmul.with_gradients_of(made, _of_few_rows)
        return made(x, self)


def _of_few_rows(x: jax.Array, w: Int8) -> jax.Array:
    """Returns the product of a few rows with a matrix, which is read as it is stored."""
    ins, outs = w.ndim - w.outs, w.int8.shape[w.ndim - w.outs :]
    inputs = math.prod(w.int8.shape[:ins])
    y = few_bit_matmul.int8(x.reshape(-1, inputs), w.int8.reshape(inputs, -1), w.scale.reshape(-1))
    return y.reshape(*x.shape[: x.ndim - ins], *outs).astype(x.dtype)


def _unpacked(outs: int, dtype: Any, nf4: jax.Array, scale: jax.Array, low: jax.Array, step: jax.Array) -> jax.Array:
    at = nf4.ndim - outs - 1
    q = jnp.stack([nf4 >> 4, nf4 & 15], at + 1)
    # A sum of which one term isn't zero: every backend fuses it, and a lookup needs a gather. Not `where`: its numbers
    # are arrays of the weight's size, and a scan that keeps what its backward pass needs makes them all beforehand.
    w: Any = sum((q == i).astype(jnp.float32) * jnp.float32(level) for i, level in enumerate(NF4) if level)
    n, blocks, lead, rest = 2 * nf4.shape[at], scale.shape[at], nf4.shape[:at], nf4.shape[at + 1 :]
    coarse = low + step * scale.astype(jnp.float32)
    w = w.reshape(*lead, blocks, n // blocks, *rest) * jnp.expand_dims(coarse, at + 1)
    return w.reshape(*lead, n, *rest).astype(dtype)


def product_of_codes(eq: str, x: jax.Array, codes: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
    """Returns the float32 product of `x`, whose rows are rounded to the type of `codes` by their largest magnitudes,
    with a matrix of codes: of int8 added in int32, of fp8 in float32."""
    first, second = eq.partition("->")[0].split(",")
    dims = sum(letter in first for letter in second)
    rows, scale = rounded(x, dims, codes.dtype)
    added = jnp.int32 if jnp.issubdtype(codes.dtype, jnp.integer) else jnp.float32
    mesh = jax.sharding.get_abstract_mesh()
    lead, outs = x.shape[: x.ndim - dims], codes.shape[dims:]
    if mesh.empty:  # two plain matrices, which need no transposing copies
        inner = math.prod(codes.shape[:dims])
        y = jnp.matmul(rows.reshape(-1, inner), codes.reshape(inner, -1), preferred_element_type=added)
        y = y.reshape(*lead, *outs)
    else:
        where: dict[str, Any] = dict(out_sharding=shard.spec(axes)) if mesh.are_all_axes_explicit else {}
        y = shard(jnp.einsum(eq, rows, codes, preferred_element_type=added, **where), *axes)
    return y.astype(jnp.float32) * scale.reshape(*lead, *(1,) * len(outs))


def straight_through(
    f: Callable[[jax.Array, Any], jax.Array], smooth: Callable[[jax.Array, Any], jax.Array]
) -> Callable[[jax.Array, Any], jax.Array]:
    """Returns the product `f` of `x` and a frozen weight, whose gradient reaches `x` as that of `smooth`, which rounds
    nothing of it."""

    def backward(kept: tuple[jax.Array, Any], g: jax.Array) -> tuple[jax.Array, Any]:
        x, w = kept
        _, pull = jax.vjp(lambda x: smooth(x, w), x)
        return pull(g)[0], jax.tree.map(_no_gradient, w)

    made = jax.custom_vjp(f)
    made.defvjp(lambda x, w: (f(x, w), (x, w)), backward)
    return made


def _no_gradient(x: jax.Array) -> Any:
    whole = jnp.issubdtype(x.dtype, jnp.integer)
    return np.zeros(x.shape, jax.dtypes.float0) if whole else jnp.zeros_like(x)


def frozen_product(f: Callable[[jax.Array, Any], jax.Array], shard: Layout) -> Callable[[jax.Array, Any], jax.Array]:
    """Returns the product `f` of `x` and a frozen weight, whose backward pass makes the weight's numbers again instead
    of keeping them. In a loop they are made in each turn: XLA would move what depends on the weight alone out of it,
    and then read dense copies of all weights for each token (as it does with jax 0.10, which drops the barrier)."""

    def in_turn(x: jax.Array, w: Any) -> jax.Array:
        return f(*jax.lax.optimization_barrier((x, w)))

    return jax.checkpoint(in_turn, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=not scanned(shard))


def _gathered(w: Any, s: Spec, shard: Layout) -> Any:
    """Returns the few bits, gathered over the axes that only store; for experts, which go through no `einsum`, dense
    numbers."""
    axes = s.axes[-w.ndim :]
    arrays = {name: getattr(w, name) for name in w.arrays}
    arrays = {name: shard(x, *array_axes(name, x.shape, axes, w.outs)) for name, x in arrays.items()}
    w = w.replace(**arrays, axes=tuple(shard.spec(axes)))
    return w.dense(shard.dtype) if "experts" in s.axes else w


def array_axes(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], outs: int) -> tuple[str | None, ...]:
    """Returns logical axes of one of a weight's arrays. Blocks of inputs are no dimension of the weight: they stay
    whole."""
    at = len(axes) - outs - 1
    if name not in ("nf4", "int8"):
        axes = (*axes[:at], None, *axes[at + 1 :])
    return tuple(a if n > 1 else None for n, a in zip(shape, axes, strict=True))


def nf4(w: jax.Array, ins: int, outs: int) -> dict[str, jax.Array]:
    """Quantizes a weight, whose last `outs` dimensions are outputs and the `ins` before them inputs, to the arrays of
    `Nf4`."""
    at = w.ndim - outs - 1
    n, size = w.shape[at], block_size(w.shape[at])
    lead, rest = w.shape[:at], w.shape[at + 1 :]
    blocks = w.astype(jnp.float32).reshape(*lead, n // size, size, *rest)
    largest = jnp.abs(blocks).max(at + 1)
    over = tuple(range(at + 1, largest.ndim))
    low = largest.min(over, keepdims=True)
    step = jnp.maximum(largest.max(over, keepdims=True) - low, 1e-30) / 255
    scale = jnp.round((largest - low) / step).astype(jnp.uint8)
    coarse = jnp.maximum(low + step * scale.astype(jnp.float32), 1e-30)
    unit = (blocks / jnp.expand_dims(coarse, at + 1)).reshape(w.shape)
    code = jnp.zeros(w.shape, jnp.uint8)
    for a, b in itertools.pairwise(NF4):
        code += (unit > jnp.float32((a + b) / 2)).astype(jnp.uint8)
    pairs = code.reshape(*lead, n // 2, 2, *rest)
    high, second = (jax.lax.index_in_dim(pairs, i, at + 1, keepdims=False) for i in (0, 1))
    return dict(nf4=high << 4 | second, scale=scale, low=low, step=step)


def int8(w: jax.Array, ins: int, outs: int) -> dict[str, jax.Array]:
    """Quantizes a weight, whose dimensions are as for `nf4`, to the arrays of `Int8`."""
    over = tuple(range(w.ndim - outs - ins, w.ndim - outs))
    scale = jnp.maximum(jnp.abs(w.astype(jnp.float32)).max(over, keepdims=True), 1e-30) / 127
    return dict(int8=jnp.round(w / scale).astype(jnp.int8), scale=scale)


def bfloat16(w: jax.Array, ins: int, outs: int) -> jax.Array:
    """Rounds a weight to bfloat16."""
    return w.astype(jnp.bfloat16)


KINDS: dict[str, Callable[..., Any]] = {"nf4": nf4, "int8": int8, "bfloat16": bfloat16}


def specs(s: Spec, ins: int, outs: int, kind: str) -> Any:
    """Returns the specs of what `KINDS[kind]` makes of a weight. Fresh weights are initialised before they are
    quantized."""
    made = jax.eval_shape(partial(KINDS[kind], ins=ins, outs=outs), jax.ShapeDtypeStruct(s.shape, jnp.float32))
    if not isinstance(made, dict):
        return s._replace(dtype=made.dtype)
    axes = {name: array_axes(name, x.shape, s.axes, outs) for name, x in made.items()}
    return {name: Spec(x.shape, axes[name], zeros, x.dtype, s.role) for name, x in made.items()}


def bound(arrays: dict[str, Any], outs: int, dynamic: bool = False) -> Quantized:
    """Returns the leaf that a dict of stored arrays stands for. With `dynamic`, int8 rounds its inputs too."""
    return Nf4(**arrays, outs=outs) if "nf4" in arrays else Int8(**arrays, outs=outs, dynamic=dynamic)
