"""Turns a dense model into a mixture of experts, each a copy of the feed-forward network (Komatsuzaki et al. 2023)."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxlm.core import spec, tree
from jaxlm.core.spec import Spec, is_spec


def upcycled(old_specs: Any, new_specs: Any, weights: Any, key: jax.Array) -> Any:
    """Returns the weights of a mixture: `…/experts/up` is `…/up` once for each expert, and routers are fresh.

    A token's weights must add up to one for the function to stay. ValueError: a weight has no counterpart.
    """
    old, new, given = tree.flatten(old_specs, is_spec), tree.flatten(new_specs, is_spec), tree.flatten(weights)
    routers = {path: s for path, s in new.items() if s.role == "router"}
    used: set[str] = set()

    def one(path: str, s: Spec) -> np.ndarray:
        if path in routers:
            return np.asarray(fresh[path])
        dense = path.replace("/experts/", "/")
        dim = s.axes.index("experts") if "experts" in s.axes else None
        shape = s.shape if dim is None else s.shape[:dim] + s.shape[dim + 1 :]
        if dense not in old or old[dense].shape != shape:
            raise ValueError(f"experts: the dense model has no {dense} of shape {list(shape)} for {path}")
        used.add(dense)
        w = given[dense]
        return w if dim is None else np.repeat(np.expand_dims(w, dim), s.shape[dim], dim)

    fresh = tree.flatten(spec.init(tree.partition(new_specs, lambda path: path in routers)[0], key))
    out = {path: one(path, s) for path, s in new.items()}
    if left := sorted(old.keys() - used):
        raise ValueError(f"experts: the mixture has no place for {', '.join(left)}")
    nested: dict[str, Any] = {}
    for path, w in out.items():
        nested = tree.put(nested, path, w)
    return nested


def moments(new_specs: Any, averages: Mapping[str, np.ndarray], top_k: int, order: int) -> dict[str, np.ndarray]:
    """Returns averages of gradients to the power of `order`, by path, as those of the mixture, as far as known.

    The gradients of the experts add up to that of the dense network, each token's by the weights of its experts. That
    of one expert depends on the router; what is returned is what is expected of one that sends tokens anywhere alike
    and weighs its choices alike: of E experts the share 1/E of the gradient, and, of a sum over tokens whose gradients
    are independent, 1/(E · top_k) of the square (top_k/E of the tokens, each weighted by 1/top_k). With top_k = E both
    are exact. Routers have none.
    """
    out = {}
    for path, s in tree.flatten(new_specs, is_spec).items():
        dense = path.replace("/experts/", "/")
        if s.role == "router" or dense not in averages:
            continue
        w = averages[dense]
        if "experts" in s.axes:
            dim = s.axes.index("experts")
            E = s.shape[dim]
            w = np.repeat(np.expand_dims(w / np.float32(E if order == 1 else E * top_k), dim), E, dim)
        out[path] = w
    return out
