"""Text from a model: ragged prompts read at once into a cache of fixed size, then one token a row and step.

B rows (prompts times samples), P prompt places, L cache slots, N new tokens, V vocabulary, S source places.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.inference import beam, sampling
from jaxlm.inference.decode import bucket, extend, left_padded, prefill, prepare, sources, whole_rows
from jaxlm.inference.sampling import Sampling
from jaxlm.models.model import Model
from jaxlm.nn.cache import Cache

# ---------------------------------------------------------------------------------------------------------- generating


class State(struct.PyTreeNode):
    """Answers in the making."""

    cache: Cache
    key: jax.Array
    made: jax.Array
    """Tokens chosen for each row so far."""
    lengths_B: jax.Array
    """Of the prompts."""
    done_B: jax.Array
    ends_B: jax.Array
    """Tokens of each answer, with the one that ended it."""
    tokens_BN: jax.Array
    logprobs_BN: jax.Array | None
    top: tuple[jax.Array, jax.Array] | None
    """(log probabilities, tokens) `[B, N, n]` of the likeliest at each place."""
    seen_BV: jax.Array | None
    counts_BV: jax.Array | None


@dataclass(frozen=True)
class Plan:
    """What of a `Sampling` shapes the program."""

    top_k: int
    ends: tuple[int, ...]
    logprobs: int | None
    seen: bool
    counts: bool


@dataclass(frozen=True)
class Completion:
    """One answer. Log probabilities are the model's own, before temperature and filters."""

    tokens: list[int]
    """Up to and without the token that ended it."""
    reason: str
    """stop: an end or a stop text; length: `tokens` were made."""
    logprobs: list[float] | None = None
    top: list[dict[int, float]] | None = None
    """The likeliest tokens at each place."""
    score: float | None = None
    """Beam search: log probability over length^length_penalty."""


class Generator:
    """The compiled programs of one model. They serve every `Sampling` that uses the same features.

    `eos`: tokens that end an answer. `used`: tokens of the vocabulary that mean something; those beyond, which fill it
    up to a round number, are never chosen. `both_ways`: prompts are read so, as a prefix language model learned it. On
    a mesh weights stay sharded and every device sees all rows.
    """

    def __init__(self, model: Model, eos: Sequence[int] = (), used: int | None = None, both_ways: bool = False) -> None:
        if not model.family.generates:
            raise ValueError("generate: this model is an encoder; it does not predict the next token")
        self.model, self.eos, self.both_ways = whole_rows(model), tuple(eos), both_ways
        self.used = min(used or model.config.vocab, model.config.vocab)
        self._prepare = jax.jit(partial(prepare, self.model))
        self._start = jax.jit(self._start_, static_argnames=("plan", "length", "rows"))
        self._search = jax.jit(partial(beam.search, self.model), static_argnames=("how",))
        self._advance = jax.jit(self._advance_, static_argnames=("plan",), donate_argnums=1)

    def prepare(self, params: Any) -> Any:
        """Once before many calls; a call prepares by itself what isn't, each time."""
        return self._prepare(params)

    def plan(self, s: Sampling) -> Plan:
        sampling.check(s, self.model.config.vocab)
        used = sampling.knobs(s)
        counts = "presence_penalty" in used or "frequency_penalty" in used
        ends = tuple(sorted({*self.eos, *s.stop_ids}))
        return Plan(s.top_k if s.temperature else 0, ends, s.logprobs, "repetition_penalty" in used, counts)

    def __call__(
        self, params: Any, prompts: Sequence[Sequence[int]], s: Sampling, source: Sequence[Sequence[int]] | None = None
    ) -> list[list[Completion]]:
        """The answers to each prompt, `s.samples` of them. `source`: what an encoder reads for each prompt."""
        if s.beams > 1:
            return self._best(params, prompts, s, source)
        state = self.start(params, prompts, s, source)
        return self.completions(self.advance(params, state, s, s.tokens), s)

    def start(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        s: Sampling,
        source: Sequence[Sequence[int]] | None = None,
        allow_BV: np.ndarray | None = None,
    ) -> State:
        """Read the prompts and choose the first token of each answer. Rows: the samples of a prompt side by side."""
        plan = self.plan(s)
        batch = self.batch(prompts, s.tokens, source)
        length = bucket(batch["tokens"].shape[1] + s.tokens)
        key, allow_BV = jax.random.key(s.seed), self.allowed(s, allow_BV)
        return self._start(
            params, batch, key, sampling.knobs(s), allow_BV, plan=plan, length=length, rows=len(prompts) * s.samples
        )

    def batch(
        self, prompts: Sequence[Sequence[int]], tokens: int, source: Sequence[Sequence[int]] | None = None
    ) -> dict[str, np.ndarray]:
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("generate: an empty prompt; give at least one token")
        need, most = max(map(len, prompts)) + tokens, self.model.config.positions
        if most is not None and need > most:
            raise ValueError(
                f"generate: prompt and new tokens take {need} positions and the model has {most}; "
                "shorten the prompt or ask for fewer tokens"
            )
        if (source is not None) != (self.model.family.kind == "encoder_decoder"):
            raise ValueError(
                "generate: an encoder-decoder needs a source for each prompt, and no other model takes one"
            )
        if source is not None and most is not None and max(map(len, source)) > most:
            raise ValueError(
                f"generate: a source has {max(map(len, source))} tokens and the model has {most} positions; shorten it"
            )
        batch = left_padded(prompts) | (sources(source) if source is not None else {})
        return batch | ({"prefix": batch["segments"] > 0} if self.both_ways else {})

    def advance(self, params: Any, state: State, s: Sampling, until: int, allow_BV: np.ndarray | None = None) -> State:
        """Go on until each answer has `until` tokens or has ended. `state` must not be used again."""
        plan = self.plan(s)
        allow_BV = self.allowed(s, allow_BV)
        return self._advance(params, state, sampling.knobs(s), allow_BV, np.int32(min(until, s.tokens)), plan=plan)

    def allowed(self, s: Sampling, allow_BV: np.ndarray | None = None) -> np.ndarray | None:
        """Which tokens may be chosen, `[B or 1, V]`; None: all."""
        own, V = None, self.model.config.vocab
        if s.allowed_ids or s.banned_ids or self.used < V:
            own = np.full((1, V), not s.allowed_ids)
            own[0, list(s.allowed_ids + (self.plan(s).ends if s.allowed_ids else ()))] = True
            own[0, list(s.banned_ids)] = False
            own[0, self.used :] = False
            if not own.any():
                raise ValueError("sampling.banned_ids: no token is left; ban fewer")
        if own is None or allow_BV is None:
            return allow_BV if own is None else own
        return own & allow_BV

    def completions(self, state: State, s: Sampling) -> list[list[Completion]]:
        held = jax.device_get((state.tokens_BN, state.ends_B, state.logprobs_BN, state.top))
        rows = [completion_of(i, self.plan(s).ends, *held) for i in range(len(held[0]))]
        return [rows[i : i + s.samples] for i in range(0, len(rows), s.samples)]

    def _best(self, params: Any, prompts: Sequence[Sequence[int]], s: Sampling, source: Any) -> list[list[Completion]]:
        plan, batch = self.plan(s), self.batch(prompts, s.tokens, source)
        length = bucket(batch["tokens"].shape[1] + s.tokens)
        allow_BV = self.allowed(s)
        how = beam.How(s.beams, plan.ends, length)
        found = jax.device_get(self._search(params, batch, sampling.knobs(s), allow_BV, beam.rules_of(s), how=how))
        out = []
        for tokens_KN, lengths_K, scores_K in zip(*found, strict=True):
            rows = [completion_of(i, plan.ends, tokens_KN, lengths_K) for i in range(s.samples)]
            out.append([replace(row, score=float(scores_K[i])) for i, row in enumerate(rows)])
        return out

    def _start_(
        self, params: Any, batch: dict, key: Any, knobs: dict, allow_BV: Any, *, plan: Plan, length: int, rows: int
    ) -> State:
        params = prepare(self.model, params)
        z_BV, cache = prefill(self.model, params, batch, length)
        (B, V), N = z_BV.shape, length - batch["tokens"].shape[1]
        seen_BV = None
        if plan.seen:
            seen_BV = (
                jnp.zeros((B, V), jnp.int32).at[jnp.arange(B)[:, None], batch["tokens"]].max(batch["segments"]) > 0
            )
        lengths_B = (batch["segments"] > 0).sum(-1)
        again = partial(jnp.repeat, repeats=rows // B, axis=0, total_repeat_length=rows)
        z_BV, lengths_B, seen_BV = jax.tree.map(again, (z_BV, lengths_B, seen_BV))
        if rows != B:
            cache = cache.replace(layers=jax.tree.map(again, cache.layers), real_BS=again(cache.real_BS))
        n = plan.logprobs
        state = State(
            cache=cache,
            key=key,
            made=jnp.zeros((), jnp.int32),
            lengths_B=lengths_B,
            done_B=jnp.zeros(rows, bool),
            ends_B=jnp.zeros(rows, jnp.int32),
            tokens_BN=jnp.zeros((rows, N), jnp.int32),
            logprobs_BN=None if n is None else jnp.zeros((rows, N), jnp.float32),
            top=(jnp.zeros((rows, N, n), jnp.float32), jnp.zeros((rows, N, n), jnp.int32)) if n else None,
            seen_BV=seen_BV,
            counts_BV=jnp.zeros((rows, V), jnp.int32) if plan.counts else None,
        )
        return choose(state, z_BV, knobs, allow_BV, plan)

    def _advance_(self, params: Any, state: State, knobs: dict, allow_BV: Any, until: Any, *, plan: Plan) -> State:
        params = prepare(self.model, params)

        # XLA copies a cache whose leading dimension is 1 four times a step, and one without it once.
        thin = len(state.done_B) == 1 and jax.sharding.get_abstract_mesh().empty

        def carried(state: State, change: Callable[[jax.Array], jax.Array]) -> State:
            kept = jax.tree.map(change, state.cache.layers) if thin else state.cache.layers
            return state.replace(cache=state.cache.replace(layers=kept))

        def more(state: State) -> jax.Array:
            return (state.made < until) & ~state.done_B.all()

        def one(state: State) -> State:
            state = carried(state, lambda x: x[None])
            last_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BN, state.made - 1, 1, axis=1)
            positions_B1 = (state.lengths_B + state.made - 1)[:, None]
            z_B1V, cache = extend(self.model, params, state.cache, last_B1, positions_B1)
            state = choose(state.replace(cache=cache), z_B1V[:, 0], knobs, allow_BV, plan)
            return carried(state, lambda x: x[0])

        state = jax.lax.while_loop(more, one, carried(state, lambda x: x[0]))
        return carried(state, lambda x: x[None])


def choose(state: State, z_BV: jax.Array, knobs: dict, allow_BV: jax.Array | None, plan: Plan) -> State:
    """The next token of each row, from its logits."""
    B, at = len(z_BV), state.made
    own_BV = z_BV
    z_BV = sampling.penalise(z_BV, knobs, state.seen_BV, state.counts_BV)
    z_BV = sampling.restrict(z_BV, knobs, allow_BV, plan.ends, at)
    keys_B = None
    if "temperature" in knobs:
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(state.key, at), jnp.arange(B))
    next_B = jnp.where(state.done_B, 0, sampling.pick(z_BV, keys_B, knobs, plan.top_k))
    new: dict[str, Any] = dict(tokens_BN=_put(state.tokens_BN, next_B, at))
    if plan.logprobs is not None:
        p_BV = jax.nn.log_softmax(own_BV, -1)
        new["logprobs_BN"] = _put(state.logprobs_BN, jnp.take_along_axis(p_BV, next_B[:, None], -1)[:, 0], at)
        if state.top is not None:
            top = jax.lax.top_k(p_BV, plan.logprobs)
            new["top"] = tuple(_put(kept, x, at) for kept, x in zip(state.top, top, strict=True))
    one_hot = (jnp.arange(B), next_B)
    if state.seen_BV is not None:
        new["seen_BV"] = state.seen_BV.at[one_hot].set(True)
    if state.counts_BV is not None:
        new["counts_BV"] = state.counts_BV.at[one_hot].add(1)
    return state.replace(
        made=at + 1,
        ends_B=jnp.where(state.done_B, state.ends_B, at + 1),
        done_B=state.done_B | sampling.among(next_B, plan.ends),
        **new,
    )


def _put(kept_BN: Any, new_B: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(kept_BN, new_B[:, None], at, axis=1)


def completion_of(
    i: int, ends: tuple[int, ...], tokens_BN: Any, ends_B: Any, logprobs_BN: Any = None, top: Any = None
) -> Completion:
    """Of row `i`."""
    n = int(ends_B[i])
    stopped = bool(n) and int(tokens_BN[i, n - 1]) in ends
    n -= stopped
    likeliest: list[dict[int, float]] | None = None
    if top is not None:
        likeliest = [
            {int(t): float(p) for p, t in zip(ps, ts, strict=True)}
            for ps, ts in zip(top[0][i, :n], top[1][i, :n], strict=True)
        ]
    return Completion(
        tokens=[int(t) for t in tokens_BN[i, :n]],
        reason="stop" if stopped else "length",
        logprobs=None if logprobs_BN is None else [float(x) for x in logprobs_BN[i, :n]],
        top=likeliest,
    )


def trimmed(c: Completion, n: int) -> Completion:
    """Its first `n` tokens, which completed a stop text."""
    logprobs, top = c.logprobs and c.logprobs[:n], c.top and c.top[:n]
    return replace(c, tokens=c.tokens[:n], reason="stop", logprobs=logprobs, top=top)
