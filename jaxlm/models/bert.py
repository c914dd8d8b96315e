"""BERT (Devlin et al. 2019): bidirectional, LayerNorm after each half, segment embeddings, pooler, masked-LM head.

B batch, T position, D model width, H heads, C head width, F ffn width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import layers
from jaxlm.attention import Mask
from jaxlm.layers import Output
from jaxlm.losses import Readout
from jaxlm.params import Spec, normal, ones, stacked, zeros
from jaxlm.sharding import Layout

kind = "encoder"
generates = False


@dataclass(frozen=True)
class Config:
    vocab: int = 30522
    layers: int = 12
    width: int = 768
    heads: int = 12
    ffn: int = 3072
    positions: int = 512
    types: int = 2
    """Segment (token type) embeddings."""
    dropout: float = 0.1
    eps: float = 1e-12


def attention_width(c: Config) -> int:
    return c.layers * c.width


def block_specs(c: Config) -> dict[str, Spec]:
    D, H, C, F = c.width, c.heads, c.width // c.heads, c.ffn
    w = normal(0.02)
    return dict(
        q=Spec((D, H, C), ("embed", "heads", None), w),
        k=Spec((D, H, C), ("embed", "heads", None), w),
        v=Spec((D, H, C), ("embed", "heads", None), w),
        q_bias=Spec((H, C), ("heads", None), zeros),
        k_bias=Spec((H, C), ("heads", None), zeros),
        v_bias=Spec((H, C), ("heads", None), zeros),
        o=Spec((H, C, D), ("heads", None, "embed"), w),
        o_bias=Spec((D,), (None,), zeros),
        norm1=Spec((D,), (None,), ones),
        norm1_bias=Spec((D,), (None,), zeros),
        up=Spec((D, F), ("embed", "ffn"), w),
        up_bias=Spec((F,), ("ffn",), zeros),
        down=Spec((F, D), ("ffn", "embed"), w),
        down_bias=Spec((D,), (None,), zeros),
        norm2=Spec((D,), (None,), ones),
        norm2_bias=Spec((D,), (None,), zeros),
    )


def specs(c: Config) -> dict[str, Any]:
    if c.width % c.heads:
        raise ValueError(f"model.width: {c.width} is not a multiple of model.heads {c.heads}")
    D, w = c.width, normal(0.02)
    return dict(
        embed=Spec((c.vocab, D), ("vocab", "embed"), w),
        position=Spec((c.positions, D), (None, "embed"), w),
        type=Spec((c.types, D), (None, "embed"), w),
        norm=Spec((D,), (None,), ones),
        norm_bias=Spec((D,), (None,), zeros),
        blocks=stacked(c.layers, block_specs(c)),
        pooler=Spec((D, D), ("embed", None), w),
        pooler_bias=Spec((D,), (None,), zeros),
        # the masked-LM head: a dense layer before the tied embedding
        transform=Spec((D, D), ("embed", None), w),
        transform_bias=Spec((D,), (None,), zeros),
        transform_norm=Spec((D,), (None,), ones),
        transform_norm_bias=Spec((D,), (None,), zeros),
        head_bias=Spec((c.vocab,), ("vocab",), zeros),
    )


def forward(
    c: Config, specs: Any, params: Any, batch: dict, *, shard: Layout, key: jax.Array | None = None, cache: None = None
) -> Output:
    k1, k2 = layers.subkeys(key, 2)
    tokens_BT = batch["tokens"]
    mask = Mask(causal=False, segments_BT=batch.get("segments"), segments_BS=batch.get("segments"))

    def block(p: dict, x_BTD: jax.Array, key: jax.Array | None, kind: Any, kept: Any) -> tuple[jax.Array, None]:
        k1, k2 = layers.subkeys(key, 2)
        a_BTD, _ = layers.self_attention(p, x_BTD, mask, shard=shard)
        x_BTD = layers.layer_norm(x_BTD + layers.dropout(a_BTD, c.dropout, k1), p["norm1"], p["norm1_bias"], c.eps)
        d_BTD = layers.dropout(layers.mlp(p, x_BTD, "gelu", shard), c.dropout, k2)
        return layers.layer_norm(x_BTD + d_BTD, p["norm2"], p["norm2_bias"], c.eps), None

    types_BT = batch.get("types", jnp.zeros_like(tokens_BT))
    x_BTD = layers.embed(params["embed"], tokens_BT, shard)
    x_BTD += layers.embed(params["position"], batch["positions"], shard, rows=None)
    x_BTD += layers.embed(params["type"], types_BT, shard, rows=None)
    x_BTD = layers.dropout(layers.layer_norm(x_BTD, params["norm"], params["norm_bias"], c.eps), c.dropout, k1)
    x_BTD, _ = layers.run_blocks(block, params["blocks"], specs["blocks"], x_BTD, shard=shard, key=k2)
    return Output(x_BTD)


def pooled(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> jax.Array:
    """`[B, D]`: tanh of a dense layer on the first token ([CLS])."""
    w_DD = shard.gather(params["pooler"], specs["pooler"])
    first_B1D = shard(x_BTD, "batch", None, None)[:, :1]
    out_B1D = shard.einsum("btd,de->bte", first_B1D, w_DD, "batch", None, None)
    return jnp.tanh(layers.add_bias(out_B1D, params["pooler_bias"]))[:, 0]


def readout(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    w_DD = shard.gather(params["transform"], specs["transform"])
    h_BTD = layers.add_bias(shard.einsum("btd,de->bte", x_BTD, w_DD, "batch", "seq", None), params["transform_bias"])
    h_BTD = jax.nn.gelu(h_BTD, approximate=False)
    h_BTD = layers.layer_norm(h_BTD, params["transform_norm"], params["transform_norm_bias"], c.eps)
    return Readout(h_BTD, shard.gather(params["embed"], specs["embed"]), params["head_bias"])
