"""Records the inputs of any matrix of any model, with no model edited: a leaf that stands where the weight stood.

What a leaf has seen leaves a program by the only way that goes through scans, recomputed layers and sharded products
alike: as the gradient of an array of zeros. The sums are made in the forward pass; the backward pass only hands them
on, and what else it would compute is used by nobody, so that compilers drop it.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from jaxlm.core import tree
from jaxlm.core.spec import Spec
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import Wrapped, dense
from jaxlm.weights.compress.statistics import Statistics, sums
from jaxlm.weights.matrices import Matrix


@jax.custom_vjp
def _noted(x: jax.Array, found: dict[str, jax.Array], seen: dict[str, jax.Array]) -> jax.Array:
    return x


_noted.defvjp(
    lambda x, found, seen: (x, (found, seen)),
    lambda kept, g: (g, jax.tree.map(jnp.zeros_like, kept[0]), jax.tree.map(lambda f, s: f.astype(s.dtype), *kept)),
)


class Recording(Wrapped):
    """A recording weight notes its inputs and multiplies as it did before.

    Where a weight is used more than once in one pass its sums add up, and so do the largest magnitudes, which then are
    an upper bound.
    """

    weights: jax.Array
    """How much each token counts, of the shape of the inputs without their last `ins` dimensions; 0 is padding."""
    seen: dict[str, jax.Array]
    """Zeros, whose gradients are what `statistics.sums` returns."""
    ins: int = struct.field(pytree_node=False)
    path: str = struct.field(pytree_node=False)
    vectors = ("weights", "seen")

    @property
    def ndim(self) -> int:
        return int(self.base.ndim)

    def einsum(self, eq: str, x: jax.Array, shard: Layout, *axes: str | None) -> jax.Array:
        tokens = x.shape[: x.ndim - self.ins]
        if tokens != self.weights.shape:
            raise ValueError(f"weights: {self.path} has inputs of {tokens} tokens; give it weights of that shape")

        def inputs(record: Any, x: jax.Array, weights: jax.Array) -> Any:
            return record(x.reshape(weights.size, -1), weights.reshape(-1))

        found = self._found(inputs, x, self.weights)
        return shard.einsum(eq, _noted(x, found, self.seen), self.base, *axes)

    def noted(self, x: jax.Array, inputs: Callable[[Any], Any]) -> jax.Array:
        return _noted(x, self._found(inputs), self.seen)

    def _found(self, inputs: Callable[..., Any], *arrays: jax.Array) -> dict[str, jax.Array]:
        """Returns the sums over inputs, by which nothing is differentiated."""
        found: Callable[..., Any] = partial(inputs, partial(sums, hessian="outer" in self.seen))
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.are_all_axes_explicit:
            found = jax.sharding.auto_axes(found, out_sharding=PartitionSpec())
        made: dict[str, jax.Array] = jax.lax.stop_gradient(found(*arrays))
        return made

    def gathered(self, s: Spec, shard: Layout) -> "Recording":
        return self.replace(base=shard.gather(self.base, s))

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return dense(self.base).astype(dtype)


def observe(
    forward: Callable[[Any], jax.Array],
    params: dict,
    recorded: Mapping[str, Matrix],
    weights: jax.Array | Mapping[str, jax.Array],
    *,
    hessian: bool = True,
    stacked: bool = True,
) -> tuple[jax.Array, dict[str, Statistics]]:
    """Returns what `forward(params)` returns, an array of floats, and a record of each matrix's inputs by its path.

    `stacked`: `params` hold all layers, which then are a record's leading dimension; else one layer alone, with paths
    in it. A mixture's experts have records each, of the tokens that their router sends them, one layer at a time.
    `weights` says how much each token counts, `[B, T]`; of matrices with inputs of another shape (those that read an
    encoder's states) by their paths. Only what the returned array depends on is recorded. It is a pure function:
    call it within `jit`. Raises ValueError for tables, and for experts of all layers at once.
    """
    start = {}
    for path, m in recorded.items():
        if m.is_table or (m.experts and stacked):
            what = "a table is looked up" if m.is_table else "experts are recorded one layer at a time"
            raise ValueError(f"recorded: inputs of {path} can't be recorded, as {what}; leave it out")
        wanted = weights[path] if isinstance(weights, Mapping) else weights
        lead = (m.layers,) * stacked + ((m.spec.shape[1],) if m.experts else ())
        width = math.prod(m.in_shape)
        shapes: dict[str, tuple[int, ...]] = dict(count=(), square=(width,), abs=(width,), largest=(width,))
        shapes |= {"outer": (width, width)} if hessian else {}
        seen = {name: jnp.zeros((*lead, *shape), jnp.float32) for name, shape in shapes.items()}
        start[path] = (jnp.broadcast_to(wanted.astype(jnp.float32), (*lead[:stacked], *wanted.shape)), seen)

    def run(seen: dict[str, Any]) -> jax.Array:
        bound = params
        for path, m in recorded.items():
            leaf = Recording(base=tree.at(params, path), weights=start[path][0], seen=seen[path], ins=m.ins, path=path)
            bound = tree.put(bound, path, leaf)
        return forward(bound)

    out, back = jax.vjp(run, {path: seen for path, (_, seen) in start.items()})
    (found,) = back(jnp.zeros_like(out))
    return out, {path: Statistics.from_sums(s) for path, s in found.items()}
