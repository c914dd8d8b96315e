"""The next token is chosen here from logits: penalties, temperature, top-k, top-p, min-p.

B rows, V vocabulary, K candidates that are left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.core import config_io
from jaxlm.core.ranges import Count, Finite, Natural, NonNegative, Positive, PositiveShare, Share


@dataclass(frozen=True)
class Sampling:
    """These settings say how text is generated. Token ids are the tokenizer's."""

    tokens: Count = 128
    """The most new tokens of an answer."""
    min_tokens: Natural = 0
    """An answer has at least so many new tokens before it may end."""
    length: Count | None = None
    """The most tokens of a prompt and its answer together; an encoder-decoder's prompt is its start token. None: only
    `tokens` counts."""
    min_length: Natural = 0
    """A prompt and its answer together have at least so many tokens before the answer may end."""
    temperature: NonNegative = 0.0
    """Logits are divided by it; 0 is greedy: always the likeliest token."""
    top_k: Natural = 0
    """Draw from the k likeliest tokens; 0 draws from all."""
    top_p: PositiveShare = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    min_p: Share = 0.0
    """Leave out tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: Positive = 1.0
    """Divides positive logits of tokens in the prompt and the answer, multiplies negative ones (Keskar et al. 2019)."""
    presence_penalty: Finite = 0.0
    """Subtracted from the logit of each token that the answer has."""
    frequency_penalty: Finite = 0.0
    """Subtracted from the logit of a token for each time the answer has it."""
    no_repeat_ngram: Natural = 0
    """No so many tokens in a row come twice in a prompt and its answer; 0 allows all."""
    beams: Count = 1
    """Beam search keeps so many hypotheses; 1 is no beam search."""
    length_penalty: Finite = 1.0
    """Beam search divides a hypothesis' log probability by its length to this power."""
    early_stopping: Literal["no", "yes", "never"] = "no"
    """Beam search ends a prompt with `beams` whole hypotheses if none can become better by the best score so far (no),
    at once (yes), or if none can become better at any length (never)."""
    samples: Count = 1
    """Answers for each prompt."""
    stop: tuple[str, ...] = ()
    """Text that ends an answer; it is cut off."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end an answer, besides the model's own."""
    allowed_ids: tuple[int, ...] = ()
    """These tokens and those that end an answer are the only ones chosen; empty allows all."""
    banned_ids: tuple[int, ...] = ()
    """These tokens are never chosen."""
    first_id: Natural | None = None
    """An answer to a prompt of one token, such as an encoder-decoder's start, begins with this one."""
    last_id: Natural | None = None
    """An answer that becomes as long as it may ends with this token."""
    regex: str | None = None
    """The answer matches this regular expression as a whole."""
    json_schema: str | None = None
    """The answer is JSON of this schema."""
    logprobs: Natural | None = None
    """Log probabilities of the chosen tokens, and of so many of the likeliest ones at each position."""
    seed: Natural = 0


def check(s: Sampling, vocab: int) -> None:
    """Raises a ValueError that names the first setting that is out of range or contradicts another."""
    config_io.check(s, "sampling.")
    for name in ("top_k", "logprobs"):
        if (getattr(s, name) or 0) > vocab:
            raise ValueError(f"sampling.{name}: {getattr(s, name)} is out of range; the vocabulary has {vocab} tokens")
    for name in ("stop_ids", "allowed_ids", "banned_ids"):
        for id in getattr(s, name):
            if not 0 <= id < vocab:
                raise ValueError(f"sampling.{name}: {id} is not a token; the vocabulary has {vocab}")
    for name in ("first_id", "last_id"):
        if (getattr(s, name) or 0) >= vocab:
            raise ValueError(f"sampling.{name}: {getattr(s, name)} is not a token; the vocabulary has {vocab}")
    if any(not text for text in s.stop):
        raise ValueError("sampling.stop: an empty text would end every answer at once; leave it out")
    if s.beams > 1:
        if s.temperature or s.samples > s.beams:
            what = "temperature above 0" if s.temperature else f"{s.samples} samples of {s.beams} beams"
            raise ValueError(f"sampling.beams: beam search does not go with {what}; set beams=1 or leave that out")
    elif s.samples > 1 and not s.temperature:
        raise ValueError("sampling.samples: greedy answers are all the same; set temperature above 0")


def capped(s: Sampling, prompts: Sequence[Sequence[int]]) -> Sampling:
    """Returns the settings with `tokens` as many as the answer to the shortest prompt may have.

    Raises a ValueError where a prompt leaves no room for an answer.
    """
    if s.length is None or not prompts:
        return s
    if (longest := max(map(len, prompts))) >= s.length:
        raise ValueError(
            f"sampling.length: a prompt has {longest} tokens, and prompt and answer may have {s.length} together; "
            "set `tokens`, or raise `length`"
        )
    return replace(s, tokens=min(s.tokens, s.length - min(map(len, prompts))))


def num_places(s: Sampling, prompts: Sequence[Sequence[int]]) -> int:
    """Returns how many tokens the longest prompt and its answer may have together."""
    need = max(map(len, prompts)) + s.tokens
    return need if s.length is None else min(need, s.length)


def room(s: Sampling) -> int:
    """Returns how many places had best be free for an answer: `tokens`, or where these may be as many as prompt and
    answer together, half of those and no more than usual."""
    return s.tokens if s.length is None else max(1, min(s.tokens, s.length // 2, Sampling.tokens))


def answer_limits(
    numeric_settings: dict[str, Any], prompt_lengths_B: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns the least and the most new tokens of each row's answer, `[B]`; None where nothing is asked for."""
    least_B = most_B = None
    if numeric_settings.keys() & {"min_tokens", "min_length"}:
        by_length_B = numeric_settings.get("min_length", 0) - prompt_lengths_B
        least_B = jnp.maximum(by_length_B, numeric_settings.get("min_tokens", 0))
    if "length" in numeric_settings:
        most_B = numeric_settings["length"] - prompt_lengths_B
    return least_B, most_B


def numeric_settings(s: Sampling) -> dict[str, float]:
    """Returns the numeric settings that differ from their neutral values, by name.

    They are arguments of the program, so that another value doesn't compile it again.
    """
    neutral: dict[str, float | None] = dict(temperature=0.0, top_p=1.0, min_p=0.0)
    neutral |= dict(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, min_tokens=0)
    neutral |= dict(length=None, min_length=0, first_id=None, last_id=None)
    used = {name: getattr(s, name) for name, value in neutral.items() if getattr(s, name) != value}
    used |= {"tokens": s.tokens} if s.last_id is not None else {}
    return used if s.temperature else {k: v for k, v in used.items() if k not in ("top_p", "min_p")}


def penalise(
    z_BV: jax.Array, numeric_settings: dict[str, Any], seen_BV: jax.Array | None, counts_BV: jax.Array | None
) -> jax.Array:
    """Applies the penalties among `numeric_settings` to logits `[…, V]`.

    `seen_BV` says which tokens the prompt and the answer have (repetition penalty, Keskar et al. 2019), `counts_BV` how
    often the answer has each token (presence and frequency penalty).
    """
    if "repetition_penalty" in numeric_settings:
        assert seen_BV is not None
        factor = numeric_settings["repetition_penalty"]
        z_BV = jnp.where(seen_BV, jnp.where(z_BV < 0, z_BV * factor, z_BV / factor), z_BV)
    if "presence_penalty" in numeric_settings:
        assert counts_BV is not None
        z_BV = z_BV - numeric_settings["presence_penalty"] * (counts_BV > 0).astype(z_BV.dtype)
    if "frequency_penalty" in numeric_settings:
        assert counts_BV is not None
        z_BV = z_BV - numeric_settings["frequency_penalty"] * counts_BV.astype(z_BV.dtype)
    return z_BV


def restrict(
    z_BV: jax.Array,
    numeric_settings: dict[str, Any],
    allowed_BV: jax.Array | None,
    end_ids: tuple[int, ...],
    num_generated: Any,
    prompt_lengths_B: jax.Array,
) -> jax.Array:
    """Sets the logits of tokens that may not be chosen to -inf.

    `allowed_BV` is bool `[B or 1, V]`; None allows all. Where an answer is shorter than it must be, no token of
    `end_ids` may be chosen. `first_id` and `last_id` are the only choice at their places, as transformers has it.
    """
    ids_V = jnp.arange(z_BV.shape[-1])
    if allowed_BV is not None:
        z_BV = jnp.where(allowed_BV, z_BV, -jnp.inf)
    least_B, most_B = answer_limits(numeric_settings, prompt_lengths_B)
    if least_B is not None and end_ids:
        early_BV = (num_generated < least_B)[:, None] & is_any_of(ids_V, end_ids)[None]
        z_BV = jnp.where(early_BV, -jnp.inf, z_BV)
    if "first_id" in numeric_settings:
        z_BV = _only(z_BV, ids_V == numeric_settings["first_id"], (num_generated == 0) & (prompt_lengths_B == 1))
    if "last_id" in numeric_settings:
        most = numeric_settings["tokens"] if most_B is None else jnp.minimum(most_B, numeric_settings["tokens"])
        z_BV = _only(z_BV, ids_V == numeric_settings["last_id"], jnp.atleast_1d(num_generated == most - 1))
    return z_BV


def _only(z_BV: jax.Array, chosen_V: jax.Array, where_B: jax.Array) -> jax.Array:
    """Returns the logits with a certain choice in some rows."""
    return jnp.where(where_B[:, None], jnp.where(chosen_V, 0.0, -jnp.inf)[None], z_BV)


def forbid_repeats(z_BV: jax.Array, history_BH: jax.Array, real_BH: jax.Array, end: Any, n: int) -> jax.Array:
    """Sets the logits of tokens to -inf that would end `n` tokens in a row which a row's history has already.

    `history_BH` is read up to `end`; `real_BH` says which places hold a token of the prompt or the answer.
    """
    B, H = history_BH.shape
    places_H = jnp.arange(H)
    met_BH = (
        real_BH & (places_H < end)[None]
    )  # whether the n - 1 tokens before a place are those before `end`, all real
    for k in range(1, n):
        last_B1 = jax.lax.dynamic_slice_in_dim(history_BH, jnp.maximum(end - k, 0), 1, axis=1)
        before_BH, real_before_BH = (jnp.roll(x, k, axis=1) for x in (history_BH, real_BH))
        met_BH &= (before_BH == last_B1) & real_before_BH & (places_H >= k)[None]
    banned_BV = jnp.zeros(z_BV.shape, bool).at[jnp.arange(B)[:, None], history_BH].max(met_BH)
    return jnp.where(banned_BV, -jnp.inf, z_BV)


def is_any_of(ids: jax.Array, these: tuple[int, ...]) -> jax.Array:
    """Returns, for each id, whether it is one of `these`."""
    return jnp.isin(ids, jnp.asarray(these, jnp.int32)) if these else jnp.zeros(ids.shape, bool)


def candidates(z_BV: jax.Array, numeric_settings: dict[str, Any], top_k: int) -> tuple[jax.Array, jax.Array | None]:
    """Returns the logits of the tokens that may be drawn, `[B, K]`, and their ids; -inf marks those that may not.

    The ids are None where K is the whole vocabulary.
    """
    z, ids = z_BV / numeric_settings["temperature"], None
    if top_k:
        z, ids = jax.lax.top_k(z, top_k)
    if "top_p" in numeric_settings:
        z = only_top_p(z, numeric_settings["top_p"])
    if "min_p" in numeric_settings:
        z = only_min_p(z, numeric_settings["min_p"])
    return z, ids


def only_top_k(z_BV: jax.Array, top_k: Any) -> jax.Array:
    """Returns logits without those below the `top_k`th of each row, `[B, 1]`; 0 keeps all. Equals stay together."""
    high_BV = _ordered(z_BV)
    counts = lambda at_B1: (high_BV >= at_B1).sum(-1, keepdims=True)  # noqa: E731
    k_B1 = jnp.where(top_k > 0, top_k, z_BV.shape[-1])
    return jnp.where(high_BV < _highest(lambda at_B1: counts(at_B1) >= k_B1, z_BV.shape[0]), -jnp.inf, z_BV)


def only_top_p(z: jax.Array, top_p: Any) -> jax.Array:
    """Returns logits without those below the one whose probability crosses the share `top_p` in order of likelihood."""
    p = jax.nn.softmax(z, -1)
    high = _ordered(p)
    shares = lambda at_B1: jnp.where(high >= at_B1, p, 0.0).sum(-1, keepdims=True)  # noqa: E731
    return jnp.where(high < _highest(lambda at_B1: shares(at_B1) >= top_p, p.shape[0]), -jnp.inf, z)


def only_min_p(z: jax.Array, min_p: Any) -> jax.Array:
    """Returns logits without those of tokens less likely than a share `min_p` of the likeliest one's probability."""
    return jnp.where(z < z.max(-1, keepdims=True) + jnp.log(min_p), -jnp.inf, z)


def _ordered(x: jax.Array) -> jax.Array:
    """Returns uint32 numbers that are ordered as float32 ones are."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _highest(holds: Any, rows: int) -> jax.Array:
    """Returns the highest of `_ordered`'s numbers at which `holds` is true, `[B, 1]`, by bisection.

    `holds` is true of 0, and of no number above one of which it is false. 32 sums find the number exactly, where a sort
    of a vocabulary took 4 times as long.
    """

    def halve(i: Any, low_B1: jax.Array) -> jax.Array:
        higher_B1 = low_B1 | (jnp.uint32(1) << (31 - jnp.uint32(i)))
        return jnp.where(holds(higher_B1), higher_B1, low_B1)

    return jax.lax.fori_loop(0, 32, halve, jnp.zeros((rows, 1), jnp.uint32))


def likeliest(z: jax.Array) -> jax.Array:
    """Returns the first place of the highest logit along the last axis, 0 where there is a NaN. XLA's argmax takes 6
    times as long on a CPU."""
    places = jnp.arange(z.shape[-1], dtype=jnp.int32).reshape((1,) * (z.ndim - 1) + (-1,))
    first = jnp.where(z == z.max(-1, keepdims=True), places, z.shape[-1]).min(-1)
    return jnp.where(first < z.shape[-1], first, 0)


def pick(z_BV: jax.Array, keys_B: jax.Array | None, numeric_settings: dict[str, Any], top_k: int) -> jax.Array:
    """Returns one token for each row, `[B]`, drawn with the row's own key; the likeliest without a temperature."""
    if "temperature" not in numeric_settings:
        return likeliest(z_BV)
    assert keys_B is not None
    z_BK, ids_BK = candidates(z_BV, numeric_settings, top_k)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, z_BK)
    if ids_BK is not None:
        drawn_B = jnp.take_along_axis(ids_BK, drawn_B[:, None], -1)[:, 0]
    return drawn_B.astype(jnp.int32)


def probabilities(z_BV: jax.Array, numeric_settings: dict[str, Any], top_k: int) -> jax.Array:
    """Returns the distribution that `pick` draws from, `[B, V]`."""
    if "temperature" not in numeric_settings:
        return jax.nn.one_hot(jnp.argmax(z_BV, -1), z_BV.shape[-1], dtype=jnp.float32)
    z_BK, ids_BK = candidates(z_BV, numeric_settings, top_k)
    p_BK = jax.nn.softmax(z_BK, -1)
    if ids_BK is None:
        return p_BK
    return jnp.zeros(z_BV.shape, p_BK.dtype).at[jnp.arange(len(z_BV))[:, None], ids_BK].set(p_BK)
