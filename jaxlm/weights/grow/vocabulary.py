"""Adds rows to the vocabulary of a model, in its embedding and its head alike."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.core import tree
from jaxlm.core.spec import Spec, is_spec


def with_rows(new_specs: Any, weights: Any, known: int, pieces: Mapping[int, Sequence[int]]) -> Any:
    """Returns the weights with as many rows as `new_specs` have.

    The first `known` rows are those that tokens had so far. `pieces` says which of them a later token begins as the
    mean of; without it a row begins as the mean of all of them (Hewitt 2021). Rows that stay without a token are kept.
    """
    flat = tree.flatten(new_specs, is_spec)

    def one(path: str, w: np.ndarray) -> np.ndarray:
        s: Spec = flat[path]
        if "vocab" not in s.axes:
            return w
        dim = s.axes.index("vocab")
        rows, before = np.moveaxis(w, dim, 0), w.shape[dim]
        mean = rows[:known].mean(0, keepdims=True)
        rows = np.concatenate([rows, np.repeat(mean, s.shape[dim] - before, 0)])
        for token, ids in pieces.items():
            rows[token] = rows[list(ids)].mean(0) if ids else mean[0]
        return np.moveaxis(rows, 0, dim).astype(np.float32)

    return tree.map_named(one, weights)


def moments(
    new_specs: Any, averages: Mapping[str, np.ndarray], pieces: Mapping[int, Sequence[int]]
) -> dict[str, np.ndarray]:
    """Returns averages of gradients, or of their squares, by path, as those of the larger vocabulary. Rows of new
    tokens have 0, as those of tokens that no batch has held yet."""
    flat = tree.flatten(new_specs, is_spec)

    def one(path: str, w: np.ndarray) -> np.ndarray:
        s: Spec = flat[path]
        if "vocab" not in s.axes:
            return w
        dim = s.axes.index("vocab")
        rows = np.moveaxis(w, dim, 0)
        more = s.shape[dim] - len(rows)
        rows = np.concatenate([rows, np.zeros((more, *rows.shape[1:]), rows.dtype)])
        rows[list(pieces)] = 0
        return np.moveaxis(rows, 0, dim)

    return {path: one(path, w) for path, w in averages.items()}
