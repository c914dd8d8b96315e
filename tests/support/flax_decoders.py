"""Decoders as users of Flax write them: the same one in linen and nnx, and a plainer one."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from jaxlm.nn.family import ModelConfig

V, D = 264, 16
AXES = dict(kernel=("embed", "mlp"), back=("mlp", "embed"), table=("vocab", "embed"), head=("embed", "vocab"))


@dataclass(frozen=True)
class Config(ModelConfig):
    vocab: int = V
    layers: int = 1
    width: int = D
    heads: int = 2
    positions: int = 32
    tied: bool = False
    dropout: float = 0.1
    cap: float = 0.0
    head: bool = True


# The same decoder in linen and in nnx, as the examples of Flax write theirs.


class LinenLm(nn.Module):
    c: Config
    dtype: Any
    causal: bool = True

    @nn.compact
    def __call__(self, tokens, positions=None, segments=None, deterministic=True):
        c, part = self.c, nn.with_logical_partitioning
        init = nn.initializers.lecun_normal()
        drop = lambda x: nn.Dropout(c.dropout)(x, deterministic=deterministic)  # noqa: E731
        embed = nn.Embed(c.vocab, c.width, dtype=self.dtype, name="embed",
                         embedding_init=part(nn.initializers.normal(0.5), AXES["table"]))  # fmt: skip
        place = nn.Embed(c.positions, c.width, dtype=self.dtype, name="place")
        x = drop(embed(tokens) + place(jnp.arange(tokens.shape[1])[None] if positions is None else positions))
        segments = jnp.ones_like(tokens) if segments is None else segments
        mask = nn.make_attention_mask(segments, segments, jnp.equal)
        mask = nn.combine_masks(mask, nn.make_causal_mask(tokens)) if self.causal else mask
        for i in range(c.layers):
            h = nn.LayerNorm(dtype=self.dtype, name=f"norm1_{i}")(x)
            x += nn.MultiHeadDotProductAttention(
                c.heads, dtype=self.dtype, kernel_init=part(init, ("embed", "heads")), name=f"attention_{i}"
            )(h, mask=mask)
            h = nn.LayerNorm(dtype=self.dtype, name=f"norm2_{i}")(x)
            h = nn.Dense(2 * c.width, dtype=self.dtype, kernel_init=part(init, AXES["kernel"]), name=f"up_{i}")(h)
            h = nn.Dense(c.width, dtype=self.dtype, kernel_init=part(init, AXES["back"]), name=f"down_{i}")(nn.gelu(h))
            x += drop(h)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        if not c.head:
            return x
        if c.tied:
            z = embed.attend(x) / jnp.sqrt(x.shape[-1])
        else:
            z = nn.Dense(c.vocab, dtype=self.dtype, kernel_init=part(init, AXES["head"]), name="head")(x)
        return c.cap * jnp.tanh(z / c.cap) if c.cap else z


class NnxLm(nnx.Module):
    def __init__(self, c: Config, *, rngs: nnx.Rngs, dtype: Any):
        D, self.c = c.width, c
        named = lambda name: {"kernel_metadata": {"out_sharding": AXES[name]}}  # noqa: E731
        table = {"embedding_metadata": {"out_sharding": AXES["table"]}}
        self.embed = nnx.Embed(c.vocab, D, dtype=dtype, rngs=rngs, **table)
        self.place = nnx.Embed(c.positions, D, dtype=dtype, rngs=rngs)
        norm = lambda: nnx.LayerNorm(D, dtype=dtype, rngs=rngs)  # noqa: E731
        self.norm1, self.norm2 = (nnx.List([norm() for _ in range(c.layers)]) for _ in range(2))
        self.attention = nnx.List(
            [nnx.MultiHeadAttention(c.heads, D, dtype=dtype, decode=False, rngs=rngs) for _ in range(c.layers)]
        )
        self.up = nnx.List([nnx.Linear(D, 2 * D, dtype=dtype, rngs=rngs, **named("kernel")) for _ in range(c.layers)])
        self.down = nnx.List([nnx.Linear(2 * D, D, dtype=dtype, rngs=rngs, **named("back")) for _ in range(c.layers)])
        self.norm, self.drop = norm(), nnx.Dropout(c.dropout, rngs=rngs)
        self.head = nnx.data(None if c.tied else nnx.Linear(D, c.vocab, dtype=dtype, rngs=rngs, **named("head")))
        self.scale = nnx.Variable(jnp.sqrt(D * 1.0))  # no weight: the same for every key

    def __call__(self, tokens, positions, segments, rngs=None):
        x = self.drop(self.embed(tokens) + self.place(positions))
        mask = nnx.combine_masks(nnx.make_attention_mask(segments, segments, jnp.equal), nnx.make_causal_mask(tokens))
        for norm1, attention, norm2, up, down in zip(
            self.norm1, self.attention, self.norm2, self.up, self.down, strict=True
        ):
            x += attention(norm1(x), mask=mask)
            x += self.drop(down(nnx.gelu(up(norm2(x)))))
        x = self.norm(x)
        z = self.embed.attend(x) / self.scale[...] if self.head is None else self.head(x)
        return self.c.cap * jnp.tanh(z / self.c.cap) if self.c.cap else z


class Layer(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, mask):
        init = nn.with_partitioning(nn.initializers.normal(0.3), (None, "model"))
        attend = nn.MultiHeadDotProductAttention(self.heads, name="attention", kernel_init=init)
        return x + attend(nn.LayerNorm(name="norm")(x), mask=mask), None


class Plain(nn.Module):
    """Knows neither segments nor positions; its layers are a scan."""

    c: Config
    shifts: bool = False

    @nn.compact
    def __call__(self, tokens):
        c = self.c
        real = tokens > 0
        if self.shifts:
            tokens = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        place = self.param("place", nn.initializers.normal(1.0), (1, c.positions, c.width))
        x = nn.Embed(c.vocab, c.width, name="embed")(tokens) + place[:, : tokens.shape[1]]
        mask = nn.combine_masks(nn.make_causal_mask(tokens), nn.make_attention_mask(real, real))
        x, _ = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers, in_axes=nn.broadcast,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c.heads, name="layers")(x, mask)  # fmt: skip
        return x @ self.param("head", nn.initializers.normal(0.5), (c.width, c.vocab))
