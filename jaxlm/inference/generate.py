"""A generator makes text: it reads ragged prompts at once into a cache of fixed size, then adds a token a row and step.

B rows (prompts times samples), P prompt positions, L cache slots, N new tokens, V vocabulary, S source positions.
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
    """The state holds answers that are being generated, one a row.

    `num_generated` counts the tokens chosen for each row so far, `answer_lengths_B` the tokens of each answer with the
    one that ended it. `top` are the (log probabilities, tokens) `[B, N, n]` of the likeliest tokens at each position.
    """

    cache: Cache
    key: jax.Array
    num_generated: jax.Array
    prompt_lengths_B: jax.Array
    done_B: jax.Array
    answer_lengths_B: jax.Array
    tokens_BN: jax.Array
    logprobs_BN: jax.Array | None
    top: tuple[jax.Array, jax.Array] | None
    seen_BV: jax.Array | None
    counts_BV: jax.Array | None
    prompt: tuple[jax.Array, jax.Array] | None = None
    """This is each prompt and which of its places are real, `[B, P]`, where repeated tokens are forbidden."""


@dataclass(frozen=True)
class Plan:
    """A plan holds what of a `Sampling` shapes the program; another value compiles it again."""

    top_k: int
    end_ids: tuple[int, ...]
    logprobs: int | None
    needs_seen: bool
    needs_counts: bool
    no_repeat_ngram: int = 0


@dataclass(frozen=True)
class Completion:
    """A completion is one answer. Its log probabilities are the model's own, before temperature and filters.

    `tokens` don't include the one that ended it. `reason` is "stop" after an end token or a stop text, "length" after
    as many tokens as were asked for. `top` has the likeliest tokens at each position. `score` is beam search's log
    probability over length^length_penalty.
    """

    tokens: list[int]
    reason: str
    logprobs: list[float] | None = None
    top: list[dict[int, float]] | None = None
    score: float | None = None


class Generator:
    """A generator holds the compiled programs of one model; they serve every `Sampling` that uses the same features.

    `eos` are the tokens that end an answer. `used` is how many tokens of the vocabulary mean something: those beyond,
    which fill it up to a round number, are never chosen. `both_ways` says that attention over a prompt goes both ways,
    as a prefix language model learned it. On a mesh weights stay sharded and every device sees all rows.
    """

    def __init__(self, model: Model, eos: Sequence[int] = (), used: int | None = None, both_ways: bool = False) -> None:
        if not model.family.generates:
            raise ValueError("generate: this model is an encoder; it does not predict the next token")
        self.model, self.eos, self.both_ways = whole_rows(model), tuple(eos), both_ways
        self.used = min(used or model.config.vocab, model.config.vocab)
        self._jit_prepare = jax.jit(partial(prepare, self.model))
        self._jit_start = jax.jit(self._start, static_argnames=("plan", "length", "rows"))
        self._jit_search = jax.jit(partial(beam.search, self.model), static_argnames=("plan",))
        self._jit_advance = jax.jit(self._advance, static_argnames=("plan",), donate_argnums=1)

    def prepare(self, params: Any) -> Any:
        """Returns weights as decoding reads them. Each call does this by itself with weights that aren't prepared."""
        return self._jit_prepare(params)

    def plan(self, s: Sampling) -> Plan:
        """Returns what of `s` shapes the program; raises a ValueError where a setting is out of range."""
        sampling.check(s, self.model.config.vocab)
        numeric_settings = sampling.numeric_settings(s)
        needs_counts = "presence_penalty" in numeric_settings or "frequency_penalty" in numeric_settings
        end_ids = tuple(sorted({*self.eos, *s.stop_ids}))
        top_k = s.top_k if s.temperature else 0
        needs_seen = "repetition_penalty" in numeric_settings
        return Plan(top_k, end_ids, s.logprobs, needs_seen, needs_counts, s.no_repeat_ngram)

    def __call__(
        self, params: Any, prompts: Sequence[Sequence[int]], s: Sampling, source: Sequence[Sequence[int]] | None = None
    ) -> list[list[Completion]]:
        """Returns `s.samples` answers to each prompt. `source` is what an encoder reads for each prompt."""
        s = sampling.capped(s, prompts)
        if s.beams > 1:
            return self._beam_search(params, prompts, s, source)
        state = self.start(params, prompts, s, source)
        return self.completions(self.advance(params, state, s, s.tokens), s)

    def start(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        s: Sampling,
        source: Sequence[Sequence[int]] | None = None,
        allowed_BV: np.ndarray | None = None,
    ) -> State:
        """Reads the prompts and chooses each answer's first token. The samples of a prompt are neighbouring rows."""
        s = sampling.capped(s, prompts)
        plan = self.plan(s)
        batch = self.batch(prompts, s, source)
        length = bucket(batch["tokens"].shape[1] + s.tokens)
        key, allowed_BV = jax.random.key(s.seed), self.allowed(s, allowed_BV)
        return self._jit_start(
            params,
            batch,
            key,
            sampling.numeric_settings(s),
            allowed_BV,
            plan=plan,
            length=length,
            rows=len(prompts) * s.samples,
        )

    def batch(
        self, prompts: Sequence[Sequence[int]], s: Sampling, source: Sequence[Sequence[int]] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the arrays that a prefill reads, with the prompts padded on the left.

        Raises a ValueError where a prompt is empty or prompt and answer don't fit the model's positions.
        """
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("generate: an empty prompt; give at least one token")
        need, most = sampling.num_places(s, prompts), self.model.config.positions
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

    def advance(
        self, params: Any, state: State, s: Sampling, until: int, allowed_BV: np.ndarray | None = None
    ) -> State:
        """Generates until each answer has `until` tokens or has ended. `state` is donated: don't use it again."""
        plan = self.plan(s)
        allowed_BV = self.allowed(s, allowed_BV)
        return self._jit_advance(
            params, state, sampling.numeric_settings(s), allowed_BV, np.int32(min(until, s.tokens)), plan=plan
        )

    def allowed(self, s: Sampling, allowed_BV: np.ndarray | None = None) -> np.ndarray | None:
        """Returns which tokens may be chosen, bool `[B or 1, V]`: by `s` and by `allowed_BV`; None allows all."""
        ours, V = None, self.model.config.vocab
        if s.allowed_ids or s.banned_ids or self.used < V:
            ours = np.full((1, V), not s.allowed_ids)
            ours[0, list(s.allowed_ids + (self.plan(s).end_ids if s.allowed_ids else ()))] = True
            ours[0, list(s.banned_ids)] = False
            ours[0, self.used :] = False
            if not ours.any():
                raise ValueError("sampling.banned_ids: no token is left; ban fewer")
        if ours is None or allowed_BV is None:
            return allowed_BV if ours is None else ours
        return ours & allowed_BV

    def completions(self, state: State, s: Sampling) -> list[list[Completion]]:
        """Returns the answers so far, `s.samples` for each prompt."""
        arrays = jax.device_get((state.tokens_BN, state.answer_lengths_B, state.logprobs_BN, state.top))
        flat = [completion_of(i, self.plan(s).end_ids, *arrays) for i in range(len(arrays[0]))]
        return [flat[i : i + s.samples] for i in range(0, len(flat), s.samples)]

    def _beam_search(
        self, params: Any, prompts: Sequence[Sequence[int]], s: Sampling, source: Any
    ) -> list[list[Completion]]:
        plan, batch = self.plan(s), self.batch(prompts, s, source)
        length = bucket(batch["tokens"].shape[1] + s.tokens)
        allowed_BV = self.allowed(s)
        shape = beam.BeamPlan(s.beams, plan.end_ids, length, s.logprobs, s.no_repeat_ngram)
        result = self._jit_search(
            params, batch, sampling.numeric_settings(s), allowed_BV, beam.beam_rules(s), plan=shape
        )
        out = []
        tokens, lengths, scores, notes = jax.device_get(result)
        for row, (tokens_KN, lengths_K, scores_K) in enumerate(zip(tokens, lengths, scores, strict=True)):
            noted = {name: x[row] for name, x in notes.items()}
            top = (noted["top"], noted["top_ids"]) if s.logprobs else None
            known = (plan.end_ids, tokens_KN, lengths_K, noted.get("logprobs"), top)
            answers = [completion_of(i, *known) for i in range(s.samples)]
            out.append([replace(answer, score=float(scores_K[i])) for i, answer in enumerate(answers)])
        return out

    def _start(
        self,
        params: Any,
        batch: dict,
        key: Any,
        numeric_settings: dict,
        allowed_BV: Any,
        *,
        plan: Plan,
        length: int,
        rows: int,
    ) -> State:
        params = prepare(self.model, params)
        z_BV, cache = prefill(self.model, params, batch, length)
        (B, V), N = z_BV.shape, length - batch["tokens"].shape[1]
        seen_BV = None
        if plan.needs_seen:
            seen_BV = (
                jnp.zeros((B, V), jnp.int32).at[jnp.arange(B)[:, None], batch["tokens"]].max(batch["segments"]) > 0
            )
        prompt_lengths_B = (batch["segments"] > 0).sum(-1)
        prompt = (batch["tokens"], batch["segments"] > 0) if plan.no_repeat_ngram else None
        repeat = partial(jnp.repeat, repeats=rows // B, axis=0, total_repeat_length=rows)
        z_BV, prompt_lengths_B, seen_BV, prompt = jax.tree.map(repeat, (z_BV, prompt_lengths_B, seen_BV, prompt))
        if rows != B:
            cache = cache.replace(layers=jax.tree.map(repeat, cache.layers), real_BS=repeat(cache.real_BS))
        n = plan.logprobs
        state = State(
            cache=cache,
            key=key,
            num_generated=jnp.zeros((), jnp.int32),
            prompt_lengths_B=prompt_lengths_B,
            done_B=jnp.zeros(rows, bool),
            answer_lengths_B=jnp.zeros(rows, jnp.int32),
            tokens_BN=jnp.zeros((rows, N), jnp.int32),
            logprobs_BN=None if n is None else jnp.zeros((rows, N), jnp.float32),
            top=(jnp.zeros((rows, N, n), jnp.float32), jnp.zeros((rows, N, n), jnp.int32)) if n else None,
            seen_BV=seen_BV,
            counts_BV=jnp.zeros((rows, V), jnp.int32) if plan.needs_counts else None,
            prompt=prompt,
        )
        return choose(state, z_BV, numeric_settings, allowed_BV, plan)

    def _advance(
        self, params: Any, state: State, numeric_settings: dict, allowed_BV: Any, until: Any, *, plan: Plan
    ) -> State:
        params = prepare(self.model, params)

        # XLA copies a cache whose leading dimension is 1 four times a step, and one without it once.
        drop_rows = len(state.done_B) == 1 and jax.sharding.get_abstract_mesh().empty

        def reshape_cache(state: State, change: Callable[[jax.Array], jax.Array]) -> State:
            layers = jax.tree.map(change, state.cache.layers) if drop_rows else state.cache.layers
            return state.replace(cache=state.cache.replace(layers=layers))

        def unfinished(state: State) -> jax.Array:
            return (state.num_generated < until) & ~state.done_B.all()

        def step(state: State) -> State:
            state = reshape_cache(state, lambda x: x[None])
            last_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BN, state.num_generated - 1, 1, axis=1)
            positions_B1 = (state.prompt_lengths_B + state.num_generated - 1)[:, None]
            z_B1V, cache = extend(self.model, params, state.cache, last_B1, positions_B1)
            state = choose(state.replace(cache=cache), z_B1V[:, 0], numeric_settings, allowed_BV, plan)
            return reshape_cache(state, lambda x: x[0])

        state = jax.lax.while_loop(unfinished, step, reshape_cache(state, lambda x: x[0]))
        return reshape_cache(state, lambda x: x[None])


def choose(state: State, z_BV: jax.Array, numeric_settings: dict, allowed_BV: jax.Array | None, plan: Plan) -> State:
    """Returns the state with the next token of each row, chosen by its logits."""
    B, at = len(z_BV), state.num_generated
    model_BV = z_BV  # log probabilities are of the model's logits, before penalties and filters
    z_BV = sampling.penalise(z_BV, numeric_settings, state.seen_BV, state.counts_BV)
    if state.prompt is not None:
        history_BH = jnp.concatenate([state.prompt[0], state.tokens_BN], 1)
        real_BH = jnp.concatenate([state.prompt[1], jnp.ones(state.tokens_BN.shape, bool)], 1)
        end = state.prompt[0].shape[1] + at
        z_BV = sampling.forbid_repeats(z_BV, history_BH, real_BH, end, plan.no_repeat_ngram)
    z_BV = sampling.restrict(z_BV, numeric_settings, allowed_BV, plan.end_ids, at, state.prompt_lengths_B)
    keys_B = None
    if "temperature" in numeric_settings:
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(state.key, at), jnp.arange(B))
    next_B = jnp.where(state.done_B, 0, sampling.pick(z_BV, keys_B, numeric_settings, plan.top_k))
    new: dict[str, Any] = dict(tokens_BN=_put(state.tokens_BN, next_B, at))
    if plan.logprobs is not None:
        p_BV = jax.nn.log_softmax(model_BV, -1)
        new["logprobs_BN"] = _put(state.logprobs_BN, jnp.take_along_axis(p_BV, next_B[:, None], -1)[:, 0], at)
        if state.top is not None:
            top = jax.lax.top_k(p_BV, plan.logprobs)
            new["top"] = tuple(_put(earlier, x, at) for earlier, x in zip(state.top, top, strict=True))
    chosen = (jnp.arange(B), next_B)
    if state.seen_BV is not None:
        new["seen_BV"] = state.seen_BV.at[chosen].set(True)
    if state.counts_BV is not None:
        new["counts_BV"] = state.counts_BV.at[chosen].add(1)
    done_B = state.done_B | sampling.is_any_of(next_B, plan.end_ids)
    _, most_B = sampling.answer_limits(numeric_settings, state.prompt_lengths_B)
    return state.replace(
        num_generated=at + 1,
        answer_lengths_B=jnp.where(state.done_B, state.answer_lengths_B, at + 1),
        done_B=done_B if most_B is None else done_B | (at + 1 >= most_B),
        **new,
    )


def _put(x_BN: Any, new_B: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_BN, new_B[:, None], at, axis=1)


def completion_of(
    i: int, end_ids: tuple[int, ...], tokens_BN: Any, lengths_B: Any, logprobs_BN: Any = None, top: Any = None
) -> Completion:
    """Returns the answer of row `i`, given the arrays of a finished `State` on the host."""
    n = int(lengths_B[i])
    stopped = bool(n) and int(tokens_BN[i, n - 1]) in end_ids
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
    """Returns the completion cut to its first `n` tokens, which completed a stop text."""
    logprobs, top = c.logprobs and c.logprobs[:n], c.top and c.top[:n]
    return replace(c, tokens=c.tokens[:n], reason="stop", logprobs=logprobs, top=top)
