"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each half, GELU, biases everywhere, tied head.

B batch, T position, D model width, H heads, C head width, F ffn width, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax

from jaxlm import layers
from jaxlm.attention import Mask, attend
from jaxlm.losses import Readout
from jaxlm.params import Spec, normal, ones, stacked, zeros
from jaxlm.sharding import Layout

generates = True


@dataclass(frozen=True)
class Config:
    vocab: int = 50257
    layers: int = 12
    width: int = 768
    heads: int = 12
    positions: int = 1024
    dropout: float = 0.0
    """On embeddings, attention outputs and ffn outputs."""
    eps: float = 1e-5


def attention_width(c: Config) -> int:
    return c.layers * c.width


def block_specs(c: Config) -> dict[str, Spec]:
    D, H, C, F = c.width, c.heads, c.width // c.heads, 4 * c.width
    into, out = normal(0.02), normal(0.02 / math.sqrt(2 * c.layers))
    return dict(
        norm1=Spec((D,), (None,), ones),
        norm1_bias=Spec((D,), (None,), zeros),
        q=Spec((D, H, C), ("embed", "heads", None), into),
        k=Spec((D, H, C), ("embed", "heads", None), into),
        v=Spec((D, H, C), ("embed", "heads", None), into),
        q_bias=Spec((H, C), ("heads", None), zeros),
        k_bias=Spec((H, C), ("heads", None), zeros),
        v_bias=Spec((H, C), ("heads", None), zeros),
        o=Spec((H, C, D), ("heads", None, "embed"), out),
        o_bias=Spec((D,), (None,), zeros),
        norm2=Spec((D,), (None,), ones),
        norm2_bias=Spec((D,), (None,), zeros),
        up=Spec((D, F), ("embed", "ffn"), into),
        up_bias=Spec((F,), ("ffn",), zeros),
        down=Spec((F, D), ("ffn", "embed"), out),
        down_bias=Spec((D,), (None,), zeros),
    )


def specs(c: Config) -> dict[str, Any]:
    if c.width % c.heads:
        raise ValueError(f"model.width: {c.width} is not a multiple of model.heads {c.heads}")
    return dict(
        embed=Spec((c.vocab, c.width), ("vocab", "embed"), normal(0.02)),
        position=Spec((c.positions, c.width), (None, "embed"), normal(0.02)),
        blocks=stacked(c.layers, block_specs(c)),
        norm=Spec((c.width,), (None,), ones),
        norm_bias=Spec((c.width,), (None,), zeros),
    )


def block(c: Config, p: dict, x_BTD: jax.Array, key: jax.Array | None, mask: Mask, shard: Layout) -> jax.Array:
    k1, k2 = layers.subkeys(key, 2)
    h_BTD = layers.layer_norm(x_BTD, p["norm1"], p["norm1_bias"], c.eps)
    q_BTHC, k_BTHC, v_BTHC = (
        layers.add_bias(shard.einsum("btd,dhc->bthc", h_BTD, p[n], "batch", "seq", "heads", None), p[f"{n}_bias"])
        for n in "qkv"
    )
    a_BTHC = attend(q_BTHC, k_BTHC, v_BTHC, mask, shard=shard)
    a_BTD = layers.add_bias(shard.einsum("bthc,hcd->btd", a_BTHC, p["o"], "batch", "seq", None), p["o_bias"])
    x_BTD += layers.dropout(a_BTD, c.dropout, k1)
    h_BTD = layers.layer_norm(x_BTD, p["norm2"], p["norm2_bias"], c.eps)
    u_BTF = layers.add_bias(shard.einsum("btd,df->btf", h_BTD, p["up"], "batch", "seq", "ffn"), p["up_bias"])
    u_BTF = jax.nn.gelu(u_BTF, approximate=True)
    d_BTD = layers.add_bias(shard.einsum("btf,fd->btd", u_BTF, p["down"], "batch", "seq", None), p["down_bias"])
    return x_BTD + layers.dropout(d_BTD, c.dropout, k2)


def hidden(
    c: Config, specs: Any, params: Any, batch: dict, *, shard: Layout, key: jax.Array | None = None
) -> jax.Array:
    k1, k2 = layers.subkeys(key, 2)
    mask = Mask(causal=True, segments_BT=batch.get("segments"), segments_BS=batch.get("segments"))
    x_BTD = layers.embed(params["embed"], batch["tokens"], shard)
    x_BTD += layers.embed(params["position"], batch["positions"], shard, rows=None)
    x_BTD = layers.dropout(x_BTD, c.dropout, k1)
    x_BTD = layers.run_blocks(
        lambda p, x, k: block(c, p, x, k, mask, shard), params["blocks"], specs["blocks"], x_BTD, shard=shard, key=k2
    )
    return layers.layer_norm(x_BTD, params["norm"], params["norm_bias"], c.eps)


def readout(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    return Readout(x_BTD.astype(shard.dtype), shard.gather(params["embed"], specs["embed"]))
