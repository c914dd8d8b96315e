"""OLMo 2 (OLMo Team 2024): as Llama, but norms come after each half, and on all queries and keys together.

B batch, T position, D model width, H heads, K key/value heads, C head width, F ffn width, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax

from jaxlm.core.spec import Spec, fan_in, normal, ones, stacked, zeros
from jaxlm.core.weight_names import Name, linear, same, vector
from jaxlm.nn import attention_layers, block_stack, layers, rope
from jaxlm.nn.cache import Cache, empty_cache, read_on
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import Readout
from jaxlm.nn.mask import Mask
from jaxlm.nn.rope import Rope

kind = "decoder"
generates = True


@dataclass(frozen=True)
class Config:
    vocab: int = 100352
    layers: int = 16
    width: int = 2048
    heads: int = 16
    kv_heads: int = 16
    head_width: int = 128
    ffn: int = 8192
    positions: int | None = None
    """Longest sequence; None: no limit."""
    rope: Rope = field(default_factory=lambda: Rope(theta=5e5))
    bias: bool = False
    """On q, k, v and o."""
    tied: bool = False
    """The head is the embedding."""
    dropout: float = 0.0
    eps: float = 1e-6
    model_type: Literal["olmo2"] = "olmo2"


def attention_width(c: Config) -> int:
    return c.layers * c.heads * c.head_width


def block_specs(c: Config) -> dict[str, Spec]:
    D, H, K, C, F = c.width, c.heads, c.kv_heads, c.head_width, c.ffn
    out = dict(
        q=Spec((D, H, C), ("embed", "heads", None), fan_in(0)),
        k=Spec((D, K, C), ("embed", "kv", None), fan_in(0)),
        v=Spec((D, K, C), ("embed", "kv", None), fan_in(0)),
        o=Spec((H, C, D), ("heads", None, "embed"), fan_in(0, 1)),
        q_norm=Spec((H, C), ("heads", None), ones),
        k_norm=Spec((K, C), ("kv", None), ones),
        norm1=Spec((D,), (None,), ones),
        gate=Spec((D, F), ("embed", "ffn"), fan_in(0)),
        up=Spec((D, F), ("embed", "ffn"), fan_in(0)),
        down=Spec((F, D), ("ffn", "embed"), fan_in(0)),
        norm2=Spec((D,), (None,), ones),
    )
    if c.bias:
        out |= dict(q_bias=Spec((H, C), ("heads", None), zeros), o_bias=Spec((D,), (None,), zeros))
        out |= {f"{n}_bias": Spec((K, C), ("kv", None), zeros) for n in "kv"}
    return out


def specs(c: Config) -> dict[str, Any]:
    if c.heads % c.kv_heads:
        raise ValueError(f"model.heads: {c.heads} is not a multiple of model.kv_heads {c.kv_heads}")
    out = dict(
        embed=Spec((c.vocab, c.width), ("vocab", "embed"), normal(0.02)),
        blocks=stacked(c.layers, block_specs(c)),
        norm=Spec((c.width,), (None,), ones),
    )
    if not c.tied:
        out["head"] = Spec((c.vocab, c.width), ("vocab", "embed"), fan_in(1))
    return out


def forward(
    c: Config,
    specs: Any,
    params: Any,
    batch: dict,
    *,
    shard: Layout,
    key: jax.Array | None = None,
    cache: Cache | None = None,
) -> Output:
    k1, k2 = layers.subkeys(key, 2)
    segments_BT = batch.get("segments")
    cache = read_on(cache, segments_BT, batch["tokens"].shape)
    rows = dict(
        mask=Mask(True, None, segments_BT, segments_BT, batch.get("prefix")),
        sin_cos=rope.table(c.rope, c.head_width, batch["positions"]),
    )

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return layers.rms_norm(x, scale, c.eps)

    def block(p: dict, x_BTD: jax.Array, rows: dict, key: jax.Array | None, kind: Any, kept: Any) -> tuple[Any, Any]:
        k1, k2 = layers.subkeys(key, 2)
        a_BTD, kept = attention_layers.self_attention(p, x_BTD, **rows, shard=shard, norm=norm, cache=cache, kept=kept)
        x_BTD += layers.dropout(norm(a_BTD, p["norm1"]), c.dropout, k1)
        d_BTD = layers.mlp(p, x_BTD, "silu", shard)
        return x_BTD + layers.dropout(norm(d_BTD, p["norm2"]), c.dropout, k2), kept

    x_BTD = layers.dropout(layers.embed(params["embed"], batch["tokens"], shard), c.dropout, k1)
    x_BTD, cache = block_stack.run_blocks(
        block, params["blocks"], specs["blocks"], x_BTD, rows, shard=shard, key=k2, cache=cache
    )
    return Output(norm(x_BTD, params["norm"]), cache=cache)


def readout(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    head = "embed" if c.tied else "head"
    return Readout(x_BTD.astype(shard.dtype), shard.gather(params[head], specs[head]))


def init_cache(c: Config, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
    kept = attention_layers.kv_cache([None] * c.layers, rows, length, c.kv_heads, c.head_width, dtype, slack)
    return empty_cache(kept, rows, length)


# Published files.

MODEL_TYPES = ("olmo2",)
IGNORED = (r".*rotary_emb\.inv_freq",)


def names(c: Config) -> dict[str, Name]:
    layer = "model.layers.{layer}."
    return {
        "embed": same("model.embed_tokens.weight"),
        "blocks/q": linear(layer + "self_attn.q_proj.weight"),
        "blocks/k": linear(layer + "self_attn.k_proj.weight"),
        "blocks/v": linear(layer + "self_attn.v_proj.weight"),
        "blocks/o": linear(layer + "self_attn.o_proj.weight", ins=2),
        **{f"blocks/{n}_bias": vector(layer + f"self_attn.{n}_proj.bias") for n in "qkvo"},
        "blocks/q_norm": vector(layer + "self_attn.q_norm.weight"),
        "blocks/k_norm": vector(layer + "self_attn.k_norm.weight"),
        "blocks/norm1": vector(layer + "post_attention_layernorm.weight"),
        "blocks/gate": linear(layer + "mlp.gate_proj.weight"),
        "blocks/up": linear(layer + "mlp.up_proj.weight"),
        "blocks/down": linear(layer + "mlp.down_proj.weight"),
        "blocks/norm2": vector(layer + "post_feedforward_layernorm.weight"),
        "norm": vector("model.norm.weight"),
        "head": same("lm_head.weight"),
    }


def from_hf(values: dict[str, Any]) -> Config:
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act {values['hidden_act']!r} of olmo2 is not supported, only silu")
    heads = values["num_attention_heads"]
    return Config(
        vocab=values["vocab_size"],
        layers=values["num_hidden_layers"],
        width=values["hidden_size"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_width=values.get("head_dim") or values["hidden_size"] // heads,
        ffn=values["intermediate_size"],
        positions=values.get("max_position_embeddings"),
        rope=rope.from_hf(values, 1e4),
        bias=bool(values.get("attention_bias", False)),
        tied=bool(values.get("tie_word_embeddings", False)),
        eps=values.get("rms_norm_eps", 1e-5),
    )


def to_hf(c: Config) -> dict[str, Any]:
    out = dict(
        architectures=["Olmo2ForCausalLM"], model_type="olmo2", vocab_size=c.vocab, num_hidden_layers=c.layers,
        hidden_size=c.width, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, intermediate_size=c.ffn,
        hidden_act="silu", rms_norm_eps=c.eps, rope_parameters=rope.to_hf(c.rope), attention_bias=c.bias,
        max_position_embeddings=c.positions or 1 << 17, tie_word_embeddings=c.tied,
    )  # fmt: skip
    return out | ({} if c.head_width * c.heads == c.width else {"head_dim": c.head_width})
