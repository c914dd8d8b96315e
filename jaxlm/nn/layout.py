"""Lays weights and activations out by tables: their logical axes over axes of the mesh."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.core import config, errors, tree
from jaxlm.core.spec import Spec, is_spec
from jaxlm.nn.leaf import is_leaf
from jaxlm.nn.matmul import Activations, NarrowMatrix
from jaxlm.nn.taps import Taps
from jaxlm.runtime.mesh import AXES, BATCH_AXES, replicated, single_device_sharding

Axes = tuple[str, ...]


STORE: dict[str, Axes] = {
    "layers": ("stage",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
}


COMPUTE: dict[str, Axes] = {
    "batch": BATCH_AXES,
    "seq": ("context",),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
}


def _amended(table: dict[str, Axes], changes: tuple[str, ...], name: str) -> dict[str, Axes]:
    table = dict(table)
    known = STORE.keys() | COMPUTE.keys() | {"stream"}
    for change in changes:
        logical, separator, mesh = change.partition("=")
        axes = tuple(a for a in mesh.split("+") if a)
        if not separator or logical not in known:
            raise ValueError(f"mesh.{name}: {change!r} is not LOGICAL=MESH+MESH{errors.nearest(logical, known)}")
        for a in axes:
            if a not in AXES:
                raise ValueError(f"mesh.{name}: {change!r}: no mesh axis {a!r}{errors.nearest(a, AXES)}")
        table[logical] = axes
    return table


def _manual() -> bool:
    return any(t == AxisType.Manual for t in jax.sharding.get_abstract_mesh().axis_types)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(w: jax.Array, used: P, stored: P) -> jax.Array:
    """Returns a weight as it is `used`, and asks for its gradient as the weight is `stored`.

    The transpose of a plain constraint would ask for the gradient whole, and compilers for TPUs then sum it whole on
    every device before each cuts its part.
    """
    return jax.lax.with_sharding_constraint(w, used)


_gathered.defvjp(
    lambda w, used, rests: (_gathered(w, used, rests), None),
    lambda used, rests, _, g: (jax.lax.with_sharding_constraint(g, rests),),
)


def but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """Returns whether `jax.checkpoint` may keep a primitive's result: anything but weights gathered from where they
    rest.

    These are gathered again for the backward pass, as those of all layers would otherwise lie whole on every device.
    (Explicit axes move by `reshard`.)
    """
    inner = params.get("call_jaxpr")
    gathers = inner is not None and [e.primitive.name for e in inner.eqns] == ["sharding_constraint"]
    return primitive.name != "reshard" and not gathers


@dataclass(frozen=True)
class Layout:
    """A Layout maps logical axes to mesh axes: `store` where weights rest, `compute` where a block uses them, `moments`
    where the optimizer's state rests.

    Moving between the first two is FSDP (ZeRO 3), between the first and the last ZeRO 1 and 2. A Layout also carries
    `execution`, so that models take one argument for "where and how", and none of them knows a mesh.
    """

    store: Mapping[str, Axes] = field(default_factory=lambda: dict(STORE))
    compute: Mapping[str, Axes] = field(default_factory=lambda: dict(COMPUTE))
    execution: config.Execution = field(default_factory=config.Execution)
    moments: Mapping[str, Axes] = field(default_factory=lambda: dict(STORE))
    mesh: config.Mesh = field(default_factory=config.Mesh)
    """The mesh that the run asks for; the sizes of its axes are known where a program is traced."""
    shared_keys: bool = False
    """Whether rows begin with virtual tokens that all of their segments see."""
    one_document: bool = False
    """Whether each row of a batch is known to be one document, with padding after it."""
    taps: Taps | None = field(default=None, compare=False)
    """Activations of layers that somebody wants; None: nobody."""
    narrow: Activations | None = field(default=None, compare=False)
    """Where the layer whose weights are gathered keeps its activations in few bits; None: it multiplies in `dtype`."""

    @classmethod
    def of(cls, mesh: config.Mesh, execution: config.Execution) -> "Layout":
        """Returns the layout that a run's mesh and execution ask for. Raises ValueError for a change of its tables that
        names no axis."""
        moments = _amended(STORE, mesh.store, "store")
        store = moments
        if mesh.zero < 3:
            store = {logical: tuple(a for a in axes if a != "fsdp") for logical, axes in moments.items()}
        compute = COMPUTE
        if mesh.expert_dispatch == "replicate":
            compute = COMPUTE | {"batch": tuple(a for a in BATCH_AXES if a != "expert")}
        return cls(store, _amended(compute, mesh.compute, "compute"), execution, moments, mesh)

    @property
    def dtype(self) -> Any:
        """Returns the compute dtype."""
        return jnp.dtype(self.execution.dtype)

    def over(self, axis: str | None, table: Mapping[str, Axes] | None = None) -> Axes:
        """Returns the mesh axes of a logical one.

        `stream`, positions of the residual stream between a block's products, is `seq` unless `mesh.compute` says more:
        with `stream=context+tensor` norms and residuals are cut over `tensor` too, and what were all-reduces of
        products become reduce-scatters and all-gathers (Korthikanti et al. 2022).
        """
        table = self.compute if table is None else table
        return table.get("seq" if axis == "stream" and "stream" not in table else axis or "", ())

    @property
    def streams(self) -> bool:
        """Returns whether the residual stream is cut over other axes than positions within a block."""
        return self.over("stream") != self.over("seq")

    def spec(self, axes: tuple[str | None, ...], table: Mapping[str, Axes] | None = None) -> P:
        """Returns the partition spec of an array with these logical axes.

        `("batch", "seq", None)` gives `P(("replica", "data", "fsdp", "expert"), "context", None)`. Raises ValueError
        where one mesh axis would cut two dimensions.
        """
        parts = [self.over(a, table) for a in axes]
        used = [m for part in parts for m in part]
        if len(used) != len(set(used)):
            raise ValueError(f"mesh tables: {axes} would put one mesh axis on two dimensions: {parts}")
        return P(*(None if not p else p[0] if len(p) == 1 else p for p in parts))

    def ways(self, axis: str | None, mesh: jax.sharding.Mesh | None, table: Mapping[str, Axes] | None = None) -> int:
        """Returns how many devices share a dimension of activations, or of what another table is for."""
        return 1 if mesh is None else math.prod(mesh.shape[a] for a in self.over(axis, table))

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Pins an array to its devices; on one device and inside shard_map it does nothing."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or _manual():
            return x
        pin = jax.reshard if mesh.are_all_axes_explicit else jax.lax.with_sharding_constraint
        return pin(x, self.spec(axes))

    def einsum(self, eq: str, x: jax.Array, w: Any, *axes: str | None) -> jax.Array:
        """Contracts `x` with a weight and pins the result to `axes`. A `Leaf` answers for itself.

        The letters shared by `x` and `w` end `x` and begin `w`, so the product is one matrix multiplication. Where `x`
        or the result ends with `d`, it is the residual stream.
        """
        if self.streams and axes[1:2] == ("seq",):
            if eq.partition(",")[0].endswith("d"):
                x = self(x, "batch", "seq", None)
            if eq.endswith("d"):
                axes = (axes[0], "stream", *axes[2:])
        if is_leaf(w):
            return w.einsum(eq, x, self, *axes)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:  # with two plain matrices XLA needs no transposing copies on any backend
            n = sum(a in eq.partition(",")[0] for a in eq.partition("->")[0].partition(",")[2])
            inner = math.prod(w.shape[:n])
            return (x.reshape(-1, inner) @ w.reshape(inner, -1)).reshape(*x.shape[: x.ndim - n], *w.shape[n:])
        if mesh.are_all_axes_explicit:
            return jnp.einsum(eq, x, w, out_sharding=self.spec(axes))
        return self(jnp.einsum(eq, x, w), *axes)

    def whole(self, w: jax.Array, *axes: str | None) -> tuple[jax.Array, Axes]:
        """Returns a matrix gathered over the axes that only store it, and those of the last dimension over which its
        gradient may come back cut.

        With explicit axes there are none of the latter: a gradient then has the matrix's own sharding.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or _manual() or mesh.are_all_axes_explicit:
            return self(w, *axes), ()
        stored = self.over(axes[-1], self.store)
        cut = tuple(a for a in stored if a in (*self.over("batch"), *self.over("seq")))
        return _gathered(w, self.spec(axes), self.spec(axes, self.store)), cut if cut == stored else ()

    @property
    def gathers(self) -> bool:
        """Returns whether weights rest on this mesh cut over axes that only store them."""
        mesh = jax.sharding.get_abstract_mesh()
        over = {a for axis, axes in self.store.items() if axis != "layers" for a in axes if a not in self.over(axis)}
        return not mesh.empty and any(mesh.shape[a] > 1 for a in over)

    def gather(self, params: Any, specs: Any) -> Any:
        """Returns weights as a block uses them: matrices cast to the compute dtype, then all gathered over the axes
        that only store. Vectors stay float32: their rounding would be an error of whole columns."""

        def one(w: Any, s: Spec) -> Any:
            if is_leaf(w):
                return w.gathered(s, self)
            whole = self.whole(w.astype(jnp.float32 if s.is_vector else self.dtype), *s.axes[-w.ndim :])[0]
            if self.narrow is None or s.is_vector or s.role != "matrix" or "experts" in s.axes:
                return whole
            return NarrowMatrix(whole, self.narrow, s.axes[-w.ndim :])

        return jax.tree.map(one, params, specs, is_leaf=is_leaf)

    def shardings(self, specs: Any, mesh: jax.sharding.Mesh | None, table: Mapping[str, Axes] | None = None) -> Any:
        """Returns where each weight rests, by `store` or another table.

        Raises ValueError, which names the weight, where its mesh axes don't divide a dimension.
        """
        table = self.store if table is None else table
        if mesh is None:
            sharding = single_device_sharding()
            return jax.tree.map(lambda s: sharding, specs, is_leaf=is_spec)

        def place(path: str, s: Spec) -> NamedSharding:
            axes = s.axes
            for size, axis in zip(s.shape, s.axes, strict=True):
                parts = math.prod(mesh.shape[m] for m in table.get(axis or "", ()))
                if table.get(axis or "") == ("stage",) and (parts == 1 or size < parts):  # no pipeline
                    axes = tuple(None if a == "layers" else a for a in axes)
                elif size % parts:
                    raise ValueError(
                        f"mesh: {path} has {size} {axis}, which {parts} devices of "
                        f"{'+'.join(table[axis or ''])} do not divide; change the mesh or mesh.store"
                    )
            return NamedSharding(mesh, self.spec(axes, table))

        return tree.map_named(place, specs)

    def check_sharded(self, specs: Any, mesh: jax.sharding.Mesh | None, allowed: tuple[str, ...], limit: int) -> None:
        """Refuses a weight of more than `limit` elements that rests whole on a mesh with a storing axis above 1.

        `allowed` are patterns of weights that may.
        """
        if mesh is None or not any(mesh.shape[a] > 1 for axes in self.store.values() for a in axes):
            return
        flat = tree.flatten(specs, is_spec)
        is_allowed = tree.matcher(allowed, flat, "mesh.replicated")
        for path, s in flat.items():
            ways = math.prod(mesh.shape[m] for a in s.axes for m in self.store.get(a or "", ()))
            if ways == 1 and math.prod(s.shape) > limit and not is_allowed(path):
                raise ValueError(
                    f"mesh: {path} ({math.prod(s.shape):,} elements) would rest unsharded on every device; "
                    f"give one of its axes {s.axes} a mesh axis in mesh.store, or allow it by name in mesh.replicated"
                )


def batch_sharding(layout: Layout, mesh: jax.sharding.Mesh | None, shape: tuple[int, ...], seq_len: int) -> Any:
    """Returns the sharding of a batch leaf `[micro, batch, …]`: rows over the batch axes, positions (`seq_len`) over
    context."""
    if mesh is None:
        return replicated(mesh)
    inner = ("seq",) if shape[2:3] == (seq_len,) else ()
    return NamedSharding(mesh, layout.spec((None, "batch", *inner)))


def check_batch(c: config.Train, layout: Layout, mesh: jax.sharding.Mesh | None) -> None:
    """Refuses a batch that micro-batches and devices don't divide, and a sequence that the context axis doesn't."""
    if c.batch_size % c.micro_batches:
        raise ValueError(f"train.batch_size: {c.batch_size} is not a multiple of train.micro_batches {c.micro_batches}")
    if mesh is None:
        return
    for field_name, size, axis in (
        ("batch_size", c.batch_size // c.micro_batches, "batch"),
        ("seq_len", c.seq_len, "stream"),
    ):
        parts = layout.ways(axis, mesh)
        if size % parts:
            per = " (per micro-batch)" if axis == "batch" else ""
            raise ValueError(f"train.{field_name}: {size}{per} does not divide over {parts} devices of the mesh")
