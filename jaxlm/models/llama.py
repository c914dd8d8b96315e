"""Llama (Touvron et al. 2023) and its kin: RoPE, RMSNorm, SwiGLU, grouped-query attention, no biases.

B batch, T position, D model width, H heads, K key/value heads, C head width, F ffn width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import jax

from jaxlm import layers
from jaxlm.attention import Mask, attend
from jaxlm.losses import Readout
from jaxlm.params import Spec, fan_in, normal, ones, stacked
from jaxlm.sharding import Layout

generates = True


@dataclass(frozen=True)
class Config:
    vocab: int = 32000
    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int = 4
    head_width: int = 64
    ffn: int = 2048
    positions: int | None = None
    """Longest sequence; None: no limit."""
    rope_theta: float = 1e4
    tied: bool = False
    """The head is the embedding."""
    window: int | None = None
    """Sliding-window attention over this many positions."""
    dropout: float = 0.0
    eps: float = 1e-5


def attention_width(c: Config) -> int:
    return c.layers * c.heads * c.head_width


def block_specs(c: Config) -> dict[str, Spec]:
    D, H, K, C, F = c.width, c.heads, c.kv_heads, c.head_width, c.ffn
    deep = (2 * c.layers) ** -0.5  # keeps the residual stream's variance near one at any depth
    return dict(
        norm1=Spec((D,), (None,), ones),
        q=Spec((D, H, C), ("embed", "heads", None), fan_in(0)),
        k=Spec((D, K, C), ("embed", "kv", None), fan_in(0)),
        v=Spec((D, K, C), ("embed", "kv", None), fan_in(0)),
        o=Spec((H, C, D), ("heads", None, "embed"), fan_in(0, 1, scale=deep)),
        norm2=Spec((D,), (None,), ones),
        gate=Spec((D, F), ("embed", "ffn"), fan_in(0)),
        up=Spec((D, F), ("embed", "ffn"), fan_in(0)),
        down=Spec((F, D), ("ffn", "embed"), fan_in(0, scale=deep)),
    )


def specs(c: Config) -> dict[str, Any]:
    if c.heads % c.kv_heads:
        raise ValueError(f"model.heads: {c.heads} is not a multiple of model.kv_heads {c.kv_heads}")
    out = dict(
        embed=Spec((c.vocab, c.width), ("vocab", "embed"), normal(0.02 if c.tied else 1.0)),
        blocks=stacked(c.layers, block_specs(c)),
        norm=Spec((c.width,), (None,), ones),
    )
    if not c.tied:
        out["head"] = Spec((c.vocab, c.width), ("vocab", "embed"), fan_in(1))
    return out


def block(
    c: Config, p: dict, x_BTD: jax.Array, key: jax.Array | None, mask: Mask, positions_BT: jax.Array, shard: Layout
) -> jax.Array:
    k1, k2 = layers.subkeys(key, 2)
    h_BTD = layers.rms_norm(x_BTD, p["norm1"], c.eps)
    q_BTHC = shard.einsum("btd,dhc->bthc", h_BTD, p["q"], "batch", "seq", "heads", None)
    k_BTKC = shard.einsum("btd,dkc->btkc", h_BTD, p["k"], "batch", "seq", "kv", None)
    v_BTKC = shard.einsum("btd,dkc->btkc", h_BTD, p["v"], "batch", "seq", "kv", None)
    q_BTHC, k_BTKC = (layers.rope(x, positions_BT, c.rope_theta) for x in (q_BTHC, k_BTKC))
    a_BTHC = attend(q_BTHC, k_BTKC, v_BTKC, mask, shard=shard)
    a_BTD = shard.einsum("bthc,hcd->btd", a_BTHC, p["o"], "batch", "seq", None)
    x_BTD += layers.dropout(a_BTD, c.dropout, k1)
    h_BTD = layers.rms_norm(x_BTD, p["norm2"], c.eps)
    gate_BTF = shard.einsum("btd,df->btf", h_BTD, p["gate"], "batch", "seq", "ffn")
    up_BTF = shard.einsum("btd,df->btf", h_BTD, p["up"], "batch", "seq", "ffn")
    d_BTD = shard.einsum("btf,fd->btd", jax.nn.silu(gate_BTF) * up_BTF, p["down"], "batch", "seq", None)
    return x_BTD + layers.dropout(d_BTD, c.dropout, k2)


def hidden(
    c: Config, specs: Any, params: Any, batch: dict, *, shard: Layout, key: jax.Array | None = None
) -> jax.Array:
    k1, k2 = layers.subkeys(key, 2)
    mask = Mask(True, c.window, batch.get("segments"), batch.get("segments"))
    x_BTD = layers.dropout(layers.embed(params["embed"], batch["tokens"], shard), c.dropout, k1)
    x_BTD = layers.run_blocks(
        lambda p, x, k: block(c, p, x, k, mask, batch["positions"], shard),
        params["blocks"],
        specs["blocks"],
        x_BTD,
        shard=shard,
        key=k2,
    )
    return layers.rms_norm(x_BTD, params["norm"], c.eps)


def readout(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    head = "embed" if c.tied else "head"
    return Readout(x_BTD.astype(shard.dtype), shard.gather(params[head], specs[head]))
