"""Fragments are parts of the weights that workers exchange in turn, so that less travels at a time (streaming DiLoCo,
Douillard et al. 2025).

A fragment is a dict of arrays by path. Which rows belong to it depends on shapes alone, never on the mesh.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import spec, tree
from jaxlm.core.spec import Spec


@dataclass(frozen=True)
class Fragments:
    """A Fragments says which part of each weight belongs to which of `count` fragments.

    Weights of many layers, and others whose first axis the count divides, give each fragment every `count`th row of
    their first axis: layers are strided, as the paper found best. Others belong to one fragment as a whole.
    """

    count: int
    owner: dict[str, int | None]
    """Path → the fragment that has the whole weight; None: each has its rows."""
    sizes: tuple[int, ...]
    """The numbers of each fragment."""

    @classmethod
    def of(cls, specs: Any, count: int) -> "Fragments":
        """Returns the fragments of the weights with these specs; whole weights go where there is least so far."""
        flat = tree.flatten(specs, spec.is_spec)
        owner: dict[str, int | None] = {}
        sizes = [0] * count
        for path, s in sorted(flat.items(), key=lambda item: (-math.prod(item[1].shape), item[0])):
            size = math.prod(s.shape)
            if _is_strided(s, count):
                owner[path] = None
                rows = s.shape[0] if s.shape else 1
                for p in range(count):
                    sizes[p] += size // rows * len(range(p, rows, count))
            else:
                smallest = min(range(count), key=sizes.__getitem__)
                owner[path] = smallest
                sizes[smallest] += size
        return cls(count, owner, tuple(sizes))

    def rows(self, path: str, number: int) -> slice | None:
        """Returns the rows of a weight's first axis that a fragment has; None: it has nothing of it."""
        owner = self.owner[path]
        return slice(number, None, self.count) if owner is None else slice(None) if owner == number else None

    def take(self, weights: Any, number: int, lead: int = 0) -> dict[str, jax.Array]:
        """Returns a fragment of a tree of weights, before whose axes `lead` others stand."""
        flat = tree.flatten(weights)
        rows = {path: self.rows(path, number) for path in flat}
        return {path: _cut(flat[path], part, lead) for path, part in rows.items() if part is not None}

    def put(self, weights: Any, number: int, part: dict[str, jax.Array], lead: int = 0) -> Any:
        """Returns a tree of weights in which a fragment has been replaced."""

        def one(path: str, w: jax.Array) -> jax.Array:
            rows = self.rows(path, number)
            if rows is None:
                return w
            return part[path] if _all(rows) else _set(w, rows, part[path], lead)

        return tree.map_named(one, weights)

    def take_workers(self, weights: Any, number: int) -> dict[str, jax.Array]:
        """Returns a fragment of the weights of several workers, [W, …]."""
        return self.take(weights, number, 1)

    def put_workers(self, weights: Any, number: int, part: dict[str, jax.Array]) -> Any:
        """Returns the weights of several workers, [W, …], in which a fragment has been replaced."""
        return self.put(weights, number, part, 1)

    def take_like(self, tree_: Any, number: int) -> dict[str, Any]:
        """Returns what a tree, such as one of shardings, has for the weights of a fragment."""
        return {path: x for path, x in tree.flatten(tree_).items() if self.rows(path, number) is not None}

    def check(self, specs: Any, ways: dict[str, int]) -> None:
        """Raises ValueError, which names the weight, if devices that share a weight's first axis would not have whole
        rows of each fragment. `ways`: path → the devices that share it."""
        for path, s in tree.flatten(specs, spec.is_spec).items():
            if self.owner[path] is None and ways[path] > 1 and s.shape[0] // ways[path] % self.count:
                raise ValueError(
                    f"distributed.fragments: {self.count} fragments do not divide the {s.shape[0] // ways[path]} "
                    f"{s.axes[0]} of {path} on a device; choose a number that does, or another mesh"
                )


def _is_strided(s: Spec, count: int) -> bool:
    if count == 1 or not s.shape:
        return count == 1
    return s.shape[0] >= count if s.axes[0] == "layers" else s.shape[0] % count == 0


def _all(rows: slice) -> bool:
    return rows == slice(None) or rows == slice(0, None, 1)


def _cut(w: jax.Array, rows: slice, lead: int) -> jax.Array:
    if _all(rows):
        return w
    turns, last = _turns(w, rows, lead)
    cut = jax.lax.index_in_dim(turns, rows.start, axis=lead + 1, keepdims=False)
    if last is None:
        return cut
    return jnp.concatenate([cut, jax.lax.slice_in_dim(w, last, last + 1, axis=lead)], axis=lead)


def _set(w: jax.Array, rows: slice, part: jax.Array, lead: int) -> jax.Array:
    """Returns a weight with other rows. It is written as what compilers do in place: a scatter, which `jax.vmap` would
    make of this too, is a copy of the weight."""
    turns, last = _turns(w, rows, lead)
    n = turns.shape[lead]
    first = jnp.expand_dims(jax.lax.slice_in_dim(part, 0, n, axis=lead), lead + 1)
    new = jax.lax.dynamic_update_slice_in_dim(turns, first, rows.start, axis=lead + 1)
    new = new.reshape(*w.shape[:lead], n * rows.step, *w.shape[lead + 1 :])
    if n * rows.step == w.shape[lead]:
        return new
    new = jax.lax.dynamic_update_slice_in_dim(w, new, 0, axis=lead)
    if last is None:
        return new
    return jax.lax.dynamic_update_slice_in_dim(new, jax.lax.slice_in_dim(part, n, n + 1, axis=lead), last, axis=lead)


def _turns(w: jax.Array, rows: slice, lead: int) -> tuple[jax.Array, int | None]:
    """Returns a weight as [turns, fragments, …] after the axes that lead, and the last of some rows where that is after
    the last whole turn."""
    n = w.shape[lead] // rows.step
    last = n * rows.step + rows.start
    whole = jax.lax.slice_in_dim(w, 0, n * rows.step, axis=lead)
    turns = whole.reshape(*w.shape[:lead], n, rows.step, *w.shape[lead + 1 :])
    return turns, last if last < w.shape[lead] else None
