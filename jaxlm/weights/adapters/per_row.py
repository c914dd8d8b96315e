"""Several adapters at once: each row of a batch goes through its own, and all rows through the base together.

Their directions stand side by side in one pair of matrices, and a row's mask lets through those of its adapter. B rows,
R directions of all adapters.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import tree
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.weights.adapters import low_rank
from jaxlm.weights.adapters.adapted import Adapted
from jaxlm.weights.matrices import Matrix


@dataclass(frozen=True)
class Mixed:
    """A `Mixed` stands where an `Adapted` stands, for a model in use."""

    targets: dict[str, Matrix]
    plain: Adapted
    """What binds the base's own weights: an `Adapted` without a method."""
    num_virtual_tokens: int = 0

    def bind(self, params: Any, key: Any = None) -> Any:
        out, adapter = self.plain.bind(params | {"adapter": None}), params.get("adapter")
        for path, t in self.targets.items() if adapter else ():
            pair = tree.at(adapter, path)
            rows_LBR = jnp.broadcast_to(adapter["rows"][None], (t.layers, *adapter["rows"].shape))
            leaf = low_rank.LowRank(tree.at(out, path), pair["a"], pair["b"], 1.0, t.ins, rows_BR=rows_LBR)
            out = tree.put(out, path, leaf)
        return out

    def layout(self, shard: Layout) -> Layout:
        return shard

    def with_virtual_tokens(self, batch: dict, cache: Any, shard: Layout) -> dict:
        return batch

    def without_virtual_tokens(self, out: Output, cache: Any, shard: Layout) -> Output:
        return out


def mix(
    adapters: Sequence[tuple[Adapted, Any]], rows: Sequence[int | None], plain: Adapted
) -> tuple[Mixed, dict[str, Any]]:
    """Returns what binds several adapters of one model, (`Adapted`, weights under `adapter/`) each, and their weights.

    `rows` has the number of each row's adapter, or None. A batch of n times as many rows has n of each side by side.
    """
    targets = {path: t for adapted, _ in adapters for path, t in adapted.targets.items()}
    pairs = [_pairs(adapted, weights) for adapted, weights in adapters]
    ends = list(itertools.accumulate(next(iter(pair.values()))[0].shape[-1] for pair in pairs))
    total, spans = ends[-1], [slice(*both) for both in itertools.pairwise([0, *ends])]
    out: dict[str, Any] = {}
    for path, t in targets.items():
        a = np.zeros((t.layers, *t.in_shape, total), np.float32)
        b = np.zeros((t.layers, total, *t.out_shape), np.float32)
        for pair, span in zip(pairs, spans, strict=True):
            if path in pair:
                a[..., span], b[:, span] = pair[path]
        out = tree.put(out, path, dict(a=jnp.asarray(a), b=jnp.asarray(b)))
    mask = np.zeros((len(rows), total), np.float32)
    for row, number in enumerate(rows):
        if number is not None:
            mask[row, spans[number]] = 1
    return Mixed(targets, plain), out | {"rows": jnp.asarray(mask)}


def _pairs(adapted: Adapted, weights: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns two matrices for each target whose product is what the adapter adds, all of one rank."""
    factors = adapted.method.factors
    if factors is None or adapted.tables:
        on = f" on {' and '.join(adapted.tables)}" if adapted.tables else ""
        raise ValueError(f"adapter: {adapted.name}{on} can't be mixed with others in a batch; use it alone")
    shared = weights.get("shared", {})
    return {path: factors(adapted.c, t, tree.at(weights, path), shared) for path, t in adapted.targets.items()}


def for_rows(params: Any, rows_BR: jnp.ndarray | None) -> Any:
    """Returns weights that `decode.prepare` made, for rows with other adapters; None: as they are."""
    if rows_BR is None:
        return params

    def of(w: Any) -> Any:
        return w.replace(rows_BR=rows_BR.astype(w.rows_BR.dtype)) if _is_mixed(w) else w

    return jax.tree.map(of, params, is_leaf=_is_mixed)


def _is_mixed(w: Any) -> bool:
    return isinstance(w, low_rank.LowRank) and w.rows_BR is not None
