"""A `Spec` describes a weight before it exists: shape, logical axes, initializer and role; everything else derives."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core import tree

Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]
Axes = tuple[str | None, ...]

Role = Literal[
    "matrix", "absorbed", "table", "head", "router", "norm", "norm_bias", "scale", "bias", "selection_bias"
]  # fmt: skip
"""A role says what a weight does in its model:

- `matrix`: activations are multiplied with it; also whatever has no role of its own below.
- `absorbed`: a matrix that decoding multiplies in another order than training, so that no adapter may change it.
- `table`: its rows are looked up by token, position or token type, or are virtual tokens.
- `head`: makes the vocabulary's logits; a tied head is the table.
- `router`: scores experts.
- `norm`, `norm_bias`: scale and bias of a normalisation.
- `scale`: multiplies activations number by number, outside of normalisations.
- `bias`: is added to a product, or to attention's scores by distance.
- `selection_bias`: counts in the choice of experts alone, and moves against their load.
"""


VECTORS: tuple[Role, ...] = ("norm", "norm_bias", "scale", "bias", "selection_bias")
"""Roles of weights that act number by number: they stay float32 whatever a model computes in, and aren't decayed."""


class Spec(NamedTuple):
    """The one place where a weight is described."""

    shape: tuple[int, ...]
    axes: Axes
    """A logical name of each dimension (`embed`, `heads`, `ffn`, `vocab`) or None; `Layout` maps them to the mesh."""
    init: Init
    dtype: Any = jnp.float32
    role: Role = "matrix"
    below_layers: bool = False
    """Stands below the first layer, so learning rates that fall from layer to layer are lowest for it."""
    layers_above: int = 0
    """How many layers stand above those of this stack: an encoder's and a decoder's are counted apart."""
    silent: float | None = None
    """The value at which its half of a layer adds nothing to the residual stream, for norms after the half. None: it
    has no such value, or its half ends with a matrix to `embed`, which is silent at zero."""
    scores: bool = False
    """Attention's scores are this times something: the last matrix of the queries and its bias. Where the queries are
    normalised after it, the scale of that norm is meant in its place."""
    before_head: bool = False
    """Scale or bias of the norm whose output the head multiplies."""

    @property
    def is_matrix(self) -> bool:
        """Says whether one layer's weight has two or more dimensions and is no vector."""
        return not self.is_vector

    @property
    def is_vector(self) -> bool:
        """Says whether the weight is added to activations or multiplies them number by number.

        Biases of heads and of experts, and norms of all heads together, are such whatever their shape is.
        """
        return self.role in VECTORS or len(self.shape) - ("layers" in self.axes) < 2


def is_spec(x: Any) -> bool:
    """Returns whether `x` is a `Spec`: where a tree of specs has its leaves."""
    return isinstance(x, Spec)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initializes to zero."""
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initializes to one."""
    return jnp.ones(shape, jnp.float32)


@dataclass(frozen=True)
class Constant:
    """Initializes to one value."""

    value: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.full(shape, self.value, jnp.float32)


@dataclass(frozen=True)
class Normal:
    """Draws from a normal distribution around zero whose deviation is the same for every shape."""

    std: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return self.std * jax.random.normal(key, shape, jnp.float32)


@dataclass(frozen=True)
class FanIn:
    """Draws from a normal distribution with variance scale² / (product of the input dimensions `axes`)."""

    axes: tuple[int, ...]
    scale: float = 1.0

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        std = self.scale / math.sqrt(math.prod(shape[a] for a in self.axes))
        return jax.random.normal(key, shape, jnp.float32) * std


@dataclass(frozen=True)
class EachLayer:
    """Initializes each layer of a stack by itself; the first dimension counts them."""

    one: Init

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.vmap(lambda k: self.one(k, shape[1:]))(jax.random.split(key, shape[0]))


def normal(std: float) -> Init:
    """Returns an initializer that draws from a normal distribution around zero."""
    return Normal(std)


def fan_in(*axes: int, scale: float = 1.0) -> Init:
    """Returns a normal initializer with variance scale² / (product of the input dimensions `axes`)."""
    return FanIn(axes, scale)


def table(rows: int, width: int, init: Init, axis: str | None = None) -> Spec:
    """Returns the spec of a table whose rows are looked up; `axis` is the logical axis of its rows."""
    return Spec((rows, width), (axis, "embed"), init, role="table", below_layers=True)


def head(vocab: int, width: int, init: Init) -> Spec:
    """Returns the spec of a head of its own, `[vocab, width]`."""
    return Spec((vocab, width), ("vocab", "embed"), init, role="head")


def norm(*shape: int, axes: Axes | None = None, init: Init = ones) -> Spec:
    """Returns the spec of a normalisation's scale; without `axes` every device has all of it."""
    return Spec(shape, axes or (None,) * len(shape), init, role="norm")


def norm_bias(width: int) -> Spec:
    """Returns the spec of a LayerNorm's bias."""
    return Spec((width,), (None,), zeros, role="norm_bias")


def counts_from(s: Spec) -> float:
    """Returns the number that a scale is added to before it multiplies: 1 where it begins at zero, else 0."""
    return 1.0 if float(s.init(jax.random.key(0), s.shape).ravel()[0]) == 0 else 0.0


def layer_norm(name: str, width: int, below_layers: bool = False, before_head: bool = False) -> dict[str, Spec]:
    """Returns the specs of a LayerNorm: its scale `name` and its bias `name_bias`."""
    made = {name: norm(width), f"{name}_bias": norm_bias(width)}
    return {n: s._replace(below_layers=below_layers, before_head=before_head) for n, s in made.items()}


def bias(shape: int | tuple[int, ...], *axes: str | None) -> Spec:
    """Returns the spec of a bias; without `axes` every device has all of it."""
    shape = (shape,) if isinstance(shape, int) else shape
    return Spec(shape, axes or (None,) * len(shape), zeros, role="bias")


def stacked(n: int, specs: Any, above: int = 0) -> Any:
    """Returns the specs of `n` equal layers as one tree whose weights have a leading `layers` axis. `above`: how many
    layers of other stacks stand above them."""

    def one(s: Spec) -> Spec:
        shape, axes = (n, *s.shape), ("layers", *s.axes)
        return s._replace(shape=shape, axes=axes, init=EachLayer(s.init), layers_above=above)

    return jax.tree.map(one, specs, is_leaf=is_spec)


def init(specs: Any, key: jax.Array) -> Any:
    """Returns fresh weights. Each leaf's key comes from its path, so other weights and the mesh don't change it."""

    def one(path: tuple, s: Spec) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return s.init(jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF), s.shape).astype(s.dtype)

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)


def abstract(specs: Any, shardings: Any = None) -> Any:
    """Returns shapes and dtypes, with shardings where given: what a checkpoint is restored to."""
    if shardings is None:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=is_spec)
    return jax.tree.map(
        lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), specs, shardings, is_leaf=is_spec
    )


def count(specs: Any) -> int:
    """Returns how many numbers all weights have together."""
    return sum(math.prod(s.shape) for s in tree.flatten(specs, is_spec).values())


def stacks(specs: Any, prefix: str = "") -> dict[str, dict[str, Spec]]:
    """Returns each stack of layers by its path, as specs by their paths in it: the largest parts of the tree whose
    weights all have a `layers` axis."""
    flat = tree.flatten(specs, is_spec)
    if flat and all(s.axes[:1] == ("layers",) for s in flat.values()):
        return {prefix[:-1]: flat}
    out: dict[str, dict[str, Spec]] = {}
    for name, part in specs.items() if isinstance(specs, dict) else ():
        out |= stacks(part, f"{prefix}{name}/")
    return out


def sequences(specs: Any) -> list[list[tuple[str, int]]]:
    """Returns the stacks that follow each other as (path, number of layers), from the first layer to the last: one
    sequence, or an encoder's and a decoder's."""
    by_side: dict[str, list[tuple[int, str, int]]] = {}
    for path, flat in stacks(specs).items():
        first = next(iter(flat.values()))
        by_side.setdefault(path.rpartition("/")[0], []).append((first.layers_above, path, first.shape[0]))
    return [[(path, n) for _, path, n in sorted(side, reverse=True)] for side in by_side.values()]
