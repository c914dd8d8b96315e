"""Chooses the next tokens of rows that each have settings of their own.

B rows, V vocabulary. `generate` chooses with the same functions of `sampling`, for rows that share their settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.inference import sampling

MOST_TOP = 20  # likeliest tokens that are told at most; as many as OpenAI's API allows


class RowSettings(struct.PyTreeNode):
    """The settings of rows as arrays, `[B, 1]`; those of tokens are `[B, V]`, or `[B, 1]` where no row has any."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    seed: Any
    """`[B]`, uint32; with the number of the answer among its request's and of the token it makes the row's key."""
    sample: Any
    num_generated: Any
    allowed: Any
    """Which tokens may be chosen."""
    bias: Any
    """Added to the logits."""
    seen: Any
    """Whether the prompt or the answer has a token."""
    counts: Any
    """How often the answer has it."""


class Chosen(struct.PyTreeNode):
    """The tokens chosen, `[B]`, and whether the row's logits were finite; log probabilities where they are noted."""

    tokens: jax.Array
    finite: jax.Array
    logprobs: jax.Array | None = None
    top: tuple[jax.Array, jax.Array] | None = None


@dataclass(frozen=True)
class Row:
    """A row holds the settings of one answer's next token, on the host."""

    settings: sampling.Sampling
    sample: int
    num_generated: int
    allowed_V: np.ndarray | None = None
    bias: Sequence[tuple[int, float]] = ()
    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()

    @property
    def is_plain(self) -> bool:
        """Says whether the likeliest token is chosen without further ado."""
        return not self.settings.temperature and not self.is_wide

    @property
    def is_wide(self) -> bool:
        """Says whether it has settings of single tokens."""
        return bool(self.bias) or self.needs_history or self.allowed_V is not None

    @property
    def needs_history(self) -> bool:
        """Says whether the choice depends on the tokens before."""
        s = self.settings
        return s.repetition_penalty != 1 or bool(s.presence_penalty or s.frequency_penalty)


def greedy(z_BV: jax.Array, used: int) -> Chosen:
    """Returns the likeliest of the first `used` tokens."""
    real_V = jnp.arange(z_BV.shape[-1]) < used
    z_BV = z_BV.astype(jnp.float32)
    tokens_B = sampling.likeliest(jnp.where(real_V[None], z_BV, -jnp.inf))
    return Chosen(tokens_B, jnp.isfinite(jnp.where(real_V[None], z_BV, 0)).all(-1))


def choose(z_BV: jax.Array, s: RowSettings, used: int, noted: bool) -> Chosen:
    """Returns the tokens that rows choose by their own settings."""
    model_BV = z_BV = z_BV.astype(jnp.float32)
    real_V = jnp.arange(z_BV.shape[-1]) < used
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    z_BV = sampling.penalise(z_BV, {name: getattr(s, name) for name in names}, s.seen, s.counts)
    z_BV = jnp.where(s.allowed & real_V[None], z_BV + s.bias, -jnp.inf)
    drawn_B = jax.lax.cond((s.temperature > 0).any(), _draw, lambda z_BV, s: sampling.likeliest(z_BV), z_BV, s)
    finite_B = jnp.isfinite(jnp.where(real_V[None], model_BV, 0)).all(-1)
    if not noted:
        return Chosen(drawn_B, finite_B)
    p_BV = jax.nn.log_softmax(model_BV, -1)
    logprobs_B = jnp.take_along_axis(p_BV, drawn_B[:, None], -1)[:, 0]
    top_BN, ids_BN = jax.lax.top_k(p_BV, min(MOST_TOP, p_BV.shape[-1]))
    return Chosen(drawn_B, finite_B, logprobs_B, (top_BN, ids_BN))


def _draw(z_BV: jax.Array, s: RowSettings) -> jax.Array:
    likeliest_B = sampling.likeliest(z_BV)
    z_BV = z_BV / jnp.where(s.temperature > 0, s.temperature, 1)
    z_BV = jax.lax.cond((s.top_k > 0).any(), lambda z: sampling.only_top_k(z, s.top_k), lambda z: z, z_BV)
    z_BV = jax.lax.cond((s.top_p < 1).any(), lambda z: sampling.only_top_p(z, s.top_p), lambda z: z, z_BV)
    z_BV = sampling.only_min_p(z_BV, s.min_p)
    keys_B = jax.vmap(_key)(s.seed, s.sample, s.num_generated)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, z_BV)
    return jnp.where(s.temperature[:, 0] > 0, drawn_B, likeliest_B).astype(jnp.int32)


def _key(seed: jax.Array, sample: jax.Array, num_generated: jax.Array) -> jax.Array:
    """Returns the key that `generate.choose` draws an answer's token with."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), num_generated), sample)


def arrays(rows: Sequence[Row | None], width: int) -> RowSettings:
    """Returns the settings of rows as arrays; a row of None chooses the likeliest token. `width` is the vocabulary, or
    1 where no row `is_wide`."""
    B = len(rows)
    neutral = sampling.Sampling()

    def column(name: str, dtype: Any = np.float32) -> np.ndarray:
        return np.array([[getattr(r.settings if r else neutral, name)] for r in rows], dtype)

    allowed_BV, seen_BV = np.ones((B, width), bool), np.zeros((B, width), bool)
    bias_BV, counts_BV = np.zeros((B, width), np.float32), np.zeros((B, width), np.int32)
    for i, r in enumerate(rows):
        if r is None:
            continue
        if r.allowed_V is not None:
            allowed_BV[i] = r.allowed_V
        for id, value in r.bias:
            bias_BV[i, id] = value
        if r.needs_history:
            seen_BV[i, list(r.prompt)] = True
            seen_BV[i, list(r.answer)] = True
            np.add.at(counts_BV[i], list(r.answer), 1)
    floats = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    return RowSettings(
        **{name: column(name) for name in floats},
        top_k=column("top_k", np.int32),
        seed=column("seed", np.uint32)[:, 0],
        sample=np.array([r.sample if r else 0 for r in rows], np.int32),
        num_generated=np.array([r.num_generated if r else 0 for r in rows], np.int32),
        allowed=allowed_BV, bias=bias_BV, seen=seen_BV, counts=counts_BV,
    )  # fmt: skip
