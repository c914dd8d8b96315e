"""A model read on from a cache: what every way to generate is made of, as pure functions.

B rows, P prompt places, T tokens, V vocabulary, S source places.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.spec import Spec, is_spec
from jaxlm.models.model import Model
from jaxlm.nn.block_stack import layout_of
from jaxlm.nn.cache import Cache
from jaxlm.nn.losses import logits

BUCKET = 64  # the least length of prompts and caches: a program serves all lengths of a bucket


# ------------------------------------------------------------------------------------------------------- pure functions


def prepare(model: Model, params: Any) -> Any:
    """Weights as decoding reads them: in the dtype that layers use, and a tuple of layers where they were stacked.

    A stack would be cut anew for each token. What is prepared already stays as it is.
    """

    def cast(s: Spec, p: Any) -> Any:
        dtype = layout_of(s, model.shard).dtype

        def one(w: Any) -> Any:  # quantized weights keep the digits of their scales
            return w.astype(dtype) if not hasattr(w, "dense") and jnp.issubdtype(w.dtype, jnp.floating) else w

        return jax.tree.map(one, p, is_leaf=lambda w: hasattr(w, "dense"))

    def walk(p: Any, s: Any) -> Any:
        if isinstance(p, tuple):
            return p
        if isinstance(s, Spec):  # vectors and biases outside of layers work in float32 in training too
            return cast(s, p) if len(s.shape) > 1 and "embed" in s.axes else p
        found = jax.tree.leaves(s, is_leaf=is_spec)
        if found and all(x.axes[:1] == ("layers",) for x in found):
            whole = jax.tree.map(cast, s, p, is_leaf=is_spec)
            return tuple(jax.tree.map(lambda w, i=i: w[i], whole) for i in range(found[0].shape[0]))
        return {name: walk(value, s[name]) if name in s else value for name, value in p.items()}

    return walk(model.bound(params), model.specs)


def prefill(
    model: Model, params: Any, batch: dict[str, jax.Array], length: int, slack: int = 0
) -> tuple[jax.Array, Cache]:
    """Read prompts (`tokens`, `positions` and `segments`, padded on the left) → logits `[B, V]` after each one's last
    token, and the cache of `length` slots, from which `extend` may go on by up to 1 + `slack` tokens at once."""
    rows = batch["tokens"].shape[0]
    cache = model.init_cache(rows, length, model.shard.dtype, slack)
    out = model.forward(params, batch, cache=cache)
    assert out.cache is not None
    return _logits(model, params, out.x_BTD[:, -1:])[:, 0], out.cache


def extend(
    model: Model, params: Any, cache: Cache, tokens_BT: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, Cache]:
    """Read on → logits `[B, T, V]` after each of the tokens, and the cache."""
    out = model.forward(params, dict(tokens=tokens_BT, positions=positions_BT), cache=cache)
    assert out.cache is not None
    return _logits(model, params, out.x_BTD), out.cache


def _logits(model: Model, params: Any, x_BTD: jax.Array) -> jax.Array:
    z_BTV = logits(model.readout(params, x_BTD), model.shard)
    return model.shard(z_BTV, None, None, None)


def whole_rows(model: Model) -> Model:
    """The model with every row on every device: any number of prompts then goes with any mesh."""
    shard = dataclasses.replace(model.shard, compute={**model.shard.compute, "batch": (), "seq": (), "stream": ()})
    return dataclasses.replace(model, shard=shard)


# ------------------------------------------------------------------------------------------------------------ batching


def bucket(n: int) -> int:
    """The next size that programs are made for: multiples of `BUCKET`, from four of them on four sizes an octave."""
    step = max(BUCKET, (1 << max(n - 1, 1).bit_length()) // 8)
    return -(-n // step) * step


def left_padded(prompts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """`tokens`, `positions`, `segments` `[B, P]`, with prompts at the right end."""
    places = bucket(max(map(len, prompts)))
    out = {name: np.zeros((len(prompts), places), np.int32) for name in ("tokens", "positions", "segments")}
    for i, p in enumerate(prompts):
        out["tokens"][i, places - len(p) :] = p
        out["positions"][i, places - len(p) :] = np.arange(len(p))
        out["segments"][i, places - len(p) :] = 1
    return out


def sources(texts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """What an encoder reads: `source`, `source_positions`, `source_segments` `[B, S]`, padded on the right."""
    places = bucket(max(map(len, texts)))
    out = {name: np.zeros((len(texts), places), np.int32) for name in ("source", "source_segments")}
    for i, p in enumerate(texts):
        out["source"][i, : len(p)], out["source_segments"][i, : len(p)] = p, 1
    return out | {"source_positions": np.broadcast_to(np.arange(places, dtype=np.int32), (len(texts), places))}
