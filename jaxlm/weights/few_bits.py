"""Matrices in few bits as solvers make them: int4 in groups, fp8, MXFP4, and a matrix whose inputs are scaled first.

Each holds its matrix flat, `[*lead, I, O]` (lead: layers; I inputs, O outputs), whatever dimensions the model's weight
has, so that groups of inputs are those that published formats know. G groups. `quantized.py` has int8 and NF4.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from jaxlm.core.spec import Spec
from jaxlm.nn.kernels import few_bit_matmul
from jaxlm.nn.layers import times
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import Wrapped, dense
from jaxlm.weights.quantized import Quantized, frozen_product, product_of_codes, straight_through

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the four-bit floats e2m1, by their code without its sign."""


def in_pairs(codes: jax.Array) -> jax.Array:
    """Packs codes `[…, I, O]` of four bits into bytes `[…, ⌈I/2⌉, O]`, the first of two in the high half."""
    odd = codes.shape[-2] % 2
    codes = jnp.pad(codes.astype(jnp.uint8), [(0, 0)] * (codes.ndim - 2) + [(0, odd), (0, 0)])
    return codes[..., 0::2, :] << 4 | codes[..., 1::2, :]


def unpaired(packed: jax.Array, inputs: int) -> jax.Array:
    """Returns the codes `[…, I, O]` of bytes that `in_pairs` made."""
    both = jnp.stack([packed >> 4, packed & 15], -2)
    return both.reshape(*packed.shape[:-2], -1, packed.shape[-1])[..., :inputs, :]


def spread(x: jax.Array, group: int, inputs: int) -> jax.Array:
    """Returns `[…, I, O]` of one number a group `[…, G, O]`; the last group may have fewer inputs."""
    *lead, groups, outs = x.shape
    wide = jnp.broadcast_to(x[..., None, :], (*lead, groups, group, outs))
    return wide.reshape(*lead, groups * group, outs)[..., :inputs, :]


class Flat(Quantized, kw_only=True):
    """A flat leaf knows what dimensions its matrix has in the model."""

    in_shape: tuple[int, ...] = struct.field(pytree_node=False)
    out_shape: tuple[int, ...] = struct.field(pytree_node=False)
    axes: tuple[Any, ...] = struct.field(pytree_node=False, default=())
    """Mesh axes of the dense weight, once it was gathered for a layer."""

    @property
    def arrays(self) -> tuple[str, ...]:
        """Returns the names of its arrays, codes first."""
        fields = [f.name for f in dataclasses.fields(self) if f.metadata.get("pytree_node", True)]
        return tuple(name for name in fields if getattr(self, name) is not None)

    @property
    def inputs(self) -> int:
        return math.prod(self.in_shape)

    @property
    def lead(self) -> tuple[int, ...]:
        """Returns the dimensions before the matrix."""
        return tuple(getattr(self, self.arrays[0]).shape[:-2])

    @property
    def ndim(self) -> int:
        return len(self.lead) + len(self.in_shape) + len(self.out_shape)

    @property
    def nbytes(self) -> int:
        """Returns how many bytes its arrays take."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def _numbers(self) -> jax.Array:
        """Returns the float32 numbers `[*lead, I, O]` that it stands for."""
        raise NotImplementedError

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        shape = (*self.lead, *self.in_shape, *self.out_shape)

        def unpack(*arrays: jax.Array) -> jax.Array:
            made: jax.Array = self.replace(**dict(zip(self.arrays, arrays, strict=True)))._numbers()
            return made.reshape(shape).astype(dtype)

        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.are_all_axes_explicit:
            unpack = jax.sharding.auto_axes(unpack, out_sharding=PartitionSpec(*self.axes))
        return unpack(*(getattr(self, name) for name in self.arrays))

    def einsum(self, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
        return frozen_product(lambda x, w: shard.einsum(eq, x, w.dense(x.dtype), *axes), shard)(x, self)

    def gathered(self, s: Spec, shard: Layout) -> Any:
        axes = s.axes[-self.ndim :]
        lead = len(axes) - len(self.in_shape) - len(self.out_shape)
        pinned = {n: shard(x, *self._laid(n, x, axes, lead, shard)) for n in self.arrays for x in [getattr(self, n)]}
        made = self.replace(**pinned, axes=tuple(shard.spec(axes)))
        return made.dense(shard.dtype) if "experts" in s.axes else made

    def _laid(self, name: str, x: jax.Array, axes: tuple, lead: int, shard: Layout) -> tuple[str | None, ...]:
        """Returns logical axes of one array. Dimensions that were merged are cut by the first of them, and groups of
        inputs, which are no dimension of the weight, stay whole."""
        flat = (*axes[:lead], axes[lead] if name == self.arrays[0] else None, axes[lead + len(self.in_shape)])
        mesh = jax.sharding.get_abstract_mesh()
        ways = [1 if mesh.empty else math.prod(mesh.shape[m] for m in shard.over(a)) for a in flat]
        return tuple(a if n % w == 0 else None for a, n, w in zip(flat, x.shape, ways, strict=True))


class Int4(Flat, kw_only=True):
    """Int4 codes count steps of a group's scale from its zero point; without zero points from the middle, 8.

    Scales are bfloat16, and codes are chosen for the scale as it is stored.
    """

    int4: jax.Array
    """Two codes in a byte, the first in its high half: uint8 `[*lead, ⌈I/2⌉, O]`."""
    scale: jax.Array
    """The step of each group, bfloat16 `[*lead, G, O]`."""
    zero: jax.Array | None = None
    """The code of each group that stands for 0, uint8 `[*lead, G, O]`."""
    group: int = struct.field(pytree_node=False)

    def _numbers(self) -> jax.Array:
        codes = unpaired(self.int4, self.inputs).astype(jnp.float32)
        middle = 8.0 if self.zero is None else spread(self.zero.astype(jnp.float32), self.group, self.inputs)
        return (codes - middle) * spread(self.scale.astype(jnp.float32), self.group, self.inputs)

    def einsum(self, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
        paired = self.group % 2 == 0 or self.scale.shape[-2] == 1  # no byte has inputs of two groups
        if not paired or self.scale.dtype != jnp.bfloat16 or not few_bit_matmul.takes(x, len(self.in_shape)):
            return super().einsum(eq, x, shard, *axes)

        def of_few_rows(x: jax.Array, w: Int4) -> jax.Array:
            y = few_bit_matmul.int4(x.reshape(-1, w.inputs), w.int4, w.scale, w.zero, w.group)
            return y.reshape(*x.shape[: x.ndim - len(w.in_shape)], *w.out_shape).astype(x.dtype)

        def dense(x: jax.Array, w: Int4) -> jax.Array:
            return Flat.einsum(w, eq, x, shard, *axes)

        return few_bit_matmul.with_gradients_of(dense, of_few_rows)(x, self)


class Fp8(Flat, kw_only=True):
    """Fp8 numbers (e4m3) have one scale for each output, or one for each square block of the matrix."""

    fp8: jax.Array
    """The numbers divided by their scale, float8_e4m3fn `[*lead, I, O]`."""
    scale: jax.Array
    """The scales, float32 `[*lead, 1, O]`, or of blocks `[*lead, ⌈I/block⌉, ⌈O/block⌉]`."""
    block: int = struct.field(pytree_node=False, default=0)
    """The side of a block; 0: one scale for each output."""
    dynamic: bool = struct.field(pytree_node=False, default=False)
    """Whether inputs are rounded to fp8 too, so that the product is one of fp8; with a scale for each output alone."""

    def _numbers(self) -> jax.Array:
        scale = self.scale
        if self.block:
            across = spread(scale.mT, self.block, self.fp8.shape[-1]).mT
            scale = spread(across, self.block, self.inputs)
        return self.fp8.astype(jnp.float32) * scale

    def einsum(self, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
        if self.block:
            return super().einsum(eq, x, shard, *axes)

        def scaled(x: jax.Array, w: Fp8) -> jax.Array:
            numbers = w.replace(scale=jnp.ones_like(w.scale)).dense(x.dtype)
            return times(shard.einsum(eq, x, numbers, *axes), w.scale.reshape(w.out_shape))

        def of_fp8(x: jax.Array, w: Fp8) -> jax.Array:
            y = product_of_codes(eq, x, w.fp8.reshape(*w.in_shape, *w.out_shape), shard, *axes)
            return times(y, w.scale.reshape(w.out_shape)).astype(x.dtype)

        return frozen_product(straight_through(of_fp8, scaled) if self.dynamic else scaled, shard)(x, self)


class Mxfp4(Flat, kw_only=True):
    """MXFP4 numbers (OCP 2023) are four-bit floats e2m1, of which 32 share a power of two."""

    mxfp4: jax.Array
    """Two codes in a byte, the first in its high half: uint8 `[*lead, ⌈I/2⌉, O]`; 8 is the sign."""
    scale: jax.Array
    """The powers of two, uint8 `[*lead, G, O]`, of which 127 is 1 (E8M0)."""
    group: int = struct.field(pytree_node=False, default=32)

    def _numbers(self) -> jax.Array:
        codes = unpaired(self.mxfp4, self.inputs)
        # A sum of which one term isn't zero, which every backend fuses, where a lookup needs a gather.
        size: Any = sum(((codes & 7) == i).astype(jnp.float32) * level for i, level in enumerate(FP4) if level)
        signed = size * (1 - 2 * (codes >> 3).astype(jnp.float32))
        return signed * spread(power_of_two(self.scale), self.group, self.inputs)


def power_of_two(e: jax.Array) -> jax.Array:
    """Returns 2 to the power of `e` − 127 for uint8 `e` from 1 to 254, exactly."""
    return jax.lax.bitcast_convert_type(e.astype(jnp.uint32) << 23, jnp.float32)


class Scaled(Wrapped):
    """A scaled weight multiplies its inputs by a vector before the weight beneath, whose rows were divided by it."""

    by: jax.Array
    """Factors of the inputs, float32, of the inputs' dimensions after any leading ones."""
    outs: int = struct.field(pytree_node=False)
    """How many output dimensions there are."""
    vectors = ("by",)

    @property
    def ndim(self) -> int:
        return self.by.ndim + self.outs

    def einsum(self, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
        return shard.einsum(eq, times(x, self.by), self.base, *axes)

    def gathered(self, s: Spec, shard: Layout) -> Any:
        base = shard.gather(self.base, s)
        if "experts" in s.axes:  # which go through no `einsum`
            by = shard(self.by, "experts", *(None,) * (self.by.ndim - 1))
            return times(base, by.reshape(*by.shape, *(1,) * self.outs))
        return self.replace(base=base, by=shard(self.by, *(None,) * self.by.ndim))

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        w = dense(self.base)
        return (w * self.by.reshape(*self.by.shape, *(1,) * (w.ndim - self.by.ndim))).astype(dtype)
