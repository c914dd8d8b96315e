"""Soft prompts are virtual tokens before the text whose embeddings are learned (Lester et al. 2021), or made by a
network that is learned (P-tuning, Liu et al. 2021).

P virtual tokens, D model width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxlm.core.config import Adapter
from jaxlm.core.ranges import Count, Natural
from jaxlm.core.spec import Spec, bias, fan_in, normal
from jaxlm.nn import layers
from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import Wrapped
from jaxlm.nn.mask import EVERYONE
from jaxlm.weights.adapters.method import Method, Specs, VirtualTokens, Weights
from jaxlm.weights.adapters.peft_format import PeftFormat


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(Adapter):
    """Every soft prompt has these settings."""

    tokens: Count = 20
    """How many virtual tokens there are."""
    text: str = ""
    """Text whose embeddings the virtual tokens begin as; empty: those of tokens at random."""


@dataclass(frozen=True, kw_only=True)
class Prompt(SoftPrompt):
    """Prompt tuning (Lester et al. 2021): embeddings of virtual tokens are learned."""


@dataclass(frozen=True, kw_only=True)
class PTuning(SoftPrompt):
    """P-tuning (Liu et al. 2021): a network makes the embeddings of virtual tokens."""

    hidden: Natural = 0
    """Width of the network that makes the virtual tokens; 0: the model's width."""


class Prompted(Wrapped):
    """A table of embeddings that goes on with those of virtual tokens, whose ids are V, V + 1 …"""

    rows_PD: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def embed(self, ids_BT: jax.Array, shard: Layout, rows: str | None) -> jax.Array:
        V, P = self.base.shape[0], self.rows_PD.shape[0]
        x_BTD = layers.embed(self.base, jnp.minimum(ids_BT, V - 1), shard, rows)
        rows_PD = shard(self.rows_PD, None, None)
        hit_BTP = (ids_BT[..., None] == V + jnp.arange(P)[None, None]).astype(rows_PD.dtype)
        virtual_BTD = shard.einsum("btp,pd->btd", shard(hit_BTP, "batch", "seq", None), rows_PD, "batch", "seq", None)
        ids_BT = shard(ids_BT, "batch", "stream")
        return jnp.where((ids_BT >= V)[..., None], virtual_BTD.astype(x_BTD.dtype), x_BTD)

    def gathered(self, s: Spec, shard: Layout) -> jax.Array:
        """Returns the table alone, as a head: virtual tokens are never predicted."""
        return shard.gather(self.base, s)


def _table(c: SoftPrompt, width: int) -> Specs:
    return dict(rows=Spec((c.tokens, width), (None, "embed"), normal(0.02)))


def _network(c: PTuning, width: int) -> Specs:
    n, w = c.hidden or width, fan_in(0)
    return _table(c, width) | dict(
        w1=Spec((width, n), (None, None), w), b1=bias(n),
        w2=Spec((n, n), (None, None), w), b2=bias(n),
        w3=Spec((n, width), (None, None), w), b3=bias(width),
    )  # fmt: skip


def _through_network(weights: Weights) -> jax.Array:
    x = jax.nn.relu(weights["rows"] @ weights["w1"] + weights["b1"][None])
    x = jax.nn.relu(x @ weights["w2"] + weights["b2"][None])
    return x @ weights["w3"] + weights["b3"][None]


def initial_rows(embed_VD: jax.Array, ids: Any, weights: Weights) -> Weights:
    """Returns the weights with virtual tokens that begin as the embeddings of real ones, `ids`."""
    return weights | dict(rows=jnp.take(embed_VD, jnp.asarray(ids), axis=0).astype(jnp.float32))


def prepended(batch: dict, names: tuple[str, str, str], first: int, n: int, everyone: bool, shard: Layout) -> dict:
    """Returns the batch with `n` virtual tokens (ids from `first`) before each row; `names` are those of its tokens,
    positions and segments.

    In a decoder every segment of a row sees them, as packed rows want it; elsewhere they are of the row's one segment.
    """
    tokens, positions, segments = names
    rows = (batch[tokens].shape[0], n)

    def put(front: jax.Array, x: jax.Array) -> jax.Array:
        front = shard(jnp.broadcast_to(front, rows).astype(x.dtype), "batch", None)
        return shard(jnp.concatenate([front, shard(x, "batch", None)], 1), "batch", "seq")

    def filled(value: int) -> jax.Array:
        return jnp.full((1, n), value, jnp.int32)

    count = jnp.arange(n, dtype=jnp.int32)[None]
    seen = batch[segments] if segments in batch else jnp.ones_like(batch[tokens])
    out = batch | {tokens: put(first + count, batch[tokens]), segments: put(filled(EVERYONE if everyone else 1), seen)}
    if positions in batch:
        out[positions] = put(count, batch[positions] + n)
    for name in ("types", "prefix"):
        if name in batch and tokens == "tokens":
            out[name] = put(filled(0), batch[name])
    return out


S = TypeVar("S", bound=SoftPrompt)


def peft_format(Config: type[S], reads: tuple[str, ...]) -> PeftFormat[S]:
    """Returns how PEFT's files hold virtual tokens: as their embeddings, whatever made them."""

    def config(values: Mapping[str, Any], targets: tuple[str, ...], tokens: int) -> S:
        return Config(tokens=tokens)

    def settings(c: S, tokens: int, others: Mapping[str, int]) -> dict[str, Any]:
        return dict(
            peft_type="PROMPT_TUNING", num_virtual_tokens=tokens, num_transformer_submodules=1,
            prompt_tuning_init="RANDOM",
        )  # fmt: skip

    return PeftFormat[S](reads=reads, config=config, settings=settings)


prompt = Method[Prompt](
    Config=Prompt,
    virtual_tokens=VirtualTokens[Prompt](lambda c: c.tokens, lambda c: c.text, _table, lambda weights: weights["rows"]),
    num_common_keys=lambda c: c.tokens,
    mergeable=False,
    peft=peft_format(Prompt, ("PROMPT_TUNING", "P_TUNING")),
)
p_tuning = Method[PTuning](
    Config=PTuning,
    virtual_tokens=VirtualTokens[PTuning](lambda c: c.tokens, lambda c: c.text, _network, _through_network),
    num_common_keys=lambda c: c.tokens,
    mergeable=False,
    peft=peft_format(PTuning, ()),
)
