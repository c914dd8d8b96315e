"""Finds the units that a model can do without (heads, feed-forward neurons, experts, channels of the residual stream),
and takes a choice of them out of every weight.

L layers, H heads, K key/value heads, N units of a layer.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxlm.core import tree
from jaxlm.core.spec import Spec, is_spec, stacks
from jaxlm.weights.grow.width import HEADS, is_residual

EXPERTS = ("experts", "router")
CROSS = "cross_"


class Units(NamedTuple):
    """Units are what one choice is made among in each layer of a stack: `blocks/` and `heads`, say."""

    place: str
    """What the paths of their weights begin with."""
    axis: str
    """`heads`, `kv`, `ffn`, `experts`, or `embed` for the channels of the residual stream, whose place is empty."""


CHANNELS = Units("", "embed")
Chosen = dict[Units, np.ndarray]
"""The units that stay, in their order: `[L, N]`, and of the residual stream `[N]`."""


def units_of(path: str, dim: int, specs: Mapping[str, Spec], found: Mapping[str, Any]) -> Units | None:
    """Returns the units that a dimension of a weight runs over; None: no choice is made along it, or it is one of the
    residual stream. `found` are the stacks of the specs.

    A table of biases beside a stack has the heads of all layers of the stack, which are then the same in each.
    """
    axis = specs[path].axes[dim]
    if axis not in (*HEADS, "ffn", *EXPERTS):
        return None
    stack = stack_of(path, found)
    if stack is None:
        beside = path.rpartition("/")[0]
        stack = next((name for name in found if name.rpartition("/")[0] == beside), None)
        return None if stack is None else Units(f"{stack}/", str(axis))
    if axis in EXPERTS:
        return Units(f"{stack}/", "experts")
    inner, _, name = path.rpartition("/")
    return Units(f"{inner}/{CROSS if axis in HEADS and name.startswith(CROSS) else ''}", str(axis))


def stack_of(path: str, found: Mapping[str, Any]) -> str | None:
    """Returns the path of the stack that a weight belongs to."""
    return next((name for name in found if path.startswith(f"{name}/")), None)


class Sizes(NamedTuple):
    """Sizes are the numbers of units before and after, and the weights that run over them by path, with the
    dimension."""

    before: int
    after: int
    weights: dict[str, int]


def changes(old_specs: Any, new_specs: Any) -> dict[Units, Sizes]:
    """Returns the units of which some go. ValueError: something else would change, or grow."""
    old, new, found = tree.flatten(old_specs, is_spec), tree.flatten(new_specs, is_spec), stacks(old_specs)
    if old.keys() != new.keys():
        raise ValueError(f"sizes: the model would have other weights: {', '.join(sorted(old.keys() ^ new.keys()))}")
    out: dict[Units, Sizes] = {}
    for path, s in old.items():
        for dim, (a, b) in enumerate(zip(s.shape, new[path].shape, strict=True)):
            if a == b:
                continue
            units = units_of(path, dim, old, found) or (CHANNELS if is_residual(s, dim) else None)
            if units is None:
                why = "; heads keep their width, so change heads and width together" if set(HEADS) & set(s.axes) else ""
                raise ValueError(f"sizes: {path} can't go from {a} to {b} along {s.axes[dim]}{why}")
            if b > a:
                raise ValueError(f"{units.axis}: {path} would grow from {a} to {b} units; see jaxlm grow")
            known = out.setdefault(units, Sizes(a, b, {}))
            if (a, b) != known[:2]:
                raise ValueError(f"sizes: {path} would go from {a} to {b}, others beside it from {known[0]}")
            known.weights[path] = dim
    return out


def weights_of(specs: Any, units: Units) -> dict[str, int]:
    """Returns the weights that run over units, by path, with the dimension."""
    flat, found = tree.flatten(specs, is_spec), stacks(specs)
    pairs = ((path, dim) for path, s in flat.items() for dim in range(len(s.shape)))
    return {path: dim for path, dim in pairs if units_of(path, dim, flat, found) == units}


def shared(specs: Any, units: Units) -> bool:
    """Returns whether all layers must keep the same units, because a weight beside the stack has them too."""
    found = stacks(specs)
    return any(stack_of(path, found) is None for path in weights_of(specs, units))


def selected(old_specs: Any, new_specs: Any, weights: Any, chosen: Chosen) -> Any:
    """Returns the weights with the chosen units alone."""
    old, new, found = tree.flatten(old_specs, is_spec), tree.flatten(new_specs, is_spec), stacks(old_specs)

    def one(path: str, w: np.ndarray) -> np.ndarray:
        for dim in range(w.ndim):
            units = units_of(path, dim, old, found)
            if units is None and old[path].shape[dim] != new[path].shape[dim]:
                units = CHANNELS
            if units not in chosen:
                continue
            at = chosen[units]
            if at.ndim == 1 or stack_of(path, found) is None:
                w = np.take(w, at if at.ndim == 1 else at[0], axis=dim)
            else:
                w = np.take_along_axis(w, along(at, w.ndim, dim), axis=dim)
        return w.astype(np.float32)

    return tree.map_named(one, weights)


def along(values: np.ndarray, ndim: int, dim: int) -> np.ndarray:
    """Returns values of a layer's units `[L, N]` with the dimensions of a weight."""
    return values.reshape([len(values) if i == 0 else -1 if i == dim else 1 for i in range(ndim)])


def ends(specs: Any, units: Units) -> list[str]:
    """Returns the matrices by which units enter the residual stream. ValueError: there are none."""
    flat = tree.flatten(specs, is_spec)
    found = [path for path in weights_of(specs, units) if flat[path].is_matrix and flat[path].axes[-1] == "embed"
             and flat[path].role == "matrix"]  # fmt: skip
    if not found:
        raise ValueError(f"{units.axis}: no matrix of {units.place} leads from them to the residual stream")
    return found


def parameters(specs: Any, new_specs: Any) -> tuple[int, int]:
    """Returns how many numbers the layers have before and after."""
    old, new, found = tree.flatten(specs, is_spec), tree.flatten(new_specs, is_spec), stacks(specs)
    inside = [path for path in old if stack_of(path, found)]
    before, after = (sum(math.prod(flat[path].shape) for path in inside) for flat in (old, new))
    return before, after
