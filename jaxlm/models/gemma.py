"""Gemma 1, 2 and 3 (Gemma Team 2024, 2024b, 2025): norms as 1 + w, scaled embeddings, GELU gates, wide heads.

Gemma 2 adds norms after each half, soft caps and alternating local layers; Gemma 3 norms queries and keys instead of
capping scores, and rotates local layers by frequencies of their own.
B batch, T position, D model width, H heads, K key/value heads, C head width, F ffn width, V vocabulary.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.core.spec import Spec, fan_in, normal, stacked, zeros
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
    vocab: int = 256000
    layers: int = 12
    width: int = 768
    heads: int = 4
    kv_heads: int = 1
    head_width: int = 256
    ffn: int = 3072
    positions: int | None = None
    """Longest sequence; None: no limit."""
    rope: Rope = field(default_factory=Rope)
    rope_local: Rope = field(default_factory=Rope)
    """Gemma 3: of the layers that the window holds for."""
    window: int | None = None
    windowed: tuple[bool, ...] = (True, False)
    """Which layers the window holds for, as a pattern that repeats."""
    score_width: float = 256
    """Scores are divided by the square root of this."""
    softcap_scores: float | None = None
    softcap_logits: float | None = None
    bias: bool = False
    """On q, k, v and o."""
    tied: bool = True
    """The head is the embedding."""
    activation: str = "gelu_pytorch_tanh"
    dropout: float = 0.0
    eps: float = 1e-6
    model_type: Literal["gemma", "gemma2", "gemma3_text"] = "gemma3_text"
    """Decides the norms: gemma has none after the halves, gemma3_text has some on queries and keys."""


def attention_width(c: Config) -> int:
    return c.layers * c.heads * c.head_width


def block_specs(c: Config) -> dict[str, Spec]:
    D, H, K, C, F = c.width, c.heads, c.kv_heads, c.head_width, c.ffn
    deep = (2 * c.layers) ** -0.5
    out = dict(
        norm1=Spec((D,), (None,), zeros),
        q=Spec((D, H, C), ("embed", "heads", None), fan_in(0)),
        k=Spec((D, K, C), ("embed", "kv", None), fan_in(0)),
        v=Spec((D, K, C), ("embed", "kv", None), fan_in(0)),
        o=Spec((H, C, D), ("heads", None, "embed"), fan_in(0, 1, scale=deep)),
        norm2=Spec((D,), (None,), zeros),
        gate=Spec((D, F), ("embed", "ffn"), fan_in(0)),
        up=Spec((D, F), ("embed", "ffn"), fan_in(0)),
        down=Spec((F, D), ("ffn", "embed"), fan_in(0, scale=deep)),
    )
    if c.model_type != "gemma":
        out |= dict(after1=Spec((D,), (None,), zeros), after2=Spec((D,), (None,), zeros))
    if c.model_type == "gemma3_text":
        out |= dict(q_norm=Spec((C,), (None,), zeros), k_norm=Spec((C,), (None,), zeros))
    if c.bias:
        out |= dict(q_bias=Spec((H, C), ("heads", None), zeros), o_bias=Spec((D,), (None,), zeros))
        out |= {f"{n}_bias": Spec((K, C), ("kv", None), zeros) for n in "kv"}
    return out


def specs(c: Config) -> dict[str, Any]:
    if c.heads % c.kv_heads:
        raise ValueError(f"model.heads: {c.heads} is not a multiple of model.kv_heads {c.kv_heads}")
    out = dict(
        embed=Spec((c.vocab, c.width), ("vocab", "embed"), normal(c.width**-0.5)),
        blocks=stacked(c.layers, block_specs(c)),
        norm=Spec((c.width,), (None,), zeros),
    )
    if not c.tied:
        out["head"] = Spec((c.vocab, c.width), ("vocab", "embed"), fan_in(1))
    return out


def windows(c: Config) -> list[int | None]:
    return [c.window if c.windowed[i % len(c.windowed)] else None for i in range(c.layers)]


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
    far = rope.table(c.rope, c.head_width, batch["positions"])
    near = rope.table(c.rope_local, c.head_width, batch["positions"]) if c.model_type == "gemma3_text" else far
    rows = dict(mask=Mask(True, None, segments_BT, segments_BT, batch.get("prefix")), near=near, far=far)

    def norm(x: jax.Array, w: jax.Array) -> jax.Array:
        return layers.rms_norm(x, 1 + w.astype(jnp.float32), c.eps)

    def block(p: dict, x_BTD: jax.Array, rows: dict, key: jax.Array | None, window: Any, kept: Any) -> tuple[Any, Any]:
        k1, k2 = layers.subkeys(key, 2)
        a_BTD, kept = attention_layers.self_attention(
            p,
            norm(x_BTD, p["norm1"]),
            replace(rows["mask"], window=window),
            shard=shard,
            sin_cos=rows["far" if window is None else "near"],
            norm=norm,
            scale=c.score_width**-0.5,
            softcap=c.softcap_scores,
            cache=cache,
            kept=kept,
        )
        a_BTD = norm(a_BTD, p["after1"]) if "after1" in p else a_BTD
        x_BTD += layers.dropout(a_BTD, c.dropout, k1)
        d_BTD = layers.mlp(p, norm(x_BTD, p["norm2"]), c.activation, shard)
        d_BTD = norm(d_BTD, p["after2"]) if "after2" in p else d_BTD
        return x_BTD + layers.dropout(d_BTD, c.dropout, k2), kept

    x_BTD = layers.embed(params["embed"], batch["tokens"], shard)
    x_BTD = layers.dropout(x_BTD * jnp.asarray(c.width**0.5, x_BTD.dtype), c.dropout, k1)
    x_BTD, cache = block_stack.run_blocks(
        block, params["blocks"], specs["blocks"], x_BTD, rows, shard=shard, key=k2, kinds=windows(c), cache=cache
    )
    return Output(norm(x_BTD, params["norm"]), cache=cache)


def readout(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    head = "embed" if c.tied else "head"
    return Readout(x_BTD.astype(shard.dtype), shard.gather(params[head], specs[head]), softcap=c.softcap_logits)


def init_cache(c: Config, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
    kept = attention_layers.kv_cache(windows(c), rows, length, c.kv_heads, c.head_width, dtype, slack)
    return empty_cache(kept, rows, length)


# Published files.

ARCHITECTURES = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
MODEL_TYPES = tuple(ARCHITECTURES)
IGNORED = (r".*rotary_emb\.inv_freq",)


def names(c: Config) -> dict[str, Name]:
    layer = "model.layers.{layer}."
    before2 = "post_attention_layernorm" if c.model_type == "gemma" else "pre_feedforward_layernorm"
    return {
        "embed": same("model.embed_tokens.weight"),
        "blocks/norm1": vector(layer + "input_layernorm.weight"),
        "blocks/q": linear(layer + "self_attn.q_proj.weight"),
        "blocks/k": linear(layer + "self_attn.k_proj.weight"),
        "blocks/v": linear(layer + "self_attn.v_proj.weight"),
        "blocks/o": linear(layer + "self_attn.o_proj.weight", ins=2),
        **{f"blocks/{n}_bias": vector(layer + f"self_attn.{n}_proj.bias") for n in "qkvo"},
        "blocks/q_norm": vector(layer + "self_attn.q_norm.weight"),
        "blocks/k_norm": vector(layer + "self_attn.k_norm.weight"),
        "blocks/norm2": vector(layer + before2 + ".weight"),
        "blocks/after1": vector(layer + "post_attention_layernorm.weight"),
        "blocks/after2": vector(layer + "post_feedforward_layernorm.weight"),
        "blocks/gate": linear(layer + "mlp.gate_proj.weight"),
        "blocks/up": linear(layer + "mlp.up_proj.weight"),
        "blocks/down": linear(layer + "mlp.down_proj.weight"),
        "norm": vector("model.norm.weight"),
        "head": same("lm_head.weight"),
    }


def from_hf(values: dict[str, Any]) -> Config:
    kind, n = values["model_type"], values["num_hidden_layers"]
    if values.get("use_bidirectional_attention"):
        raise ValueError(f"config.json: use_bidirectional_attention of {kind} is not supported")
    period = {"gemma2": 2, "gemma3_text": values.get("sliding_window_pattern") or 6}.get(kind, 1)
    types = values.get("layer_types") or ["full" if (i + 1) % period == 0 else "sliding_attention" for i in range(n)]
    far, near = _ropes(values)
    return Config(
        vocab=values["vocab_size"],
        layers=n,
        width=values["hidden_size"],
        heads=values["num_attention_heads"],
        kv_heads=values["num_key_value_heads"],
        head_width=values.get("head_dim", 256),
        ffn=values["intermediate_size"],
        positions=values.get("max_position_embeddings"),
        rope=far,
        rope_local=near,
        window=None if kind == "gemma" else values.get("sliding_window", 4096),
        windowed=(True, False) if kind == "gemma" else block_stack.pattern([t == "sliding_attention" for t in types]),
        score_width=values.get("head_dim", 256) if kind == "gemma" else values.get("query_pre_attn_scalar", 256),
        softcap_scores=None
        if kind == "gemma"
        else values.get("attn_logit_softcapping", 50.0 if kind == "gemma2" else None),
        softcap_logits=None
        if kind == "gemma"
        else values.get("final_logit_softcapping", 30.0 if kind == "gemma2" else None),
        bias=bool(values.get("attention_bias", False)),
        tied=bool(values.get("tie_word_embeddings", True)),
        activation=_activation(values),
        eps=values.get("rms_norm_eps", 1e-6),
        model_type=kind,
    )


def _activation(values: dict[str, Any]) -> str:
    """Early files say `gelu` and mean its tanh form."""
    name = values.get("hidden_activation") or values.get("hidden_act") or "gelu_pytorch_tanh"
    name = "gelu_pytorch_tanh" if name == "gelu" and values["model_type"] == "gemma" else name
    if name not in layers.ACTIVATIONS:
        raise ValueError(f"config.json: hidden_activation {name!r} of {values['model_type']} is not supported")
    return name


def _ropes(values: dict[str, Any]) -> tuple[Rope, Rope]:
    """(of global layers, of local ones). Early Gemma 3 files scale the global ones alone."""
    if values["model_type"] != "gemma3_text":
        return rope.from_hf(values, 1e4), Rope()
    nested = values.get("rope_parameters") or {}
    far = nested.get("full_attention") or values.get("rope_scaling")
    near = {"rope_theta": values.get("rope_local_base_freq") or 1e4} | (nested.get("sliding_attention") or {})
    plain = {k: v for k, v in values.items() if k not in ("rope_theta", "rope_scaling", "rope_parameters")}
    return rope.from_hf(values, 1e6, far or {"rope_type": "default"}), rope.from_hf(plain, 1e4, near)


def to_hf(c: Config) -> dict[str, Any]:
    """What `config.json` says of the architecture; refuses a model that this `model_type` can't express."""
    kind = c.model_type
    if kind == "gemma" and (c.window or c.softcap_scores or c.softcap_logits or c.score_width != c.head_width):
        raise ValueError("model.model_type: gemma has no window, soft caps or score width; set gemma2 or gemma3_text")
    if kind == "gemma3_text" and c.softcap_scores:  # its config has the field, and its code ignores it
        raise ValueError("model.softcap_scores: not in files of model_type gemma3_text; set model.model_type=gemma2")
    out: dict[str, Any] = dict(
        architectures=[ARCHITECTURES[kind]], model_type=kind, vocab_size=c.vocab, num_hidden_layers=c.layers,
        hidden_size=c.width, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_width,
        intermediate_size=c.ffn, rms_norm_eps=c.eps, max_position_embeddings=c.positions or 1 << 17,
        tie_word_embeddings=c.tied, attention_bias=c.bias, rope_parameters=rope.to_hf(c.rope),
    )  # fmt: skip
    out["hidden_act" if kind == "gemma" else "hidden_activation"] = c.activation
    if kind == "gemma3_text":
        out["rope_parameters"] = dict(full_attention=rope.to_hf(c.rope), sliding_attention=rope.to_hf(c.rope_local))
    if kind != "gemma":
        out |= dict(
            sliding_window=c.window, query_pre_attn_scalar=c.score_width, attn_logit_softcapping=c.softcap_scores,
            final_logit_softcapping=c.softcap_logits,
            layer_types=["full_attention" if w is None else "sliding_attention" for w in windows(c)],
        )  # fmt: skip
    return out
