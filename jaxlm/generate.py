"""Text from a causal model: greedy or sampled, a batch of ragged prompts in one `while_loop`.

B prompts, L buffer length (prompt and new tokens, rounded up so that other lengths reuse the program), V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.losses import logits
from jaxlm.models import Model

BUCKET = 64  # buffer lengths are multiples of this


def pick(logits_BV: jax.Array, key: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """One token a row. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep the whole distribution."""
    if temperature == 0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    z_BV = logits_BV / temperature
    if top_k:
        z_BV = jnp.where(z_BV < jax.lax.top_k(z_BV, top_k)[0][:, -1:], -jnp.inf, z_BV)
    if top_p < 1:
        sorted_BV = -jnp.sort(-z_BV, -1)
        p_BV = jax.nn.softmax(sorted_BV, -1)
        kept_B = (jnp.cumsum(p_BV, -1) - p_BV < top_p).sum(-1)  # the token that crosses top_p is kept
        z_BV = jnp.where(z_BV < jnp.take_along_axis(sorted_BV, kept_B[:, None] - 1, -1), -jnp.inf, z_BV)
    return jax.random.categorical(key, z_BV).astype(jnp.int32)


def make_generate(
    model: Model, *, eos: int | None, new_tokens: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> Callable[[Any, Sequence[Sequence[int]], int], list[list[int]]]:
    """`generate(params, prompts, seed) -> new tokens of each prompt`, up to and without `eos`.

    Each new token runs the whole buffer through the model: simple, and quick for the short samples of a training run.
    On a mesh the weights stay sharded and every device sees all prompts, whose number need not divide over devices.
    """
    if not model.family.generates:
        raise ValueError("generate: this model is an encoder; it does not predict the next token")
    whole = dataclasses.replace(model.shard, compute={**model.shard.compute, "batch": (), "seq": ()})
    model = dataclasses.replace(model, shard=whole)
    for name, ok in (
        ("temperature", temperature >= 0),
        ("top-k", 0 <= top_k <= model.config.vocab),
        ("top-p", 0 < top_p <= 1),
    ):
        if not ok:
            raise ValueError(f"generate: --{name} is out of range")

    @jax.jit
    def run(params: Any, tokens_BL: jax.Array, lengths_B: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        B, L = tokens_BL.shape
        positions_BL = jnp.broadcast_to(jnp.arange(L), (B, L))

        def more(carry: Any) -> jax.Array:
            made, _, _, done_B = carry
            return (made < new_tokens) & ~done_B.all()

        def one(carry: Any) -> Any:
            made, tokens_BL, ends_B, done_B = carry
            x_BLD = model.forward(params, dict(tokens=tokens_BL, positions=positions_BL)).x_BTD
            x_B1D = jnp.take_along_axis(x_BLD, (ends_B - 1)[:, None, None], axis=1)
            z_BV = logits(model.readout(params, x_B1D), model.shard)[:, 0]
            next_B = pick(z_BV, jax.random.fold_in(key, made), temperature, top_k, top_p)
            tokens_BL = jnp.where((positions_BL == ends_B[:, None]) & ~done_B[:, None], next_B[:, None], tokens_BL)
            ends_B = jnp.where(done_B, ends_B, ends_B + 1)
            return made + 1, tokens_BL, ends_B, done_B | (next_B == (-1 if eos is None else eos))

        start = (jnp.zeros((), jnp.int32), tokens_BL, lengths_B, jnp.zeros(B, bool))
        _, tokens_BL, ends_B, _ = jax.lax.while_loop(more, one, start)
        return tokens_BL, ends_B

    def generate(params: Any, prompts: Sequence[Sequence[int]], seed: int = 0) -> list[list[int]]:
        if not prompts or not all(prompts):
            raise ValueError("generate: an empty prompt; give at least one token")
        lengths = np.array([len(p) for p in prompts], np.int32)
        size = -(-(int(lengths.max()) + new_tokens) // BUCKET) * BUCKET
        most = model.config.positions
        if most is not None and size > most:
            if int(lengths.max()) + new_tokens > most:
                raise ValueError(
                    f"generate: prompt and new tokens take {int(lengths.max()) + new_tokens} positions and the model "
                    f"has {most}; shorten the prompt or ask for fewer tokens"
                )
            size = most
        buffer = np.zeros((len(prompts), size), np.int32)
        for row, p in zip(buffer, prompts, strict=True):
            row[: len(p)] = p
        tokens, ends = jax.device_get(run(params, buffer, lengths, jax.random.key(seed)))
        out = [list(map(int, row[a:b])) for row, a, b in zip(tokens, lengths, ends, strict=True)]
        return [row[:-1] if row and row[-1] == eos else row for row in out]

    return generate
