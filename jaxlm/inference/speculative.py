"""Speculative decoding lets a cheap draft propose tokens, which one call of the model judges (Leviathan et al. 2023).

The result is exact: greedy answers are those of plain decoding, sampled ones follow the model's own distribution. Rows
advance together, by the fewest tokens that any unfinished row got, so that all write to the same slots of the cache.

B rows, P prompt positions, N new tokens, k proposals, T = k + 1, H = P + N + T, V vocabulary.
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

# These settings change the distribution with what was generated before, which a draft would have to follow.
UNSUPPORTED = (
    "min_tokens",
    "min_length",
    "no_repeat_ngram",
    "first_id",
    "last_id",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "regex",
    "json_schema",
    "logprobs",
)


class SpeculativeState(struct.PyTreeNode):
    """The state holds answers that are being generated, one a row.

    `draft_cache` is the draft model's, or None where proposals are looked up in the text so far. `rounds` counts calls
    of the model. `history_BH` has each prompt and the answer to it.
    """

    cache: Cache
    draft_cache: Cache | None
    key: jax.Array
    num_generated: jax.Array
    rounds: jax.Array
    prompt_lengths_B: jax.Array
    done_B: jax.Array
    answer_lengths_B: jax.Array
    history_BH: jax.Array


class Answers(NamedTuple):
    """These are the completions of each prompt, and how many calls of the model they took after reading it.

    Plain decoding takes one call (`rounds`) for each token.
    """

    completions: list[list[Completion]]
    rounds: int


class Speculative:
    """`target` decodes with the proposals of `draft`.

    Without a draft the proposals are the tokens that followed the latest earlier occurrence of the last two tokens.
    """

    def __init__(self, target: Generator, draft: Generator | None = None, proposals: int = 4) -> None:
        if proposals < 1:
            raise ValueError(f"speculative: {proposals} proposals; give at least 1")
        if draft is not None and draft.model.config.vocab != target.model.config.vocab:
            raise ValueError(
                f"speculative: the draft's vocabulary has {draft.model.config.vocab} tokens and the model's "
                f"{target.model.config.vocab}; use a draft with the same tokenizer"
            )
        self.target, self.draft, self.k = target, draft, proposals
        self._jit_run = jax.jit(self._run, static_argnames=("plan", "length"))

    def __call__(self, params: Any, draft_params: Any, prompts: Sequence[Sequence[int]], s: Sampling) -> Answers:
        """Returns one answer for each prompt. `draft_params` is None without a draft."""
        if s.beams > 1 or s.samples > 1 or any(getattr(s, name) != getattr(Sampling(), name) for name in UNSUPPORTED):
            raise ValueError(f"speculative: does not go with beams, samples, {', '.join(UNSUPPORTED)}; leave them out")
        s = sampling.capped(s, prompts)
        plan, batch = self.target.plan(s), self.target.batch(prompts, s)
        length = bucket(batch["tokens"].shape[1] + s.tokens + self.k + 1)
        numeric_settings, allowed_1V = sampling.numeric_settings(s), self.target.allowed(s)
        state = self._jit_run(
            params, draft_params, batch, jax.random.key(s.seed), numeric_settings, allowed_1V, np.int32(s.tokens),
            plan=plan, length=length,
        )  # fmt: skip
        most_B = [s.tokens if s.length is None else min(s.tokens, s.length - len(prompt)) for prompt in prompts]
        tokens, lengths, rounds = jax.device_get((state.history_BH, state.answer_lengths_B, state.rounds))
        tokens, lengths = tokens[:, batch["tokens"].shape[1] :], np.minimum(lengths, most_B)
        return Answers([[completion_of(i, plan.end_ids, tokens, lengths)] for i in range(len(prompts))], int(rounds))

    def _run(
        self, params: Any, draft_params: Any, batch: dict, key: Any, numeric_settings: dict, allowed_1V: Any,
        max_tokens: Any, *, plan: Plan, length: int,
    ) -> SpeculativeState:  # fmt: skip
        params = prepare(self.target.model, params)
        z_BV, cache = prefill(self.target.model, params, batch, length, self.k)
        draft_cache = None
        if self.draft is not None:
            draft_params = prepare(self.draft.model, draft_params)
            _, draft_cache = prefill(self.draft.model, draft_params, batch, length, self.k)
        (B, P), T = batch["tokens"].shape, self.k + 1
        keys_B = jax.random.split(jax.random.fold_in(key, 0), B)
        first_B = sampling.pick(_restricted(z_BV, allowed_1V), keys_B, numeric_settings, plan.top_k)
        history_BH = jnp.zeros((B, length + T), jnp.int32).at[:, :P].set(batch["tokens"]).at[:, P].set(first_B)
        one = jnp.ones((), jnp.int32)
        state = SpeculativeState(
            cache, draft_cache, key, one, one - 1, (batch["segments"] > 0).sum(-1),
            sampling.is_any_of(first_B, plan.end_ids), jnp.ones(B, jnp.int32), history_BH,
        )  # fmt: skip

        def unfinished(state: SpeculativeState) -> jax.Array:
            return (state.num_generated < max_tokens) & ~state.done_B.all()

        step = partial(self._round, params, draft_params, P, numeric_settings, allowed_1V, plan)
        return jax.lax.while_loop(unfinished, step, state)

    def _round(
        self,
        params: Any,
        draft_params: Any,
        P: int,
        numeric_settings: dict,
        allowed_1V: Any,
        plan: Plan,
        s: SpeculativeState,
    ) -> SpeculativeState:
        B, T, at = len(s.done_B), self.k + 1, P + s.num_generated - 1
        draft_key, accept_key, last_key = jax.random.split(jax.random.fold_in(s.key, s.num_generated), 3)
        positions_BT = (s.prompt_lengths_B + s.num_generated - 1)[:, None] + jnp.arange(T)[None]
        distribution = partial(
            _distribution, allowed_1V=allowed_1V, numeric_settings=numeric_settings, top_k=plan.top_k
        )
        if self.draft is None:
            draft_cache, d_BT = None, self._looked_up(s.history_BH, at, P - s.prompt_lengths_B)
            q_BTV = jax.nn.one_hot(d_BT, self.target.model.config.vocab, dtype=jnp.float32)
        else:
            draft_cache, d_BT, q_BTV = self._drafted(draft_params, s, at, positions_BT, distribution, draft_key)
        last_B1 = jax.lax.dynamic_slice_in_dim(s.history_BH, at, 1, axis=1)
        read_BT = jnp.concatenate([last_B1, d_BT[:, :-1]], 1)
        z_BTV, cache = extend(self.target.model, params, s.cache, read_BT, positions_BT)
        p_BTV = distribution(z_BTV.reshape(B * T, -1)).reshape(z_BTV.shape)

        # Proposal i is judged by the model's distribution after i of them; the last of the T is not judged.
        q_BTV = q_BTV * (jnp.arange(T) < self.k)[None, :, None]
        p_BT, q_BT = (jnp.take_along_axis(x, d_BT[..., None], -1)[..., 0] for x in (p_BTV, q_BTV))
        agreed_BT = (jax.random.uniform(accept_key, (B, T)) * q_BT < p_BT) & (jnp.arange(T) < self.k)[None]
        accepted_B = jnp.cumprod(agreed_BT.astype(jnp.int32), -1).sum(-1)
        new = jnp.where(s.done_B, T, accepted_B + 1).min()
        # A row that ends here with a refused proposal draws from what is left of the distribution without the proposal.
        left_BTV = jnp.maximum(p_BTV - q_BTV, 0)
        left_BV = jax.lax.dynamic_slice_in_dim(left_BTV, new - 1, 1, axis=1)[:, 0]
        drawn_B = jax.random.categorical(last_key, jnp.log(left_BV)).astype(jnp.int32)
        is_drawn_BT = (jnp.arange(T)[None] == new - 1) & (accepted_B < new)[:, None]
        new_BT = jnp.where(is_drawn_BT, drawn_B[:, None], d_BT)

        ended_BT = sampling.is_any_of(new_BT, plan.end_ids) & (jnp.arange(T) < new)[None]
        answer_lengths_B = s.num_generated + jnp.where(ended_BT.any(-1), ended_BT.argmax(-1) + 1, new)
        return SpeculativeState(
            cache=cache.replace(end=s.cache.end + new),
            draft_cache=None if draft_cache is None else draft_cache.replace(end=s.draft_cache.end + new),  # type: ignore[union-attr]
            key=s.key,
            num_generated=s.num_generated + new,
            rounds=s.rounds + 1,
            prompt_lengths_B=s.prompt_lengths_B,
            done_B=s.done_B | ended_BT.any(-1),
            answer_lengths_B=jnp.where(s.done_B, s.answer_lengths_B, answer_lengths_B),
            history_BH=jax.lax.dynamic_update_slice_in_dim(s.history_BH, new_BT, at + 1, axis=1),
        )

    def _drafted(
        self,
        params: Any,
        s: SpeculativeState,
        at: jax.Array,
        positions_BT: jax.Array,
        distribution: Any,
        key: jax.Array,
    ) -> tuple[Cache, jax.Array, jax.Array]:
        """Returns (the draft's cache, proposals `[B, T]`, their distributions `[B, T, V]`).

        The last proposal is never judged: it is made so that the cache holds every token that may be accepted.
        """
        assert self.draft is not None
        model = self.draft.model

        def propose(carry: Any, step: Any) -> Any:
            cache, last_B = carry
            position_B, key = step
            z_B1V, cache = extend(model, params, cache, last_B[:, None], position_B[:, None])
            q_BV = distribution(z_B1V[:, 0])
            next_B = jax.random.categorical(key, jnp.log(q_BV)).astype(jnp.int32)
            return (cache, next_B), (next_B, q_BV)

        last_B = jax.lax.dynamic_slice_in_dim(s.history_BH, at, 1, axis=1)[:, 0]
        keys_T = jax.random.split(key, self.k + 1)
        (draft_cache, _), (d_TB, q_TBV) = jax.lax.scan(propose, (s.draft_cache, last_B), (positions_BT.T, keys_T))
        return draft_cache, d_TB.T, q_TBV.swapaxes(0, 1)  # type: ignore[return-value]

    def _looked_up(self, history_BH: jax.Array, at: jax.Array, first_B: jax.Array) -> jax.Array:
        """Returns the tokens after the last earlier occurrence of the last two, `[B, T]`; any where there is none."""
        j_H = jnp.arange(history_BH.shape[1])
        before_BH = jnp.roll(history_BH, 1, axis=1)
        last_B1 = jax.lax.dynamic_slice_in_dim(history_BH, at, 1, axis=1)
        last2_B1 = jax.lax.dynamic_slice_in_dim(history_BH, at - 1, 1, axis=1)
        met_BH = (history_BH == last_B1) & (before_BH == last2_B1) & (j_H < at)[None] & (j_H[None] > first_B[:, None])
        latest_B = jnp.where(met_BH, j_H[None], 0).max(-1)
        return jnp.take_along_axis(history_BH, latest_B[:, None] + 1 + jnp.arange(self.k + 1)[None], 1)


def _restricted(z_BV: jax.Array, allowed_1V: Any) -> jax.Array:
    return z_BV if allowed_1V is None else jnp.where(allowed_1V, z_BV, -jnp.inf)


def _distribution(z_BV: jax.Array, *, allowed_1V: Any, numeric_settings: dict, top_k: int) -> jax.Array:
    return sampling.probabilities(_restricted(z_BV, allowed_1V), numeric_settings, top_k)
