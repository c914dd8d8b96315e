"""Turns a dense model into a mixture of experts, each a copy of the feed-forward network (Komatsuzaki et al. 2023)."""

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
