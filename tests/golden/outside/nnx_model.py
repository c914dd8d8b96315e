"""A Transformer of one's own in Flax nnx."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

import jaxlm
from jaxlm.nn.family import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig):
    vocab: int = 384
    layers: int = 1
    width: int = 32
    heads: int = 2
    positions: int = 64
    tied: bool = False


class Decoder(nnx.Module):
    def __init__(self, c: Config, *, rngs: nnx.Rngs, dtype: Any) -> None:
        more: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.embed, self.place = nnx.Embed(c.vocab, c.width, **more), nnx.Embed(c.positions, c.width, **more)
        self.attention = nnx.MultiHeadAttention(c.heads, c.width, decode=False, **more)
        self.up, self.down = nnx.Linear(c.width, 64, **more), nnx.Linear(64, c.width, **more)
        self.norm, self.head = nnx.RMSNorm(c.width, **more), nnx.Linear(c.width, c.vocab, **more)

    def __call__(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.place(positions)
        apart = nnx.make_attention_mask(segments, segments, lambda a, b: a == b)
        x = x + self.attention(x, mask=nnx.combine_masks(apart, nnx.make_causal_mask(tokens)))
        return self.head(self.norm(x + self.down(nnx.gelu(self.up(x)))))


family = jaxlm.from_nnx(Decoder, Config)
jaxlm.register_model("scaled_nnx", family)
