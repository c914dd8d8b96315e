"""Adds rows to the vocabulary of a model, in its embedding and its head alike."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.core import tree
from jaxlm.core.spec import Spec, is_spec


def with_rows(new_specs: Any, weights: Any, known: int, pieces: Mapping[int, Sequence[int]]) -> Any:
    """Returns the weights with as many rows as `new_specs` have.

    The first `known` rows are those that tokens had so far. `pieces` says which of them a later token begins as the
    mean of; without it a row begins as the mean of all of them (Hewitt 2021). Rows that stay without a token are kept.
    """

    def grown(rows: np.ndarray, count: int) -> np.ndarray:
        mean = rows[:known].mean(0, keepdims=True)
        out = np.concatenate([rows, np.repeat(mean, count - len(rows), 0)])
        for token, ids in pieces.items():
            out[token] = out[list(ids)].mean(0) if ids else mean[0]
        return out.astype(np.float32)

    one = _along_vocabulary(new_specs, grown)
    return tree.map_named(one, weights)


def moments(
    new_specs: Any, averages: Mapping[str, np.ndarray], pieces: Mapping[int, Sequence[int]]
) -> dict[str, np.ndarray]:
    """Returns averages of gradients, or of their squares, by path, as those of the larger vocabulary. Rows of new
    tokens have 0, as those of tokens that no batch has held yet."""

    def grown(rows: np.ndarray, count: int) -> np.ndarray:
        out = np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])
        out[list(pieces)] = 0
        return out

    one = _along_vocabulary(new_specs, grown)
    return {path: one(path, w) for path, w in averages.items()}


def _along_vocabulary(
    new_specs: Any, grown: Callable[[np.ndarray, int], np.ndarray]
) -> Callable[[str, np.ndarray], np.ndarray]:
    """Returns the function (path, array) → array that gives an array with a row for each token the rows that `grown`
    makes of its own and their new number, and any other array back."""
    flat = tree.flatten(new_specs, is_spec)

    def one(path: str, w: np.ndarray) -> np.ndarray:
        s: Spec = flat[path]
        if "vocab" not in s.axes:
            return w
        dim = s.axes.index("vocab")
        return np.moveaxis(grown(np.moveaxis(w, dim, 0), s.shape[dim]), 0, dim)

    return one
