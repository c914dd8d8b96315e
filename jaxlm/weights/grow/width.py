"""Grows a model by width, and keeps its function (Net2Net, Chen et al. 2016; FPI, Chen et al. 2022): every new unit is
a copy of an old one, and the copies share what the old one sent on.

Units of the residual stream are copied equally often, because norms take a mean over them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxlm.core import tree
from jaxlm.core.spec import Spec, is_spec

HEADS = ("heads", "kv")


def input_dimensions(s: Spec) -> tuple[int, ...]:
    """Returns the dimensions of a weight whose units are summed over; layers and experts are none."""
    own = [i for i, axis in enumerate(s.axes) if axis not in ("layers", "experts")]
    if s.role == "table" or s.is_vector:
        return ()
    if s.role == "head":
        return tuple(i for i in own if s.axes[i] == "embed")
    return tuple(own[:-1] if s.axes[-1] == "embed" else own[:1])


def is_residual(s: Spec, dim: int) -> bool:
    """Returns whether a dimension of a weight may be one of the residual stream: its axis is `embed`, or has no name in
    a weight without heads. It then is one if it has the stream's width and changes with it."""
    return s.axes[dim] == "embed" or (s.axes[dim] is None and not set(HEADS) & set(s.axes))


def head_sources(heads: int, kv: int, new_heads: int, new_kv: int) -> np.ndarray:
    """Returns the old head that each new one copies, so that each keeps the keys and values it attends by: new
    key/value head k is a copy of k modulo `kv`. ValueError: the sizes don't allow it."""
    if new_heads % new_kv:
        raise ValueError(f"widen: {new_heads} heads are no whole multiple of {new_kv} key/value heads")
    each, new_each = heads // kv, new_heads // new_kv
    group, place = np.divmod(np.arange(new_heads), new_each)
    copy, old_group = np.divmod(group, kv)
    return old_group * each + (copy * new_each + place) % each


def widened(
    old_specs: Any, new_specs: Any, weights: Any, widths: tuple[int, int], noise: float = 0.0, seed: int = 0
) -> Any:
    """Returns the weights of `new_specs` that compute what those of `old_specs` do; `widths` are the old and the new
    width of the residual stream.

    `noise`: how unequally copies share what they send on, in deviations of the weight; the shares still add up to the
    old weight, so that the function stays, and the copies are trained apart. ValueError: a size can't grow so.
    """
    rng, old, copies = (
        np.random.default_rng(seed),
        tree.flatten(old_specs, is_spec),
        _copies(old_specs, new_specs, widths),
    )

    def one(path: str, w: np.ndarray) -> np.ndarray:
        for i, source, times in copies(path):
            w = np.take(w, source, axis=i)
            if i in input_dimensions(old[path]):
                w = _shared(w, source, times, i, noise, rng)
        return w.astype(np.float32)

    return tree.map_named(one, weights)


def moments(
    old_specs: Any, new_specs: Any, averages: Mapping[str, np.ndarray], widths: tuple[int, int], order: int
) -> dict[str, np.ndarray]:
    """Returns averages of gradients to the power of `order`, by path, as those of the widened model.

    What a copied unit sends on is divided among its copies, and so is the gradient that comes back to each: it is
    divided by their number along dimensions of outputs, and is the same along those of inputs, whose weights were
    divided. This is exact where copies share equally, and where every copy of a key/value head serves copies of the
    same queries; elsewhere the copies' gradients still add up to the old one.
    """
    old, copies = tree.flatten(old_specs, is_spec), _copies(old_specs, new_specs, widths)

    def one(path: str, w: np.ndarray) -> np.ndarray:
        for i, source, times in copies(path):
            w = np.take(w, source, axis=i)
            if i not in input_dimensions(old[path]):
                w = w / _along(times[source].astype(np.float32) ** order, w.ndim, i)
        return w

    return {path: one(path, w) for path, w in averages.items()}


def _along(x: np.ndarray, ndim: int, dim: int) -> np.ndarray:
    return x.reshape([-1 if i == dim else 1 for i in range(ndim)])


Copies = Callable[[str], Iterator[tuple[int, np.ndarray, np.ndarray]]]
"""A weight's path → each of its dimensions that grows, the old unit of each new one, and how many copies each old unit
has."""


def _copies(old_specs: Any, new_specs: Any, widths: tuple[int, int]) -> Copies:
    """Returns what says how weights grow. ValueError: a size can't grow so."""
    old, new = tree.flatten(old_specs, is_spec), tree.flatten(new_specs, is_spec)
    if old.keys() != new.keys():
        raise ValueError(f"widen: the model would have other weights: {', '.join(sorted(old.keys() ^ new.keys()))}")
    sources = _sources(old, new, widths)

    def copies(path: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        a, b = old[path], new[path]
        for i in range(len(a.shape)):
            if a.shape[i] == b.shape[i] and a.axes[i] != "heads":
                continue
            source = sources(path, i)  # as many heads as before stand in another order where there are more for keys
            if np.array_equal(source, np.arange(a.shape[i])):
                continue
            times = np.bincount(source, minlength=a.shape[i])
            if not times.all():
                raise ValueError(f"widen: {path} would lose units of its {a.axes[i]} axis; choose larger sizes")
            if b.role in ("norm", "norm_bias") and len(set(times.tolist())) > 1:
                raise ValueError(
                    f"widen: {path} norms {a.shape[i]} units, so only whole multiples of them are possible"
                )
            yield i, source, times

    return copies


def _shared(
    w: np.ndarray, source: np.ndarray, times: np.ndarray, dim: int, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Returns weights of copied inputs such that the copies of each add up to it."""
    w = np.moveaxis(w, dim, 0)
    many = times[source].reshape(-1, *[1] * (w.ndim - 1))
    w = w / many
    if noise:
        apart = noise * w.std() * rng.standard_normal(w.shape)
        sums = np.zeros((len(times), *w.shape[1:]))
        np.add.at(sums, source, apart)
        w = w + apart - sums[source] / many
    return np.moveaxis(w, 0, dim)


def _sources(old: dict[str, Spec], new: dict[str, Spec], widths: tuple[int, int]) -> Callable[[str, int], np.ndarray]:
    """Returns the function from a weight and one of its dimensions that grows to the old unit of each new one."""

    def sizes(path: str, axis: str) -> tuple[int, int] | None:
        """Returns the old and the new size of an axis in the weight's layers."""
        parent = path.rpartition("/")[0]
        beside = (p for p in old if p.rpartition("/")[0] == parent and axis in old[p].axes)
        return next(((old[p].shape[i], new[p].shape[i]) for p in beside for i in [old[p].axes.index(axis)]), None)

    def source(path: str, dim: int) -> np.ndarray:
        a, b, axis = old[path].shape[dim], new[path].shape[dim], old[path].axes[dim]
        if b < a:
            raise ValueError(f"widen: {path} would shrink from {a} to {b} units; a model only grows")
        if is_residual(old[path], dim) and (a, b) == widths:
            if b % a:
                raise ValueError(f"widen: width {a} can't become {b}: norms allow whole multiples alone")
            return np.arange(b) % a
        if axis == "heads":
            kv = sizes(path, "kv") or (a, b)
            return head_sources(a, kv[0], b, kv[1])
        if axis == "kv":
            heads = sizes(path, "heads") or (a, b)
            head_sources(heads[0], a, heads[1], b)  # refuses what doesn't fit
            return np.arange(b) % a
        if axis == "ffn":
            return np.arange(b) % a
        where = "heads keep their width; change heads and width together" if set(HEADS) & set(old[path].axes) else axis
        raise ValueError(f"widen: {path} can't grow from {a} to {b} units along {where}")

    return source


def with_own_head(old_specs: Any, new_specs: Any, weights: Any) -> tuple[Any, Any]:
    """Returns specs and weights of a model with a head of its own in place of the tied one, a copy of its embedding.

    A tied head can't grow: copies of units would be added up by it, and must not be divided in the embedding.
    ValueError: there is no place for a head.
    """
    heads = [path for path, s in tree.flatten(new_specs, is_spec).items() if s.role == "head"]
    tables = [path for path, s in tree.flatten(old_specs, is_spec).items() if s.role == "table" and "vocab" in s.axes]
    if len(heads) != 1 or len(tables) != 1:
        raise ValueError(
            "widen: the head of this family is always its embedding, which can't grow; leave width as it is"
        )
    table: Spec = tree.at(old_specs, tables[0])
    head = table._replace(role="head", below_layers=False)
    return tree.put(old_specs, heads[0], head), tree.put(weights, heads[0], tree.at(weights, tables[0]))
