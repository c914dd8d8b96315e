"""Every way to generate is made of these pure functions, which run a model on from its cache.

B rows, P prompt positions, T tokens, V vocabulary, S source positions.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.core.spec import Spec, is_spec
from jaxlm.models.model import Model
from jaxlm.nn import leaf
from jaxlm.nn.block_stack import layout_of
from jaxlm.nn.cache import Cache
from jaxlm.nn.losses import logits

BUCKET = 64  # the least length of prompts and caches; one program serves all lengths of a bucket


# ------------------------------------------------------------------------------------------------------- pure functions


def prepare(model: Model, params: Any) -> Any:
    """Returns weights as decoding reads them: matrices in the dtype that layers compute in, stacked layers as a tuple.

    A stack would be sliced anew for each token. Weights that are prepared already stay as they are.
    """

    def cast(s: Spec, p: Any) -> Any:
        return p if s.is_vector else leaf.cast(p, layout_of(s, model.shard).dtype)

    def walk(p: Any, s: Any) -> Any:
        if isinstance(p, tuple):
            return p
        if isinstance(s, Spec):  # vectors and biases outside of layers work in float32 in training too
            return cast(s, p) if len(s.shape) > 1 and "embed" in s.axes else p
        leaves = jax.tree.leaves(s, is_leaf=is_spec)
        if leaves and all(x.axes[:1] == ("layers",) for x in leaves):
            stacked = jax.tree.map(cast, s, p, is_leaf=is_spec)
            return tuple(jax.tree.map(lambda w, i=i: w[i], stacked) for i in range(leaves[0].shape[0]))
        return {name: walk(value, s[name]) if name in s else value for name, value in p.items()}

    return walk(model.bound(params), model.specs)


def prefill(
    model: Model, params: Any, batch: dict[str, jax.Array], length: int, slack: int = 0
) -> tuple[jax.Array, Cache]:
    """Reads prompts into a new cache of `length` slots and returns (logits `[B, V]` after each prompt, cache).

    `batch` has `tokens`, `positions` and `segments` `[B, P]`, padded on the left. `extend` may go on from the cache by
    up to 1 + `slack` tokens at once.
    """
    cache = model.init_cache(batch["tokens"].shape[0], length, model.shard.dtype, slack)
    out = model.forward(params, batch, cache=cache)
    assert out.cache is not None
    return _logits(model, params, out.x_BTD[:, -1:])[:, 0], out.cache


def extend(
    model: Model, params: Any, cache: Cache, tokens_BT: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, Cache]:
    """Reads T more tokens and returns (logits `[B, T, V]` after each of them, cache)."""
    out = model.forward(params, dict(tokens=tokens_BT, positions=positions_BT), cache=cache)
    assert out.cache is not None
    return _logits(model, params, out.x_BTD), out.cache


def _logits(model: Model, params: Any, x_BTD: jax.Array) -> jax.Array:
    z_BTV = logits(model.readout(params, x_BTD), model.shard)
    return model.shard(z_BTV, None, None, None)


def whole_rows(model: Model) -> Model:
    """Returns the model with every row on every device, so that any number of prompts goes with any mesh."""
    shard = dataclasses.replace(model.shard, compute={**model.shard.compute, "batch": (), "seq": (), "stream": ()})
    return dataclasses.replace(model, shard=shard)


# ------------------------------------------------------------------------------------------------------------ batching


def bucket(n: int) -> int:
    """Rounds `n` up to a size that programs are made for: a multiple of `BUCKET`, or one of four sizes an octave."""
    step = max(BUCKET, (1 << max(n - 1, 1).bit_length()) // 8)
    return -(-n // step) * step


def left_padded(prompts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Returns `tokens`, `positions` and `segments`, int32 `[B, P]`, with the prompts at the right end."""
    P = bucket(max(map(len, prompts)))
    out = {name: np.zeros((len(prompts), P), np.int32) for name in ("tokens", "positions", "segments")}
    for i, ids in enumerate(prompts):
        out["tokens"][i, P - len(ids) :] = ids
        out["positions"][i, P - len(ids) :] = np.arange(len(ids))
        out["segments"][i, P - len(ids) :] = 1
    return out


def sources(texts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Returns what an encoder reads: `source`, `source_positions`, `source_segments` `[B, S]`, padded on the right."""
    S = bucket(max(map(len, texts)))
    out = {name: np.zeros((len(texts), S), np.int32) for name in ("source", "source_segments")}
    for i, ids in enumerate(texts):
        out["source"][i, : len(ids)], out["source_segments"][i, : len(ids)] = ids, 1
    return out | {"source_positions": np.broadcast_to(np.arange(S, dtype=np.int32), (len(texts), S))}
