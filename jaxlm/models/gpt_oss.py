"""GPT-OSS (OpenAI 2025): experts with biases, attention sinks, every other layer with a sliding window.

B batch, T position, D model width, H heads, K key/value heads, C head width, V vocabulary.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.core.spec import Spec, fan_in, normal, ones, stacked, zeros
from jaxlm.core.weight_names import Name, fused, linear, same, vector
from jaxlm.nn import attention_layers, block_stack, layers, moe, rope
from jaxlm.nn.cache import Cache, empty_cache, read_on
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import Readout
from jaxlm.nn.mask import Mask
from jaxlm.nn.moe import Moe
from jaxlm.nn.rope import Rope

kind = "decoder"
generates = True

YARN = Rope(theta=150000.0, scaling="yarn", factor=32.0, trained=4096, truncate=False)


@dataclass(frozen=True)
class Config:
    vocab: int = 32000
    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int = 4
    head_width: int = 64
    moe: Moe = field(default_factory=Moe)
    alpha: float = 1.702
    """Slope of the sigmoid that the gate goes through."""
    limit: float = 7.0
    """Gates above it and other halves beyond it are cut off."""
    positions: int | None = None
    """Longest sequence; None: no limit."""
    rope: Rope = YARN
    tied: bool = False
    """The head is the embedding."""
    window: int | None = 128
    """Sliding-window attention over this many positions, in the layers that `windowed` names."""
    windowed: tuple[bool, ...] = (True, False)
    """Which layers the window holds for, as a pattern that repeats."""
    attention_bias: bool = True
    dropout: float = 0.0
    eps: float = 1e-5
    model_type: Literal["gpt_oss"] = "gpt_oss"
    """What published files of this model call its architecture."""


def attention_width(c: Config) -> int:
    return c.layers * c.heads * c.head_width


def block_specs(c: Config) -> dict[str, Any]:
    D, H, K, C = c.width, c.heads, c.kv_heads, c.head_width
    deep = (2 * c.layers) ** -0.5  # keeps the residual stream's variance near one at any depth
    out = dict(
        norm1=Spec((D,), (None,), ones),
        q=Spec((D, H, C), ("embed", "heads", None), fan_in(0)),
        k=Spec((D, K, C), ("embed", "kv", None), fan_in(0)),
        v=Spec((D, K, C), ("embed", "kv", None), fan_in(0)),
        o=Spec((H, C, D), ("heads", None, "embed"), fan_in(0, 1, scale=deep)),
        sinks=Spec((H,), ("heads",), zeros),
        norm2=Spec((D,), (None,), ones),
    )
    if c.attention_bias:
        out["q_bias"] = Spec((H, C), ("heads", None), zeros)
        out |= {f"{n}_bias": Spec((K, C), ("kv", None), zeros) for n in "kv"}
        out["o_bias"] = Spec((D,), (None,), zeros)
    return out | moe.specs(c.moe, D, deep=deep, biases=True)


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


def kinds(c: Config) -> list[int | None]:
    """The window of each layer."""
    return [c.window if c.windowed[i % len(c.windowed)] else None for i in range(c.layers)]


def gated(alpha: float, limit: float, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Clamped SwiGLU: gate · sigmoid(α · gate) · (up + 1)."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


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
    act = partial(gated, c.alpha, c.limit)

    def block(p: dict, state: Any, rows: dict, key: jax.Array | None, window: Any, kept: Any) -> tuple[Any, Any]:
        x_BTD, tally = state
        k1, k2 = layers.subkeys(key, 2)
        mask, sin_cos = replace(rows["mask"], window=window), rows["sin_cos"]
        h_BTD = layers.rms_norm(x_BTD, p["norm1"], c.eps)
        a_BTD, kept = attention_layers.self_attention(
            p, h_BTD, mask, shard=shard, sin_cos=sin_cos, cache=cache, kept=kept
        )
        x_BTD += layers.dropout(a_BTD, c.dropout, k1)
        h_BTD = layers.rms_norm(x_BTD, p["norm2"], c.eps)
        d_BTD, now = moe.mixture(c.moe, p, h_BTD, mask.segments_BT, shard=shard, act=act, may_drop=cache is None)
        return (x_BTD + layers.dropout(d_BTD, c.dropout, k2), tally.plus(now)), kept

    x_BTD = layers.dropout(layers.embed(params["embed"], batch["tokens"], shard), c.dropout, k1)
    state = (x_BTD, moe.start(x_BTD, shard))
    (x_BTD, tally), cache = block_stack.run_blocks(
        block, params["blocks"], specs["blocks"], state, rows, shard=shard, key=k2, kinds=kinds(c), cache=cache
    )
    x_BTD = layers.rms_norm(x_BTD, params["norm"], c.eps)
    return Output(x_BTD, tally.aux_B, cache, tally.shown(c.moe, c.layers))


def readout(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    head = "embed" if c.tied else "head"
    return Readout(x_BTD.astype(shard.dtype), shard.gather(params[head], specs[head]))


def init_cache(c: Config, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
    return empty_cache(
        attention_layers.kv_cache(kinds(c), rows, length, c.kv_heads, c.head_width, dtype, slack), rows, length
    )


# Published files.

ARCHITECTURES = {"gpt_oss": "GptOssForCausalLM"}
MODEL_TYPES = tuple(ARCHITECTURES)


def names(c: Config) -> dict[str, Name]:
    layer = "model.layers.{layer}."
    attention, experts = layer + "self_attn.", layer + "mlp.experts."
    gate_up = tuple(f"blocks/experts/{n}" for n in ("gate", "up"))
    table = {"embed": same("model.embed_tokens.weight"), "blocks/norm1": vector(layer + "input_layernorm.weight")}
    for n in "qkvo":
        table[f"blocks/{n}"] = linear(attention + f"{n}_proj.weight", ins=1 + (n == "o"))
        table[f"blocks/{n}_bias"] = vector(attention + f"{n}_proj.bias")
    table |= fused(linear, experts + "gate_up_proj", *gate_up, axis=-1, order="in_out")
    table |= fused(vector, experts + "gate_up_proj_bias", *(f"{n}_bias" for n in gate_up), axis=-1)
    return table | {
        "blocks/sinks": vector(attention + "sinks"),
        "blocks/norm2": vector(layer + "post_attention_layernorm.weight"),
        "blocks/router": linear(layer + "mlp.router.weight"),
        "blocks/router_bias": vector(layer + "mlp.router.bias"),
        "blocks/experts/down": linear(experts + "down_proj", order="in_out"),
        "blocks/experts/down_bias": vector(experts + "down_proj_bias"),
        "norm": vector("model.norm.weight"),
        "head": same("lm_head.weight"),
    }


def from_hf(values: dict[str, Any]) -> Config:
    heads, n = values["num_attention_heads"], values["num_hidden_layers"]
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act {values['hidden_act']!r} of gpt_oss is not supported, only silu")
    types = values.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(n)]
    stretched = values.get("rope_parameters") or values.get("rope_scaling")
    return Config(
        vocab=values["vocab_size"],
        layers=n,
        width=values["hidden_size"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_width=values.get("head_dim") or values["hidden_size"] // heads,
        moe=Moe(
            experts=values["num_local_experts"],
            top_k=values.get("num_experts_per_tok") or values["experts_per_token"],
            ffn=values["intermediate_size"],
        ),
        alpha=values.get("swiglu_alpha", 1.702),
        limit=values.get("swiglu_limit", 7.0),
        positions=values.get("max_position_embeddings"),
        rope=rope.from_hf(values, YARN.theta) if stretched else YARN,
        tied=bool(values.get("tie_word_embeddings", False)),
        window=values.get("sliding_window", 128),
        windowed=block_stack.pattern([t == "sliding_attention" for t in types]),
        attention_bias=bool(values.get("attention_bias", True)),
        eps=values.get("rms_norm_eps", 1e-5),
    )


def to_hf(c: Config) -> dict[str, Any]:
    """What `config.json` says of the architecture; refuses a model that it can't express."""
    moe.check_published(c.moe, Moe(experts=c.moe.experts, top_k=c.moe.top_k, ffn=c.moe.ffn), "gpt_oss")
    types = ["sliding_attention" if c.windowed[i % len(c.windowed)] else "full_attention" for i in range(c.layers)]
    return dict(
        architectures=[ARCHITECTURES["gpt_oss"]], model_type="gpt_oss", vocab_size=c.vocab, num_hidden_layers=c.layers,
        hidden_size=c.width, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_width,
        num_local_experts=c.moe.experts, num_experts_per_tok=c.moe.top_k, intermediate_size=c.moe.ffn,
        swiglu_alpha=c.alpha, swiglu_limit=c.limit, hidden_act="silu", rms_norm_eps=c.eps,
        max_position_embeddings=c.positions or 1 << 20, rope_parameters=rope.to_hf(c.rope),
        tie_word_embeddings=c.tied, sliding_window=c.window, layer_types=types, attention_bias=c.attention_bias,
    )  # fmt: skip
