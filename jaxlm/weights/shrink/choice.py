"""Chooses by their scores which units of a model stay.

L layers, H heads, N units of a layer.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.core import tree
from jaxlm.weights.shrink.units import CHANNELS, Chosen, Sizes, Units, shared, weights_of


def choose(specs: Any, changed: Mapping[Units, Sizes], scores: Mapping[Units, np.ndarray]) -> Chosen:
    """Returns the units that stay, of those of which some go: the best of each layer, or of all layers together where
    these must keep the same. Key/value heads follow from the heads. `scores`: `[L, N]`, of channels `[D]`."""
    chosen: Chosen = {}
    for one, sizes in changed.items():
        if one.axis == "kv":
            if one._replace(axis="heads") not in changed:
                raise ValueError(f"kv_heads: heads of {one.place} would have to go with theirs; give heads too")
            continue
        each = scores[one]
        if one != CHANNELS and shared(specs, one):
            each = np.broadcast_to(each.sum(0), each.shape)
        if one.axis != "heads":
            chosen[one] = best(each, sizes.after)
            continue
        kv = one._replace(axis="kv")
        of_kv = weights_of(specs, kv)
        before = next((tree.at(specs, path).shape[dim] for path, dim in of_kv.items()), sizes.before)
        after = changed[kv].after if kv in changed else before if of_kv else sizes.after
        chosen[one], groups = best_heads(each, before, sizes.after, after)
        if kv in changed:
            chosen[kv] = groups
    return chosen


def best(scores: np.ndarray, n: int) -> np.ndarray:
    """Returns the `n` units of the highest scores `[…, N]`, in their order; of equal ones the first."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :n], axis=-1)


def best_heads(scores: np.ndarray, kv: int, heads: int, new_kv: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `heads` to keep by scores `[L, H]`, and the `new_kv` key/value heads that they attend by.

    Groups go whole by the sum of their best heads' scores; in each group that stays as many heads are kept.
    ValueError: the numbers don't allow it.
    """
    L, H = scores.shape
    if heads % new_kv:
        raise ValueError(f"heads: {heads} are no whole multiple of {new_kv} key/value heads; give another number")
    each, new_each = H // kv, heads // new_kv
    if new_each > each:
        raise ValueError(
            f"kv_heads: {new_kv} would leave {new_each} heads to each, where the model has {each}; keep fewer heads"
        )
    by_group = scores.reshape(L, kv, each)
    kept = best(by_group, new_each)
    groups = best(np.take_along_axis(by_group, kept, -1).sum(-1), new_kv)
    inside = np.take_along_axis(kept, groups[..., None], 1)
    return (groups[..., None] * each + inside).reshape(L, heads), groups


def kv_heads(heads: int, kv: int, new_heads: int) -> int:
    """Returns how many key/value heads stay with `new_heads`: whole groups go where that is possible, else heads of
    every group. ValueError: neither is."""
    each = heads // kv
    if new_heads % each == 0:
        return new_heads // each
    if new_heads % kv == 0:
        return kv
    raise ValueError(
        f"heads: {new_heads} are neither whole groups of {each} heads nor as many of each of {kv} groups; give a "
        f"multiple of {each} or of {kv}"
    )
