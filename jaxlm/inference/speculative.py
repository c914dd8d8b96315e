"""Speculative decoding (Leviathan et al. 2023): a cheap draft proposes tokens, one call of the model judges them all.

Exact: greedy answers are those of plain decoding, sampled ones follow the model's own distribution. Rows advance
together, by the fewest tokens that any unfinished row got, so that all write to the same slots of the cache.

B rows, P prompt places, N new tokens, k proposals, T = k + 1, H = P + N + T, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.inference import sampling
from jaxlm.inference.decode import bucket, extend, prefill, prepare
from jaxlm.inference.generate import Completion, Generator, Plan, completion_of
from jaxlm.inference.sampling import Sampling
from jaxlm.nn.cache import Cache

# What changes the distribution with what was said, which a draft would have to follow.
PLAIN = (
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "regex",
    "json_schema",
    "logprobs",
)


class Draft(struct.PyTreeNode):
    """Answers in the making."""

    cache: Cache
    drafts: Cache | None
    """The draft model's; None: proposals are looked up in what was said."""
    key: jax.Array
    made: jax.Array
    rounds: jax.Array
    """Calls of the model."""
    lengths_B: jax.Array
    done_B: jax.Array
    ends_B: jax.Array
    history_BH: jax.Array


class Answers(NamedTuple):
    completions: list[list[Completion]]
    rounds: int
    """Calls of the model after the prompt; plain decoding takes one for each token."""


class Speculative:
    """`target` decodes with `draft`'s proposals; without a draft they are what followed the last two tokens before."""

    def __init__(self, target: Generator, draft: Generator | None = None, proposals: int = 4) -> None:
        if proposals < 1:
            raise ValueError(f"speculative: {proposals} proposals; give at least 1")
        if draft is not None and draft.model.config.vocab != target.model.config.vocab:
            raise ValueError(
                f"speculative: the draft's vocabulary has {draft.model.config.vocab} tokens and the model's "
                f"{target.model.config.vocab}; use a draft with the same tokenizer"
            )
        self.target, self.draft, self.k = target, draft, proposals
        self._run = jax.jit(self._run_, static_argnames=("plan", "length"))

    def __call__(self, params: Any, draft_params: Any, prompts: Sequence[Sequence[int]], s: Sampling) -> Answers:
        """One answer for each prompt. `draft_params`: None without a draft."""
        if s.beams > 1 or s.samples > 1 or any(getattr(s, name) != getattr(Sampling(), name) for name in PLAIN):
            raise ValueError(f"speculative: does not go with beams, samples, {', '.join(PLAIN)}; leave them out")
        plan, batch = self.target.plan(s), self.target.batch(prompts, s.tokens)
        length = bucket(batch["tokens"].shape[1] + s.tokens + self.k + 1)
        knobs, allow_1V = sampling.knobs(s), self.target.allowed(s)
        state = self._run(
            params, draft_params, batch, jax.random.key(s.seed), knobs, allow_1V, np.int32(s.tokens), plan=plan,
            length=length,
        )  # fmt: skip
        tokens, ends, rounds = jax.device_get((state.history_BH, state.ends_B, state.rounds))
        tokens, ends = tokens[:, batch["tokens"].shape[1] :], np.minimum(ends, s.tokens)
        return Answers([[completion_of(i, plan.ends, tokens, ends)] for i in range(len(prompts))], int(rounds))

    def _run_(
        self, params: Any, draft_params: Any, batch: dict, key: Any, knobs: dict, allow_1V: Any, most: Any, *,
        plan: Plan, length: int,
    ) -> Draft:  # fmt: skip
        params = prepare(self.target.model, params)
        z_BV, cache = prefill(self.target.model, params, batch, length, self.k)
        drafts = None
        if self.draft is not None:
            draft_params = prepare(self.draft.model, draft_params)
            _, drafts = prefill(self.draft.model, draft_params, batch, length, self.k)
        (B, P), T = batch["tokens"].shape, self.k + 1
        keys_B = jax.random.split(jax.random.fold_in(key, 0), B)
        first_B = sampling.pick(_restricted(z_BV, allow_1V), keys_B, knobs, plan.top_k)
        history_BH = jnp.zeros((B, length + T), jnp.int32).at[:, :P].set(batch["tokens"]).at[:, P].set(first_B)
        one = jnp.ones((), jnp.int32)
        state = Draft(
            cache, drafts, key, one, one - 1, (batch["segments"] > 0).sum(-1),
            sampling.among(first_B, plan.ends), jnp.ones(B, jnp.int32), history_BH,
        )  # fmt: skip

        def more(state: Draft) -> jax.Array:
            return (state.made < most) & ~state.done_B.all()

        step = partial(self._round, params, draft_params, P, knobs, allow_1V, plan)
        return jax.lax.while_loop(more, step, state)

    def _round(self, params: Any, draft_params: Any, P: int, knobs: dict, allow_1V: Any, plan: Plan, s: Draft) -> Draft:
        B, T, at = len(s.done_B), self.k + 1, P + s.made - 1
        draft_key, accept_key, last_key = jax.random.split(jax.random.fold_in(s.key, s.made), 3)
        places_BT = (s.lengths_B + s.made - 1)[:, None] + jnp.arange(T)[None]
        chances = partial(_chances, allow_1V=allow_1V, knobs=knobs, top_k=plan.top_k)
        if self.draft is None:
            drafts, d_BT = None, self._looked_up(s.history_BH, at, P - s.lengths_B)
            q_BTV = jax.nn.one_hot(d_BT, self.target.model.config.vocab, dtype=jnp.float32)
        else:
            drafts, d_BT, q_BTV = self._drafted(draft_params, s, at, places_BT, chances, draft_key)
        last_B1 = jax.lax.dynamic_slice_in_dim(s.history_BH, at, 1, axis=1)
        read_BT = jnp.concatenate([last_B1, d_BT[:, :-1]], 1)
        z_BTV, cache = extend(self.target.model, params, s.cache, read_BT, places_BT)
        p_BTV = chances(z_BTV.reshape(B * T, -1)).reshape(z_BTV.shape)

        # Proposal i is judged by what the model says after i of them; the last of the T has none.
        q_BTV = q_BTV * (jnp.arange(T) < self.k)[None, :, None]
        p_BT, q_BT = (jnp.take_along_axis(x, d_BT[..., None], -1)[..., 0] for x in (p_BTV, q_BTV))
        kept_BT = (jax.random.uniform(accept_key, (B, T)) * q_BT < p_BT) & (jnp.arange(T) < self.k)[None]
        accepted_B = jnp.cumprod(kept_BT.astype(jnp.int32), -1).sum(-1)
        new = jnp.where(s.done_B, T, accepted_B + 1).min()
        # A row that ends here with a refused proposal draws from what the proposal left of the distribution.
        left_BTV = jnp.maximum(p_BTV - q_BTV, 0)
        left_BV = jax.lax.dynamic_slice_in_dim(left_BTV, new - 1, 1, axis=1)[:, 0]
        drawn_B = jax.random.categorical(last_key, jnp.log(left_BV)).astype(jnp.int32)
        is_drawn_BT = (jnp.arange(T)[None] == new - 1) & (accepted_B < new)[:, None]
        new_BT = jnp.where(is_drawn_BT, drawn_B[:, None], d_BT)

        ended_BT = sampling.among(new_BT, plan.ends) & (jnp.arange(T) < new)[None]
        ends_B = s.made + jnp.where(ended_BT.any(-1), ended_BT.argmax(-1) + 1, new)
        return Draft(
            cache=cache.replace(end=s.cache.end + new),
            drafts=None if drafts is None else drafts.replace(end=s.drafts.end + new),  # type: ignore[union-attr]
            key=s.key,
            made=s.made + new,
            rounds=s.rounds + 1,
            lengths_B=s.lengths_B,
            done_B=s.done_B | ended_BT.any(-1),
            ends_B=jnp.where(s.done_B, s.ends_B, ends_B),
            history_BH=jax.lax.dynamic_update_slice_in_dim(s.history_BH, new_BT, at + 1, axis=1),
        )

    def _drafted(
        self, params: Any, s: Draft, at: jax.Array, places_BT: jax.Array, chances: Any, key: jax.Array
    ) -> tuple[Cache, jax.Array, jax.Array]:
        """(the draft's cache, proposals `[B, T]`, their probabilities `[B, T, V]`). The last is only read, for the
        cache to hold all that may be accepted."""
        assert self.draft is not None
        model = self.draft.model

        def one(carry: Any, step: Any) -> Any:
            cache, last_B = carry
            place_B, key = step
            z_B1V, cache = extend(model, params, cache, last_B[:, None], place_B[:, None])
            q_BV = chances(z_B1V[:, 0])
            next_B = jax.random.categorical(key, jnp.log(q_BV)).astype(jnp.int32)
            return (cache, next_B), (next_B, q_BV)

        last_B = jax.lax.dynamic_slice_in_dim(s.history_BH, at, 1, axis=1)[:, 0]
        keys_T = jax.random.split(key, self.k + 1)
        (drafts, _), (d_TB, q_TBV) = jax.lax.scan(one, (s.drafts, last_B), (places_BT.T, keys_T))
        return drafts, d_TB.T, q_TBV.swapaxes(0, 1)  # type: ignore[return-value]

    def _looked_up(self, history_BH: jax.Array, at: jax.Array, first_B: jax.Array) -> jax.Array:
        """What followed the latest earlier place of the last two tokens, `[B, T]`; anything where there is none."""
        j_H = jnp.arange(history_BH.shape[1])
        before_BH = jnp.roll(history_BH, 1, axis=1)
        last_B1 = jax.lax.dynamic_slice_in_dim(history_BH, at, 1, axis=1)
        last2_B1 = jax.lax.dynamic_slice_in_dim(history_BH, at - 1, 1, axis=1)
        met_BH = (history_BH == last_B1) & (before_BH == last2_B1) & (j_H < at)[None] & (j_H[None] > first_B[:, None])
        found_B = jnp.where(met_BH, j_H[None], 0).max(-1)
        return jnp.take_along_axis(history_BH, found_B[:, None] + 1 + jnp.arange(self.k + 1)[None], 1)


def _restricted(z_BV: jax.Array, allow_1V: Any) -> jax.Array:
    return z_BV if allow_1V is None else jnp.where(allow_1V, z_BV, -jnp.inf)


def _chances(z_BV: jax.Array, *, allow_1V: Any, knobs: dict, top_k: int) -> jax.Array:
    return sampling.probabilities(_restricted(z_BV, allow_1V), knobs, top_k)
