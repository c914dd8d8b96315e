"""Beam search as Hugging Face defines it, so that the same settings give the same text.

B prompts, K beams, C candidates, N new tokens, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.inference import sampling
from jaxlm.inference.decode import extend, prefill, prepare
from jaxlm.inference.sampling import Sampling
from jaxlm.models.model import Model
from jaxlm.nn.cache import Cache

NEVER = -1e9  # the score of what isn't there


class How(NamedTuple):
    """What shapes the program."""

    beams: int
    ends: tuple[int, ...]
    length: int
    """Slots of the cache."""


def rules_of(s: Sampling) -> dict[str, Any]:
    """The numbers that don't shape the program."""
    return dict(
        most=np.int32(s.tokens),
        length_penalty=np.float32(s.length_penalty),
        at_once=np.bool_(s.early_stopping == "yes"),
        any_length=np.bool_(s.early_stopping == "never"),
    )


class Beams(struct.PyTreeNode):
    """Open hypotheses, and whole ones (`best_`), best first."""

    cache: Cache
    made: jax.Array
    tokens_BKN: jax.Array
    scores_BK: jax.Array
    """Log probabilities."""
    best_tokens_BKN: jax.Array
    best_lengths_BK: jax.Array
    best_scores_BK: jax.Array
    """Log probabilities over length^length_penalty."""
    found_BK: jax.Array
    open_B: jax.Array
    """Whether an open hypothesis may yet beat the whole ones."""


def search(
    model: Model,
    params: Any,
    batch: dict[str, jax.Array],
    knobs: dict[str, Any],
    allow_1V: jax.Array | None,
    rules: dict[str, jax.Array],
    *,
    how: How,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Best first, (tokens `[B, K, N]`, lengths `[B, K]` with the token that ended them, scores `[B, K]`).

    `rules` as `rules_of` makes them. Penalties work on log probabilities here, as in Hugging Face's beam search.
    """
    params = prepare(model, params)
    most, length_penalty = rules["most"], rules["length_penalty"]
    (B, P), K = batch["tokens"].shape, how.beams
    z_BV, cache = prefill(model, params, batch, how.length)
    V, N = z_BV.shape[1], how.length - P
    cache = cache.replace(layers=_rows(cache.layers, K), real_BS=jnp.repeat(cache.real_BS, K, axis=0))
    lengths_R = jnp.repeat((batch["segments"] > 0).sum(-1), K)
    prompt_BV = jnp.zeros((B, V), jnp.int32).at[jnp.arange(B)[:, None], batch["tokens"]].max(batch["segments"])

    def more(b: Beams) -> jax.Array:
        full = b.found_BK.all() & rules["at_once"]
        return (b.made < most) & b.open_B.any() & ~full

    def one(b: Beams) -> Beams:
        last_R1 = jax.lax.dynamic_slice_in_dim(b.tokens_BKN.reshape(B * K, N), b.made - 1, 1, axis=1)
        z_R1V, cache = extend(model, params, b.cache, last_R1, (lengths_R + b.made - 1)[:, None])
        return choose(b.replace(cache=cache), z_R1V.reshape(B, K, V))

    def choose(b: Beams, z_BKV: jax.Array) -> Beams:
        p_BKV = jax.nn.log_softmax(z_BKV, -1)
        counts_BKV = _counts(b.tokens_BKN, b.made, V) if knobs.keys() & PENALTIES else None
        seen_BKV = None if counts_BKV is None else (prompt_BV[:, None] + counts_BKV) > 0
        p_BKV = sampling.penalise(p_BKV, knobs, seen_BKV, counts_BKV)
        p_BKV = sampling.restrict(p_BKV.reshape(B * K, V), knobs, allow_1V, how.ends, b.made).reshape(B, K, V)
        total_BW = (p_BKV + b.scores_BK[..., None]).reshape(B, K * V)
        # Enough that K are left to go on from, if every hypothesis' likeliest tokens are all the ends.
        scores_BC, at_BC = jax.lax.top_k(total_BW, min(max(2, 1 + len(how.ends)) * K, K * V))
        from_BC, token_BC = at_BC // V, (at_BC % V).astype(jnp.int32)
        made = b.made + 1
        tokens_BCN = jnp.take_along_axis(b.tokens_BKN, from_BC[..., None], 1)
        tokens_BCN = jax.lax.dynamic_update_slice_in_dim(tokens_BCN, token_BC[..., None], b.made, axis=2)
        ended_BC = sampling.among(token_BC, how.ends) | (made >= most)

        # Of those that end, only the best K of all candidates count; the rest is there to go on from.
        whole_BC = ended_BC & (jnp.arange(ended_BC.shape[1])[None] < K)
        wanted_B = b.open_B & ~(b.found_BK.all(-1) & rules["at_once"])
        scaled_BC = jnp.where(whole_BC & wanted_B[:, None], scores_BC / made**length_penalty, NEVER)
        best_scores_BK, i = jax.lax.top_k(jnp.concatenate([b.best_scores_BK, scaled_BC], 1), K)
        found = best_scores_BK > NEVER
        best_tokens = jnp.take_along_axis(jnp.concatenate([b.best_tokens_BKN, tokens_BCN], 1), i[..., None], 1)
        lengths = jnp.concatenate([b.best_lengths_BK, jnp.full_like(token_BC, made)], 1)

        open_scores_BK, j = jax.lax.top_k(jnp.where(ended_BC, scores_BC + NEVER, scores_BC), K)
        rows_R = (jnp.arange(B)[:, None] * K + jnp.take_along_axis(from_BC, j, 1)).reshape(-1)
        longest = jnp.where(rules["any_length"] & (length_penalty > 0), most, made).astype(jnp.float32)
        least_B = jnp.where(found, best_scores_BK.min(-1, keepdims=True), NEVER).min(-1)
        return Beams(
            cache=b.cache.replace(layers=jax.tree.map(lambda x: _take(x, rows_R), b.cache.layers)),
            made=made,
            tokens_BKN=jnp.take_along_axis(tokens_BCN, j[..., None], 1),
            scores_BK=open_scores_BK,
            best_tokens_BKN=best_tokens,
            best_lengths_BK=jnp.take_along_axis(lengths, i, 1),
            best_scores_BK=best_scores_BK,
            found_BK=found,
            open_B=b.open_B & (open_scores_BK[:, 0] / longest**length_penalty > least_B),
        )

    none_BKN = jnp.zeros((B, K, N), jnp.int32)
    start = Beams(
        cache=cache,
        made=jnp.zeros((), jnp.int32),
        tokens_BKN=none_BKN,
        scores_BK=jnp.broadcast_to(jnp.where(jnp.arange(K) == 0, 0.0, NEVER), (B, K)),  # all are the prompt as yet
        best_tokens_BKN=none_BKN,
        best_lengths_BK=jnp.zeros((B, K), jnp.int32),
        best_scores_BK=jnp.full((B, K), NEVER),
        found_BK=jnp.zeros((B, K), bool),
        open_B=jnp.ones(B, bool),
    )
    first = choose(start, jnp.broadcast_to(z_BV[:, None], (B, K, V)))
    end = jax.lax.while_loop(more, one, first)
    return end.best_tokens_BKN, end.best_lengths_BK, end.best_scores_BK


PENALTIES = {"repetition_penalty", "presence_penalty", "frequency_penalty"}


def _counts(tokens_BKN: jax.Array, made: jax.Array, vocab: int) -> jax.Array:
    """How often each hypothesis has each token, `[B, K, V]`."""
    B, K, N = tokens_BKN.shape
    b, k = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    ones = jnp.broadcast_to(jnp.arange(N) < made, tokens_BKN.shape).astype(jnp.int32)
    return jnp.zeros((B, K, vocab), jnp.int32).at[b, k, tokens_BKN].add(ones)


def _rows(layers: Any, k: int) -> Any:
    return jax.tree.map(lambda x: jnp.repeat(x, k, axis=0, total_repeat_length=k * x.shape[0]), layers)


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.are_all_axes_explicit:
        return x.at[rows].get(out_sharding=jax.typeof(x).sharding)
    return jnp.take(x, rows, axis=0)
