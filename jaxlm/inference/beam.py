"""Beam search is defined here as in Hugging Face's library, so that the same settings give the same text.

B prompts, K beams, C candidates, N new tokens, V vocabulary, R = B × K hypotheses.
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

IMPOSSIBLE = -1e9  # the score of a hypothesis that doesn't exist
PENALTIES = {"repetition_penalty", "presence_penalty", "frequency_penalty"}


class BeamPlan(NamedTuple):
    """A beam plan holds the settings that shape the program; another value compiles it again."""

    beams: int
    end_ids: tuple[int, ...]
    length: int
    """This is the number of the cache's slots."""
    logprobs: int | None = None
    """So many of the likeliest tokens are noted at each position, with the model's log probabilities; None: none."""
    no_repeat_ngram: int = 0


def beam_rules(s: Sampling) -> dict[str, Any]:
    """Returns the settings that don't shape the program, as arrays that the program takes as arguments."""
    return dict(
        max_tokens=np.int32(s.tokens),
        length_penalty=np.float32(s.length_penalty),
        stop_when_full=np.bool_(s.early_stopping == "yes"),
        any_length=np.bool_(s.early_stopping == "never"),
    )


class Beams(struct.PyTreeNode):
    """The state of a search holds K open hypotheses and the K best finished ones (`best_`) of each prompt, best first.

    `scores_BK` are log probabilities, `best_scores_BK` log probabilities over length^length_penalty. `exists_BK` says
    which places of the finished hypotheses are taken, `open_B` whether an open one may yet beat the finished ones.
    `notes` are what is known of each token, arrays `[B, K, N, …]` by name: see `_notes`.
    """

    cache: Cache
    num_generated: jax.Array
    tokens_BKN: jax.Array
    scores_BK: jax.Array
    best_tokens_BKN: jax.Array
    best_lengths_BK: jax.Array
    best_scores_BK: jax.Array
    exists_BK: jax.Array
    open_B: jax.Array
    notes: dict[str, jax.Array]
    best_notes: dict[str, jax.Array]


class _Settings(NamedTuple):
    """All that the choice of the next tokens depends on besides the state and the logits."""

    plan: BeamPlan
    numeric_settings: dict[str, Any]
    allowed_1V: jax.Array | None
    rules: dict[str, jax.Array]
    prompt_BV: jax.Array
    """It says which tokens each prompt has."""
    prompt: tuple[jax.Array, jax.Array]
    """Each prompt and which of its places are real, `[B, P]`."""
    prompt_lengths_B: jax.Array
    most_B: jax.Array
    """The most new tokens of each prompt's answer."""


def search(
    model: Model,
    params: Any,
    batch: dict[str, jax.Array],
    numeric_settings: dict[str, Any],
    allowed_1V: jax.Array | None,
    rules: dict[str, jax.Array],
    *,
    plan: BeamPlan,
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
    """Returns the best finished hypotheses of each prompt, best first: (tokens, lengths, scores, notes).

    Tokens are `[B, K, N]`, lengths `[B, K]` with the token that ended each, scores `[B, K]`; for notes see `_notes`.
    `rules` are made by `beam_rules`. Penalties work on log probabilities here, as in Hugging Face's beam search.
    """
    params = prepare(model, params)
    (B, P), K = batch["tokens"].shape, plan.beams
    z_BV, cache = prefill(model, params, batch, plan.length)
    V, N = z_BV.shape[1], plan.length - P
    cache = cache.replace(layers=_repeat(cache.layers, K), real_BS=jnp.repeat(cache.real_BS, K, axis=0))
    real_BP = batch["segments"] > 0
    prompt_lengths_B = real_BP.sum(-1)
    prompt_lengths_R = jnp.repeat(prompt_lengths_B, K)
    most_B = jnp.broadcast_to(rules["max_tokens"], (B,))
    if (by_length_B := sampling.answer_limits(numeric_settings, prompt_lengths_B)[1]) is not None:
        most_B = jnp.minimum(most_B, by_length_B)
    prompt_BV = jnp.zeros((B, V), jnp.int32).at[jnp.arange(B)[:, None], batch["tokens"]].max(batch["segments"])
    prompt = (batch["tokens"], real_BP)
    settings = _Settings(plan, numeric_settings, allowed_1V, rules, prompt_BV, prompt, prompt_lengths_B, most_B)

    def unfinished(b: Beams) -> jax.Array:
        full = b.exists_BK.all() & rules["stop_when_full"]
        return (b.num_generated < rules["max_tokens"]) & b.open_B.any() & ~full

    def step(b: Beams) -> Beams:
        last_R1 = jax.lax.dynamic_slice_in_dim(b.tokens_BKN.reshape(B * K, N), b.num_generated - 1, 1, axis=1)
        positions_R1 = (prompt_lengths_R + b.num_generated - 1)[:, None]
        z_R1V, cache = extend(model, params, b.cache, last_R1, positions_R1)
        return _choose(b.replace(cache=cache), z_R1V.reshape(B, K, V), settings)

    first = _choose(_start(cache, B, K, N, plan.logprobs), jnp.broadcast_to(z_BV[:, None], (B, K, V)), settings)
    end = jax.lax.while_loop(unfinished, step, first)
    return end.best_tokens_BKN, end.best_lengths_BK, end.best_scores_BK, end.best_notes


def _start(cache: Cache, B: int, K: int, N: int, logprobs: int | None) -> Beams:
    tokens_BKN = jnp.zeros((B, K, N), jnp.int32)
    notes: dict[str, jax.Array] = {}
    if logprobs is not None:
        notes["logprobs"] = jnp.zeros((B, K, N), jnp.float32)
    if logprobs:
        likeliest = jnp.zeros((B, K, N, logprobs), jnp.float32)
        notes |= dict(top=likeliest, top_ids=likeliest.astype(jnp.int32))
    return Beams(
        cache=cache,
        num_generated=jnp.zeros((), jnp.int32),
        tokens_BKN=tokens_BKN,
        # All K hypotheses are still the bare prompt, so only the first of them counts.
        scores_BK=jnp.broadcast_to(jnp.where(jnp.arange(K) == 0, 0.0, IMPOSSIBLE), (B, K)),
        best_tokens_BKN=tokens_BKN,
        best_lengths_BK=jnp.zeros((B, K), jnp.int32),
        best_scores_BK=jnp.full((B, K), IMPOSSIBLE),
        exists_BK=jnp.zeros((B, K), bool),
        open_B=jnp.ones(B, bool),
        notes=notes,
        best_notes=notes,
    )


def _notes(z_BKV: jax.Array, parent_BC: jax.Array, token_BC: jax.Array, most: int | None) -> dict[str, jax.Array]:
    """Returns what is noted of each candidate's token, `[B, C, …]`: the model's own log probability of it, `logprobs`,
    and those of the likeliest, `top`, with their ids, `top_ids`."""
    if most is None:
        return {}
    p_BCV = jnp.take_along_axis(jax.nn.log_softmax(z_BKV, -1), parent_BC[..., None], 1)
    out = dict(logprobs=jnp.take_along_axis(p_BCV, token_BC[..., None], -1)[..., 0])
    if most:
        out["top"], out["top_ids"] = jax.lax.top_k(p_BCV, most)
    return out


def _pick(x: jax.Array, indices_BX: jax.Array) -> jax.Array:
    """Returns the entries of `[B, Y, …]` at `[B, X]` along its second axis."""
    return jnp.take_along_axis(x, indices_BX.reshape(*indices_BX.shape, *[1] * (x.ndim - 2)), 1)


def _choose(b: Beams, z_BKV: jax.Array, settings: _Settings) -> Beams:
    """Extends every hypothesis by its likeliest next tokens and keeps the best K open and the best K finished ones."""
    plan, rules, length_penalty = settings.plan, settings.rules, settings.rules["length_penalty"]
    B, K, V = z_BKV.shape
    total_BW = (_log_probabilities(b, z_BKV, settings) + b.scores_BK[..., None]).reshape(B, K * V)
    # So many candidates leave K to go on from even if every hypothesis' likeliest tokens are all the end tokens.
    scores_BC, flat_BC = jax.lax.top_k(total_BW, min(max(2, 1 + len(plan.end_ids)) * K, K * V))
    parent_BC, token_BC = flat_BC // V, (flat_BC % V).astype(jnp.int32)
    num_generated = b.num_generated + 1
    tokens_BCN = jnp.take_along_axis(b.tokens_BKN, parent_BC[..., None], 1)
    tokens_BCN = jax.lax.dynamic_update_slice_in_dim(tokens_BCN, token_BC[..., None], b.num_generated, axis=2)
    new = _notes(z_BKV, parent_BC, token_BC, plan.logprobs)
    notes = {
        name: jax.lax.dynamic_update_slice_in_dim(_pick(x, parent_BC), new[name][:, :, None], b.num_generated, axis=2)
        for name, x in b.notes.items()
    }
    ended_BC = sampling.is_any_of(token_BC, plan.end_ids) | (num_generated >= settings.most_B)[:, None]

    # An ended candidate counts only among the best K of all; the others are there to go on from.
    finished_BC = ended_BC & (jnp.arange(ended_BC.shape[1])[None] < K)
    wanted_B = b.open_B & ~(b.exists_BK.all(-1) & rules["stop_when_full"])
    scaled_BC = jnp.where(finished_BC & wanted_B[:, None], scores_BC / num_generated**length_penalty, IMPOSSIBLE)
    best_scores_BK, i = jax.lax.top_k(jnp.concatenate([b.best_scores_BK, scaled_BC], 1), K)
    exists_BK = best_scores_BK > IMPOSSIBLE
    best_tokens = jnp.take_along_axis(jnp.concatenate([b.best_tokens_BKN, tokens_BCN], 1), i[..., None], 1)
    lengths = jnp.concatenate([b.best_lengths_BK, jnp.full_like(token_BC, num_generated)], 1)

    open_scores_BK, j = jax.lax.top_k(jnp.where(ended_BC, scores_BC + IMPOSSIBLE, scores_BC), K)
    parent_R = (jnp.arange(B)[:, None] * K + jnp.take_along_axis(parent_BC, j, 1)).reshape(-1)
    longest_B = jnp.where(rules["any_length"] & (length_penalty > 0), settings.most_B, num_generated)
    worst_B = jnp.where(exists_BK, best_scores_BK.min(-1, keepdims=True), IMPOSSIBLE).min(-1)
    return Beams(
        cache=b.cache.replace(layers=jax.tree.map(lambda x: _take(x, parent_R), b.cache.layers)),
        num_generated=num_generated,
        tokens_BKN=jnp.take_along_axis(tokens_BCN, j[..., None], 1),
        scores_BK=open_scores_BK,
        best_tokens_BKN=best_tokens,
        best_lengths_BK=jnp.take_along_axis(lengths, i, 1),
        best_scores_BK=best_scores_BK,
        exists_BK=exists_BK,
        notes={name: _pick(x, j) for name, x in notes.items()},
        best_notes={name: _pick(jnp.concatenate([x, notes[name]], 1), i) for name, x in b.best_notes.items()},
        open_B=b.open_B
        & (num_generated < settings.most_B)
        & (open_scores_BK[:, 0] / longest_B.astype(jnp.float32) ** length_penalty > worst_B),
    )


def _log_probabilities(b: Beams, z_BKV: jax.Array, settings: _Settings) -> jax.Array:
    """Returns `[B, K, V]`, with penalties subtracted and -inf where a token is not allowed."""
    (B, K, V), numeric_settings = z_BKV.shape, settings.numeric_settings
    p_BKV = jax.nn.log_softmax(z_BKV, -1)
    counts_BKV = _counts(b.tokens_BKN, b.num_generated, V) if numeric_settings.keys() & PENALTIES else None
    seen_BKV = None if counts_BKV is None else (settings.prompt_BV[:, None] + counts_BKV) > 0
    p_RV = sampling.penalise(p_BKV, numeric_settings, seen_BKV, counts_BKV).reshape(B * K, V)
    at, end_ids = b.num_generated, settings.plan.end_ids
    if n := settings.plan.no_repeat_ngram:
        tokens_RN = b.tokens_BKN.reshape(B * K, -1)
        prompt_RP, real_RP = (jnp.repeat(x, K, axis=0) for x in settings.prompt)
        history_RH = jnp.concatenate([prompt_RP, tokens_RN], 1)
        real_RH = jnp.concatenate([real_RP, jnp.ones(tokens_RN.shape, bool)], 1)
        p_RV = sampling.forbid_repeats(p_RV, history_RH, real_RH, prompt_RP.shape[1] + at, n)
    prompt_lengths_R = jnp.repeat(settings.prompt_lengths_B, K)
    p_RV = sampling.restrict(p_RV, numeric_settings, settings.allowed_1V, end_ids, at, prompt_lengths_R)
    return p_RV.reshape(B, K, V)


def _counts(tokens_BKN: jax.Array, num_generated: jax.Array, vocab: int) -> jax.Array:
    """Counts how often each hypothesis has each token, `[B, K, V]`."""
    B, K, N = tokens_BKN.shape
    b, k = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    ones = jnp.broadcast_to(jnp.arange(N) < num_generated, tokens_BKN.shape).astype(jnp.int32)
    return jnp.zeros((B, K, vocab), jnp.int32).at[b, k, tokens_BKN].add(ones)


def _repeat(layers: Any, times: int) -> Any:
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0, total_repeat_length=times * x.shape[0]), layers)


def _take(x: jax.Array, indices: jax.Array) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.are_all_axes_explicit:  # a plain gather raises on explicit axes
        return x.at[indices].get(out_sharding=jax.typeof(x).sharding)
    return jnp.take(x, indices, axis=0)
