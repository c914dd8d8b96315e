"""Numbers travel between a file's tensors and the shards of our weights in pieces of a few megabytes.

No weight of many devices and no stack of layers is ever whole on the host; a process touches its own shards only. All
devices get (or give) a piece at a time by one program, however many they are.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jaxlm.core import tree
from jaxlm.core.spec import Spec
from jaxlm.core.weight_names import Part, Tensor, View

PIECE = 4 << 20  # bytes that travel at a time, over all devices of this process
SMALL = 1 << 20  # bytes of a shard up to which NumPy moves it, which saves compiling a program for each shape

Slices = tuple[slice, ...]
Index = tuple[int, ...]


class Source(NamedTuple):
    """A source is a part of a weight in a file; `read` reads the file's tensor, in `view.shape`, at an index."""

    part: Part
    view: View
    read: Callable[[Slices], np.ndarray]
    dtype: np.dtype


def cut(where: Sequence[slice], limit: int) -> Iterator[Slices]:
    """Yields stretches of at most `limit` elements, of few different shapes, that make up `where`."""
    sizes = [s.stop - s.start for s in where]
    axis = next((a for a in range(len(sizes)) if math.prod(sizes[a + 1 :]) <= limit), None)
    if axis is None:  # a single number
        yield ()
        return
    step = max(1, limit // max(1, math.prod(sizes[axis + 1 :])))
    for lead in itertools.product(*(range(s.start, s.stop) for s in where[:axis])):
        for i in range(where[axis].start, where[axis].stop, step):
            stretch = slice(i, min(i + step, where[axis].stop))
            yield (*(slice(j, j + 1) for j in lead), stretch, *where[axis + 1 :])


def _pieces(part: Part, view: View, where: Slices, limit: int) -> Iterator[tuple[Slices, Index]]:
    """Yields pieces of a part, of at most `limit` elements, within the stretch `where` of its weight.

    Each is (index into the file's view, first indices in the stretch).
    """
    lead = len(part.index)
    if not all(s.start <= i < s.stop for i, s in zip(part.index, where, strict=False)):
        return
    ours, first = where[lead:], [i - s.start for i, s in zip(part.index, where, strict=False)]
    back = [view.order.index(d) for d in range(len(ours))]  # our dimension for each one of the file
    for piece in cut([ours[d] for d in back], limit):
        at = [piece[d].start - s.start for d, s in zip(view.order, ours, strict=True)]
        yield view.at(piece), (*first, *at)


def _sliced_dims(shape: Sequence[int], view: View) -> list[int]:
    """Drops from `shape` the dimensions that the view picks one index of."""
    return [n for n, i in zip(shape, view.index, strict=True) if isinstance(i, slice)]


def _box(starts: Index, shape: Sequence[int]) -> Slices:
    """Returns the slices of a piece of a weight: its last dimensions from `starts` on, one index of those before."""
    sizes = (1,) * (len(starts) - len(shape)) + tuple(shape)
    return tuple(slice(i, i + n) for i, n in zip(starts, sizes, strict=True))


def _is_small(home: Sharding, shape: tuple[int, ...], itemsize: int) -> bool:
    return math.prod(home.shard_shape(shape)) * itemsize <= SMALL


def _one_per_device(home: Sharding, values: Mapping[Any, np.ndarray]) -> jax.Array:
    """Returns an array [devices, …] of which each device of this process holds its own value."""
    sharding = home if not isinstance(home, NamedSharding) else NamedSharding(home.mesh, P(home.mesh.axis_names))
    arrays = [jax.device_put(x[None], device) for device, x in values.items()]
    shape = (len(home.device_set), *arrays[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _on_each_device(f: Callable[..., Any], home: Sharding, ins: Sequence[Any], outs: Any) -> Callable[..., Any]:
    """Returns `f` on each device's shards. An argument lies as the "weight" does or is "local", one a device."""
    if not isinstance(home, NamedSharding):
        return f
    specs = {"weight": home.spec, "local": P(home.mesh.axis_names)}
    of = lambda kinds: jax.tree.map(specs.__getitem__, kinds)  # noqa: E731
    return jax.shard_map(f, mesh=home.mesh, in_specs=of(tuple(ins)), out_specs=of(outs), check_vma=False)


# -------------------------------------------------------------------------------------------------------- into shards


def fill(
    specs: Any, shardings: Any, sources: Mapping[str, Sequence[Source]], dtype: Any,
    transform: Callable[[str, jax.Array], Any] | None = None,
) -> Any:  # fmt: skip
    """Returns the tree of weights, each from its sources in files.

    `transform` takes (path, weight) and returns what takes its place before the next one is filled.
    """
    shardings = tree.flatten(shardings)

    def fill_one(path: str, spec: Spec) -> Any:
        home = shardings[path]
        devices_of: dict[tuple, list[Any]] = {}
        for device, index in home.addressable_devices_indices_map(spec.shape).items():
            bounds = tuple(s.indices(size)[:2] for s, size in zip(index, spec.shape, strict=True))
            devices_of.setdefault(bounds, []).append(device)
        stretches = [(tuple(slice(*b) for b in bounds), devices) for bounds, devices in devices_of.items()]
        fill_weight = _fill_small if _is_small(home, spec.shape, np.dtype(dtype).itemsize) else _fill_large
        filled = fill_weight(spec.shape, home, stretches, sources[path], np.dtype(dtype))
        return filled if transform is None else transform(path, filled)

    return tree.map_named(fill_one, specs)


def _limit(home: Sharding, itemsize: int) -> int:
    """Returns how many elements a piece of one device may have."""
    return max(1, PIECE // itemsize // len(home.addressable_devices))


def _read_pieces(home: Sharding, sources: Sequence[Source], where: Slices) -> Iterator[tuple[np.ndarray, Index]]:
    """Reads what a stretch of a weight needs, piece by piece, in the file's order of dimensions."""
    kinds = {s.dtype for s in sources}
    # Pieces that travel together have one dtype; nearly always the file has one for all layers.
    wire = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
    for s in sources:
        for index, starts in _pieces(s.part, s.view, where, _limit(home, wire.itemsize)):
            x = s.read(index)
            yield x.reshape(_sliced_dims(x.shape, s.view)).astype(wire, copy=False), starts


def _fill_small(
    shape: tuple[int, ...],
    home: Sharding,
    stretches: list[tuple[Slices, list[Any]]],
    sources: Sequence[Source],
    dtype: Any,
) -> jax.Array:
    copies = []
    for where, devices in stretches:
        stretch = np.zeros([s.stop - s.start for s in where], dtype)
        for x, starts in _read_pieces(home, sources, where):
            x = x.transpose(sources[0].view.order)
            stretch[_box(starts, x.shape)] = x
        copies += [jax.device_put(stretch.copy(), device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, home, copies)


def _fill_large(
    shape: tuple[int, ...],
    home: Sharding,
    stretches: list[tuple[Slices, list[Any]]],
    sources: Sequence[Source],
    dtype: Any,
) -> jax.Array:
    w = jnp.zeros(shape, dtype, device=home)
    for pieces in zip(*(_read_pieces(home, sources, where) for where, _ in stretches), strict=True):
        jax.block_until_ready(w)  # these pieces were read meanwhile; more would fill the host
        x: dict[Any, np.ndarray] = {}
        at: dict[Any, np.ndarray] = {}
        for (piece, starts), (_, devices) in zip(pieces, stretches, strict=True):
            x |= dict.fromkeys(devices, piece)
            at |= dict.fromkeys(devices, np.array(starts, np.int32))
        w = _put(w, _one_per_device(home, x), _one_per_device(home, at), home=home, order=sources[0].view.order)
    return jax.block_until_ready(w)


@partial(jax.jit, static_argnames=("home", "order"), donate_argnums=0)
def _put(w: jax.Array, x: jax.Array, starts: jax.Array, *, home: Sharding, order: tuple[int, ...]) -> jax.Array:
    """Writes each device's piece, in the file's order and dtype, into its shard of a weight."""

    def local(w: jax.Array, x: jax.Array, starts: jax.Array) -> jax.Array:
        x = x[0].astype(w.dtype).transpose(order)
        return jax.lax.dynamic_update_slice(w, x.reshape((1,) * (w.ndim - x.ndim) + x.shape), tuple(starts[0]))

    return _on_each_device(local, home, ("weight", "local", "local"), "weight")(w, x, starts)


# ------------------------------------------------------------------------------------------------------ out of shards


def collect(tensor: Tensor, flat: Mapping[str, jax.Array], dtype: np.dtype) -> np.ndarray:
    """Collects one tensor of a file on the host.

    Raises an OverflowError where a finite number is beyond the dtype's range.
    """
    out = np.empty(tensor.shape, dtype)
    for part, view in zip(tensor.parts, tensor.views, strict=True):
        w = flat[part.path]
        get = _get_small if _is_small(w.sharding, w.shape, w.dtype.itemsize) else _get_large
        viewed = out.reshape(view.shape)
        for index, x, overflowed in get(w, part, view, dtype):
            if overflowed:
                raise OverflowError(str(dtype))
            viewed[index] = np.asarray(x).reshape(viewed[index].shape)
    return out


def _shard_pieces(
    w: jax.Array, part: Part, view: View, itemsize: int
) -> list[tuple[Any, Iterator[tuple[Slices, Index]]]]:
    """Returns (shard, pieces of it), each stretch of the weight once."""
    limit = _limit(w.sharding, itemsize)

    def stretch(shard: Any) -> Slices:
        return tuple(slice(*i.indices(n)[:2]) for i, n in zip(shard.index, w.shape, strict=True))

    return [(s, _pieces(part, view, stretch(s), limit)) for s in w.addressable_shards if s.replica_id == 0]


def _piece_shape(index: Slices, view: View) -> tuple[int, ...]:
    """Returns the shape of a piece in our order of dimensions."""
    dims = _sliced_dims([s.stop - s.start for s in index], view)
    return tuple(dims[d] for d in view.order)


def _get_small(w: jax.Array, part: Part, view: View, dtype: np.dtype) -> Iterator[tuple[Slices, np.ndarray, bool]]:
    for shard, pieces in _shard_pieces(w, part, view, dtype.itemsize):
        for index, starts in pieces:
            shape = _piece_shape(index, view)
            x = np.asarray(shard.data)[_box(starts, shape)].reshape(shape)
            with np.errstate(over="ignore"):
                y = x.astype(dtype).transpose(np.argsort(view.order))
            yield index, y, bool(np.isinf(y).sum() > np.isinf(x).sum())


def _get_large(w: jax.Array, part: Part, view: View, dtype: np.dtype) -> Iterator[tuple[Slices, np.ndarray, bool]]:
    shards = _shard_pieces(w, part, view, dtype.itemsize)
    home, anywhere = w.sharding, np.zeros(w.ndim, np.int32)  # a device without a piece left reads any
    for pieces in itertools.zip_longest(*(p for _, p in shards)):
        wanted = {s.device: piece for (s, _), piece in zip(shards, pieces, strict=True) if piece is not None}
        at = {d: np.array(wanted[d][1], np.int32) if d in wanted else anywhere for d in home.addressable_devices}
        (shape,) = {_piece_shape(index, view) for index, _ in wanted.values()}
        x, overflowed = _get(w, _one_per_device(home, at), home=home, shape=shape, order=view.order, dtype=dtype)
        overflows = {s.device: s.data for s in overflowed.addressable_shards}
        for s in x.addressable_shards:
            if s.device in wanted:
                yield wanted[s.device][0], np.asarray(s.data), bool(np.asarray(overflows[s.device])[0])


@partial(jax.jit, static_argnames=("home", "shape", "order", "dtype"))
def _get(
    w: jax.Array, starts: jax.Array, *, home: Sharding, shape: tuple[int, ...], order: tuple[int, ...], dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns each device's piece in the file's order and dtype, and whether a finite number became infinite."""

    def local(w: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jax.lax.dynamic_slice(w, tuple(starts[0]), (1,) * (w.ndim - len(shape)) + shape).reshape(shape)
        y = x.astype(dtype).transpose(tuple(int(i) for i in np.argsort(order)))
        return y[None], (jnp.isinf(y).sum() > jnp.isinf(x).sum())[None]

    return _on_each_device(local, home, ("weight", "local"), ("local", "local"))(w, starts)
