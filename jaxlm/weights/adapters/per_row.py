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
from jaxlm.weights.sites import Site


@dataclass(frozen=True)
class Mixed:
    """Stands where a `peft.Adapted` stands, for a model in use."""

    sites: dict[str, Site]
    plain: Any
    """What binds the base's own weights: an `Adapted` without a method."""
    places: int = 0

    def bind(self, params: Any, key: jax.Array | None = None) -> Any:
        out, own = self.plain.bind(params | {"adapter": None}), params.get("adapter")
        for path, s in self.sites.items() if own else ():
            held = tree.at(own, path)
            rows_LBR = jnp.broadcast_to(own["rows"][None], (s.layers, *own["rows"].shape))
            leaf = low_rank.LowRank(tree.at(out, path), held["a"], held["b"], 1.0, s.ins, rows_BR=rows_LBR)
            out = tree.put(out, path, leaf)
        return out

    def layout(self, shard: Layout) -> Layout:
        return shard

    def read(self, batch: dict, cache: Any, shard: Layout) -> dict:
        return batch

    def cut(self, out: Output, cache: Any, shard: Layout) -> Output:
        return out


def together(each: Sequence[tuple[Any, Any]], rows: Sequence[int | None], plain: Any) -> tuple[Mixed, dict[str, Any]]:
    """(what binds them, their weights) of several (`Adapted`, weights under `adapter/`) of one model.

    `rows`: the number of each row's adapter, or None. A batch of n times as many rows has n of each side by side.
    """
    for adapted, _ in each:
        if adapted.c.method not in ("lora", "pissa", "adalora", "vera"):
            raise ValueError(f"adapter.method: {adapted.c.method} can't be mixed with others in a batch; use it alone")
    sites = {path: s for adapted, _ in each for path, s in adapted.sites.items()}
    pairs = [_pairs(adapted, own) for adapted, own in each]
    ends = list(itertools.accumulate(next(iter(held.values()))[0].shape[-1] for held in pairs))
    total, spans = ends[-1], [slice(*both) for both in itertools.pairwise([0, *ends])]
    out: dict[str, Any] = {}
    for path, s in sites.items():
        a = np.zeros((s.layers, *s.in_shape, total), np.float32)
        b = np.zeros((s.layers, total, *s.out_shape), np.float32)
        for held, span in zip(pairs, spans, strict=True):
            if path in held:
                a[..., span], b[:, span] = held[path]
        out = tree.put(out, path, dict(a=jnp.asarray(a), b=jnp.asarray(b)))
    mask = np.zeros((len(rows), total), np.float32)
    for row, number in enumerate(rows):
        if number is not None:
            mask[row, spans[number]] = 1
    return Mixed(sites, plain), out | {"rows": jnp.asarray(mask)}


def _pairs(adapted: Any, own: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each site two matrices whose product is what the adapter adds, all of one rank."""
    out = {}
    for path, s in adapted.sites.items():
        leaf = low_rank.bind(adapted.c, s, None, tree.at(own, path), own.get("shared", {}), None)
        a, b = np.asarray(leaf.a, np.float32), np.asarray(leaf.b, np.float32) * leaf.scale
        if leaf.e is not None:
            e = np.asarray(leaf.e)
            a = a * e.reshape(s.layers, *[1] * s.ins, -1)
        if leaf.g is not None:
            b = b * np.asarray(leaf.g)[:, None]
        if leaf.a0 is not None:
            a = np.concatenate([a, np.asarray(leaf.a0)], -1)
            b = np.concatenate([b, -leaf.scale * np.asarray(leaf.b0)], 1)
        out[path] = (a, b)
    return out
