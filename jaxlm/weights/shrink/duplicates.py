"""Finds units of a model that are copies of each other, such as `jaxlm grow --widen` makes, and lets the first of them
do what all of them did, so that the others can go without loss.

L layers, N units of a layer.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.core import tree
from jaxlm.core.spec import is_spec
from jaxlm.weights.grow.width import HEADS
from jaxlm.weights.matrices import Matrix
from jaxlm.weights.shrink.importance import readers, writers
from jaxlm.weights.shrink.units import Units, ends, weights_of


def merged(specs: Any, weights: Any, units: Units) -> tuple[Any, int]:
    """Returns weights in which of units of a layer that are made alike the first sends on what all of them sent, and
    the others nothing; and how many send nothing. The function stays.

    Units are alike if the numbers of all weights that make them are the same; those of heads with the keys and values
    that they attend by.
    """
    flat, sent = tree.flatten(specs, is_spec), ends(specs, units)
    found = weights_of(specs, units)
    if any("experts" in flat[path].axes for path in sent):
        return weights, 0
    L, N = (tree.at(weights, sent[0]).shape[i] for i in (0, found[sent[0]]))
    made = {path: dim for path, dim in found.items() if path not in sent}
    if units.axis == "heads":
        made |= weights_of(specs, units._replace(axis="kv"))
    keys = []
    for path, dim in made.items():
        w = tree.at(weights, path)
        layered = "layers" in flat[path].axes  # a table beside the stack is the same for all layers
        w = np.moveaxis(w, dim, 1) if layered else np.moveaxis(w, dim, 0)[None]
        of_unit = np.broadcast_to(w.reshape(*w.shape[:2], -1), (L, w.shape[1], w[0, 0].size))
        keys.append(np.repeat(of_unit, N // w.shape[1], 1))
    whole = np.concatenate(keys, -1)
    firsts = np.stack([_firsts(layer) for layer in whole])
    silent = firsts != np.arange(N)
    if not silent.any():
        return weights, 0
    for path in sent:
        w, dim = tree.at(weights, path), found[path]
        w = np.moveaxis(w, dim, 1)
        total = np.zeros(w.shape, np.float64)
        for layer in range(L):
            np.add.at(total[layer], firsts[layer], w[layer])
        weights = tree.put(weights, path, np.moveaxis(total, 1, dim).astype(np.float32))
    return weights, int(silent.sum())


def merged_channels(specs: Any, weights: Any, found: Mapping[str, Matrix]) -> tuple[Any, int]:
    """Returns weights in which of channels of the residual stream that always hold the same number the first is read as
    all of them were, and the others by nobody; and how many are not read. The function stays.

    Channels are alike if every weight that writes to them, and every norm, has the same numbers for them. A tied head
    reads the table that it writes with, so such models keep theirs.
    """
    flat = tree.flatten(specs, is_spec)
    heads = [path for path, s in flat.items() if s.role == "head" and s.axes[-1] == "embed"]
    width = next(s.shape[-1] for s in flat.values() if s.role == "table")
    wrote = dict(writers(specs))
    wrote |= {path: len(s.shape) - 1 for path, s in flat.items() if s.is_vector and s.shape[-1] == width
              and s.axes[-1] in (None, "embed") and not set(HEADS) & set(s.axes)}  # fmt: skip
    read = dict.fromkeys(readers(found), 1) | dict.fromkeys(heads, 1)
    covered = wrote.keys() | read.keys()
    others = [
        p
        for p, s in flat.items()
        if width in s.shape and "embed" in s.axes and p not in covered and "experts" not in s.axes
    ]
    if not heads or others or any("experts" in s.axes for s in flat.values()):
        return weights, 0
    columns = [np.moveaxis(tree.at(weights, path), dim, 0).reshape(width, -1) for path, dim in wrote.items()]
    firsts = _firsts(np.concatenate(columns, -1))
    silent = firsts != np.arange(width)
    for path, dim in read.items() if silent.any() else ():
        w = np.moveaxis(tree.at(weights, path), dim, 0)
        total = np.zeros(w.shape, np.float64)
        np.add.at(total, firsts, w)
        weights = tree.put(weights, path, np.moveaxis(total, 0, dim).astype(np.float32))
    return weights, int(silent.sum())


def _firsts(rows: np.ndarray) -> np.ndarray:
    """Returns the number of the first row that is the same, for each of rows `[N, …]`."""
    _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return first[which.reshape(-1)]
