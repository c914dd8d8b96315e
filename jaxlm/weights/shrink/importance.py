"""Scores the units of a model by what would be missing without them: by what they send on for recorded inputs (after
Minitron, Muralidharan et al. 2024), by their weights alone, or by the loss to first order (Molchanov et al. 2019).

L layers, H heads, N units of a layer, I inputs of a matrix, D width.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.core import tree
from jaxlm.core.spec import is_spec
from jaxlm.weights.matrices import Matrix
from jaxlm.weights.shrink.units import Units, ends, weights_of


def _norms(w: np.ndarray, dim: int, layered: bool = True) -> np.ndarray:
    """Returns the squared norm of a weight's numbers along a dimension, `[L, N]`, or `[N]` where it has no layers."""
    kept = {0, dim} if layered else {dim}
    return np.square(w.astype(np.float64)).sum(tuple(i for i in range(w.ndim) if i not in kept))


def by_inputs(specs: Any, weights: Any, units: Units, mean_squares: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the root mean square of what each unit adds to the residual stream, `[L, N]`, as if the channels of a
    head were uncorrelated. `mean_squares` are those of the inputs `[L, I]` of the matrices that `ends` names."""
    total: Any = 0.0
    for path in ends(specs, units):
        w = tree.at(weights, path)
        L, *shape = w.shape
        dim = weights_of(specs, units)[path] - 1
        ins = len(shape) - 1
        squares = mean_squares[path].reshape(L, *shape[:ins]).astype(np.float64)
        sent = squares * np.square(w.astype(np.float64)).sum(-1)
        total = total + sent.sum(tuple(i + 1 for i in range(ins) if i != dim))
    return np.sqrt(total)


def by_weights(specs: Any, weights: Any, units: Units) -> np.ndarray:
    """Returns the geometric mean of the norms of each unit's matrices, those that make it and those it is sent on by,
    `[L, N]`. Of heads the keys and values that they attend by count too."""
    flat = tree.flatten(specs, is_spec)
    found = {path: dim for path, dim in weights_of(specs, units).items() if flat[path].is_matrix and dim > 0}
    norms = [_norms(tree.at(weights, path), dim) for path, dim in found.items() if "router" not in flat[path].axes]
    N = norms[0].shape[1]
    if units.axis == "heads":
        for path, dim in weights_of(specs, units._replace(axis="kv")).items():
            if flat[path].is_matrix:
                of_group = _norms(tree.at(weights, path), dim)
                norms.append(np.repeat(of_group, N // of_group.shape[1], 1))
    return np.prod([n ** (0.5 / len(norms)) for n in norms], axis=0)


def by_products(specs: Any, units: Units, products: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns by how much the loss would change without each unit, to first order: the root mean square over batches
    of the products of weights and gradients that a unit sends on with, `[L, N]`, or `[D]` of the residual stream.

    `products`: of each weight that writes to the residual stream, summed to `[batches, L, N]` or `[batches, D]`.
    """
    return np.sqrt(np.square(np.sum(list(products.values()), 0, dtype=np.float64)).mean(0))


def writers(specs: Any) -> dict[str, int]:
    """Returns the weights that write to the residual stream, with the dimension of its channels: tables, the matrices
    of layers that end in `embed`, and their biases."""
    flat, out = tree.flatten(specs, is_spec), dict[str, int]()
    for path, s in flat.items():
        if s.axes[-1] == "embed" and (s.role == "table" or (s.role == "matrix" and "layers" in s.axes)):
            out[path] = len(s.shape) - 1
            if (bias := f"{path}_bias") in flat:
                out[bias] = len(flat[bias].shape) - 1
    return out


def readers(found: Mapping[str, Matrix]) -> dict[str, Matrix]:
    """Returns those matrices whose inputs are the channels of the residual stream and can be recorded."""
    return {
        path: m for path, m in found.items()
        if m.in_axes == ("embed",) and not m.experts and not m.is_table and m.spec.axes[-1] != "embed"
    }  # fmt: skip


def channels(
    specs: Any, weights: Any, found: Mapping[str, Matrix], mean_squares: Mapping[str, np.ndarray] | None = None,
    last: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Returns the share of each channel of the residual stream `[D]` in what matrices make of it, a mean over the
    matrices and the head, if it has the stream's width. Without recorded inputs all channels count as equally large.

    `mean_squares`: of the inputs of `readers`, `[L, D]`; `last` `[D]`: of the last states.
    """
    shares = []
    for path in readers(found):
        sent = _norms(tree.at(weights, path), 1)
        sent = sent if mean_squares is None else sent * mean_squares[path]
        shares.append((sent / np.maximum(sent.sum(-1, keepdims=True), np.finfo(np.float64).tiny)).mean(0))
    flat = tree.flatten(specs, is_spec)
    heads = [path for path, s in flat.items() if s.role == "head" and s.axes[-1] == "embed"]
    tables = [path for path, s in flat.items() if s.role == "table" and "vocab" in s.axes]
    for path in heads or tables:
        sent = _norms(tree.at(weights, path), 1, layered=False) * (1.0 if last is None else last)
        shares.append(sent / max(float(sent.sum()), np.finfo(np.float64).tiny))
    return np.sqrt(np.mean(shares, 0))


def energy(specs: Any, weights: Any, kept: np.ndarray, mean_squares: Mapping[str, np.ndarray] | None = None) -> float:
    """Returns the share that the channels `kept` have in the squares of the residual stream: of the recorded inputs, or
    without them of the tables."""
    if mean_squares:
        each = [squares.astype(np.float64).mean(0) for squares in mean_squares.values()]
        shares = [float(x[kept].sum() / x.sum()) for x in each if x.sum() > 0]
    else:
        flat = tree.flatten(specs, is_spec)
        tables = [tree.at(weights, path).astype(np.float64) for path, s in flat.items() if s.role == "table"]
        shares = [float(np.square(w[:, kept]).sum() / np.square(w).sum()) for w in tables[:1]]
    return float(np.mean(shares))


def rescaled(old_specs: Any, new_specs: Any, weights: Any, share: float, offset: Mapping[str, float]) -> Any:
    """Returns weights whose norms scale the channels that are left as before: a norm takes the mean over fewer numbers,
    which hold a `share` of the squares. `offset` is what a norm's scale counts from, by its path."""
    old, new = tree.flatten(old_specs, is_spec), tree.flatten(new_specs, is_spec)

    def one(path: str, w: np.ndarray) -> np.ndarray:
        a, b = old[path].shape[-1], new[path].shape[-1]
        if path not in offset or a == b:
            return w
        by = math.sqrt(share * a / b)
        return ((w + offset[path]) * by - offset[path]).astype(np.float32)

    return tree.map_named(one, weights)
