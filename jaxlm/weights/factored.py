"""A matrix as the product of two narrow ones, which stand in the model where it stood: x·W becomes (x·a)·b.

R rank; a and b keep the dimensions of the matrix, such as D H C.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from jaxlm.core.spec import Spec
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import Leaf


class Factored(Leaf):
    """A factored leaf multiplies by one factor after the other. Both are ordinary weights that can be trained."""

    a: jax.Array
    """Leading dimensions, inputs, R."""
    b: jax.Array
    """Leading dimensions, R, outputs."""
    ins: int = struct.field(pytree_node=False)
    """How many input dimensions there are."""
    outs: int = struct.field(pytree_node=False)
    arrays = ("a", "b")

    @property
    def ndim(self) -> int:
        return self.a.ndim - 1 + self.outs

    @property
    def nbytes(self) -> int:
        """Returns how many bytes its arrays take."""
        return sum(x.size * x.dtype.itemsize for x in (self.a, self.b))

    def einsum(self, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
        left, _, out = eq.partition("->")
        xs, _, ws = left.partition(",")
        rows, inner, outer = xs[: len(xs) - self.ins], ws[: self.ins], ws[self.ins :]
        z = shard.einsum(f"{xs},{inner}R->{rows}R", x, self.a, *axes[: len(rows)], None)
        return shard.einsum(f"{rows}R,R{outer}->{out}", z, self.b, *axes)

    def gathered(self, s: Spec, shard: Layout) -> Any:
        axes = s.axes[-self.ndim :]
        on_a, on_b = factor_axes(axes, self.ins, self.outs)
        a, _ = shard.whole(self.a.astype(shard.dtype), *on_a)
        b, _ = shard.whole(self.b.astype(shard.dtype), *on_b)
        made = self.replace(a=a, b=b)
        if "experts" not in s.axes:
            return made
        return shard(made.dense(shard.dtype, shard.spec(axes)), *axes)  # experts go through no `einsum`

    def dense(self, dtype: Any = jnp.float32, home: PartitionSpec | None = None) -> jax.Array:
        """Returns the product; `home` says how it is laid out where the mesh's axes are explicit."""
        lead = self.ndim - self.ins - self.outs
        letters = "abcdefghijkl"[: self.ndim]
        before, inner, outer = letters[:lead], letters[lead : lead + self.ins], letters[lead + self.ins :]
        mesh = jax.sharding.get_abstract_mesh()
        explicit = not mesh.empty and mesh.are_all_axes_explicit
        made: jax.Array = jnp.einsum(
            f"{before}{inner}R,{before}R{outer}->{letters}", self.a.astype(jnp.float32), self.b.astype(jnp.float32),
            out_sharding=(home or PartitionSpec()) if explicit else None,
        )  # fmt: skip
        return made.astype(dtype)


def factor_axes(axes: tuple[str | None, ...], ins: int, outs: int) -> tuple[tuple[str | None, ...], ...]:
    """Returns the logical axes of both factors of a matrix with these; its rank is cut over nothing."""
    lead = len(axes) - ins - outs
    return (*axes[: lead + ins], None), (*axes[:lead], None, *axes[lead + ins :])
