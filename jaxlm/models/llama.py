"""Llama (Touvron et al. 2023) and its kin: RoPE, RMSNorm before each half, gated ffn, grouped-query attention.

Mistral adds sliding windows, Qwen 2 biases on q, k and v, Qwen 3 norms on queries and keys, SmolLM 3 layers without
rotation; Phi-3 keeps the same weights in fewer tensors.
B batch, T position, D model width, H heads, K key/value heads, C head width, F ffn width, V vocabulary.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax

from jaxlm.core.spec import Spec, fan_in, normal, ones, stacked, zeros
from jaxlm.core.weight_names import Name, fused, linear, same, vector
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
    vocab: int = 32000
    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int = 4
    head_width: int = 64
    ffn: int = 2048
    positions: int | None = None
    """Longest sequence; None: no limit."""
    rope: Rope = field(default_factory=Rope)
    tied: bool = False
    """The head is the embedding."""
    window: int | None = None
    """Sliding-window attention over this many positions, in the layers that `windowed` names."""
    windowed: tuple[bool, ...] = (True,)
    """Which layers the window holds for, as a pattern that repeats."""
    rotated: tuple[bool, ...] = (True,)
    """Which layers rotate queries and keys, as a pattern that repeats."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    dropout: float = 0.0
    eps: float = 1e-5
    model_type: Literal["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3"] = "llama"
    """What published files of this model call its architecture."""


def attention_width(c: Config) -> int:
    return c.layers * c.heads * c.head_width


def block_specs(c: Config) -> dict[str, Spec]:
    D, H, K, C, F = c.width, c.heads, c.kv_heads, c.head_width, c.ffn
    deep = (2 * c.layers) ** -0.5  # keeps the residual stream's variance near one at any depth
    out = dict(
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
    if c.qk_norm:
        out |= dict(q_norm=Spec((C,), (None,), ones), k_norm=Spec((C,), (None,), ones))
    if c.qkv_bias:
        out["q_bias"] = Spec((H, C), ("heads", None), zeros)
        out |= {f"{n}_bias": Spec((K, C), ("kv", None), zeros) for n in "kv"}
    if c.o_bias:
        out["o_bias"] = Spec((D,), (None,), zeros)
    if c.mlp_bias:
        out |= {f"{n}_bias": Spec((F,), ("ffn",), zeros) for n in ("gate", "up")}
        out["down_bias"] = Spec((D,), (None,), zeros)
    return out


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


def kinds(c: Config) -> list[tuple[int | None, bool]]:
    """(window, rotated) of each layer."""
    return [
        (c.window if c.windowed[i % len(c.windowed)] else None, c.rotated[i % len(c.rotated)]) for i in range(c.layers)
    ]


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

    def block(p: dict, x_BTD: jax.Array, rows: dict, key: jax.Array | None, kind: Any, kept: Any) -> tuple[Any, Any]:
        window, rotated = kind
        k1, k2 = layers.subkeys(key, 2)
        a_BTD, kept = attention_layers.self_attention(
            p,
            layers.rms_norm(x_BTD, p["norm1"], c.eps),
            replace(rows["mask"], window=window),
            shard=shard,
            sin_cos=rows["sin_cos"] if rotated else None,
            norm=lambda x, scale: layers.rms_norm(x, scale, c.eps),
            cache=cache,
            kept=kept,
        )
        x_BTD += layers.dropout(a_BTD, c.dropout, k1)
        d_BTD = layers.mlp(p, layers.rms_norm(x_BTD, p["norm2"], c.eps), "silu", shard)
        return x_BTD + layers.dropout(d_BTD, c.dropout, k2), kept

    x_BTD = layers.dropout(layers.embed(params["embed"], batch["tokens"], shard), c.dropout, k1)
    x_BTD, cache = block_stack.run_blocks(
        block, params["blocks"], specs["blocks"], x_BTD, rows, shard=shard, key=k2, kinds=kinds(c), cache=cache
    )
    return Output(layers.rms_norm(x_BTD, params["norm"], c.eps), cache=cache)


def readout(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    head = "embed" if c.tied else "head"
    return Readout(x_BTD.astype(shard.dtype), shard.gather(params[head], specs[head]))


def init_cache(c: Config, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
    windows = [window for window, _ in kinds(c)]
    return empty_cache(
        attention_layers.kv_cache(windows, rows, length, c.kv_heads, c.head_width, dtype, slack), rows, length
    )


# Published files.

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
MODEL_TYPES = tuple(ARCHITECTURES)
IGNORED = (r".*rotary_emb\.inv_freq",)


def names(c: Config) -> dict[str, Name]:
    layer = "model.layers.{layer}."
    table = {
        "embed": same("model.embed_tokens.weight"),
        "blocks/norm1": vector(layer + "input_layernorm.weight"),
        "blocks/q": linear(layer + "self_attn.q_proj.weight"),
        "blocks/k": linear(layer + "self_attn.k_proj.weight"),
        "blocks/v": linear(layer + "self_attn.v_proj.weight"),
        "blocks/q_bias": vector(layer + "self_attn.q_proj.bias"),
        "blocks/k_bias": vector(layer + "self_attn.k_proj.bias"),
        "blocks/v_bias": vector(layer + "self_attn.v_proj.bias"),
        "blocks/q_norm": vector(layer + "self_attn.q_norm.weight"),
        "blocks/k_norm": vector(layer + "self_attn.k_norm.weight"),
        "blocks/o": linear(layer + "self_attn.o_proj.weight", ins=2),
        "blocks/o_bias": vector(layer + "self_attn.o_proj.bias"),
        "blocks/norm2": vector(layer + "post_attention_layernorm.weight"),
        "blocks/gate": linear(layer + "mlp.gate_proj.weight"),
        "blocks/gate_bias": vector(layer + "mlp.gate_proj.bias"),
        "blocks/up": linear(layer + "mlp.up_proj.weight"),
        "blocks/up_bias": vector(layer + "mlp.up_proj.bias"),
        "blocks/down": linear(layer + "mlp.down_proj.weight"),
        "blocks/down_bias": vector(layer + "mlp.down_proj.bias"),
        "norm": vector("model.norm.weight"),
        "head": same("lm_head.weight"),
    }
    if c.model_type == "phi3":
        table |= fused(linear, layer + "self_attn.qkv_proj.weight", "blocks/q", "blocks/k", "blocks/v")
        table |= fused(linear, layer + "mlp.gate_up_proj.weight", "blocks/gate", "blocks/up")
    return table


THETA = {"smollm3": 2e6}  # where config.json leaves rope_theta out
EVERY_LAYER = ("mistral", "phi3")  # a window that is stated holds everywhere


def from_hf(values: dict[str, Any]) -> Config:
    kind, n, heads = values["model_type"], values["num_hidden_layers"], values["num_attention_heads"]
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act {values['hidden_act']!r} of {kind} is not supported, only silu")
    bias = bool(values.get("attention_bias", False))
    window, windowed = _windows(kind, values, n)
    rotated = values.get("no_rope_layers") or [
        (i + 1) % values.get("no_rope_layer_interval", 4) != 0 if kind == "smollm3" else True for i in range(n)
    ]
    return Config(
        vocab=values["vocab_size"],
        layers=n,
        width=values["hidden_size"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_width=values.get("head_dim") or (128 if kind == "qwen3" else values["hidden_size"] // heads),
        ffn=values["intermediate_size"],
        positions=values.get("max_position_embeddings"),
        rope=rope.from_hf(values, THETA.get(kind, 1e4)),
        tied=bool(values.get("tie_word_embeddings", kind == "smollm3")),
        window=window,
        windowed=block_stack.pattern(windowed),
        rotated=block_stack.pattern([bool(r) for r in rotated]),
        qk_norm=kind == "qwen3",
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias,
        mlp_bias=bool(values.get("mlp_bias", False)),
        eps=values.get("rms_norm_eps", 1e-6),
        model_type=kind,
    )


def _windows(kind: str, values: dict[str, Any], n: int) -> tuple[int | None, list[bool]]:
    """(window, which layers it holds for). Qwen and SmolLM state a window that `use_sliding_window` may turn off."""
    window = values.get("sliding_window")
    if kind == "llama" or (kind not in EVERY_LAYER and not values.get("use_sliding_window", False)):
        window = None
    types = values.get("layer_types")
    if window is None:
        return None, [True]
    if types and kind not in EVERY_LAYER:
        return window, [t == "sliding_attention" for t in types]
    if kind == "smollm3":
        return window, [not r for r in values.get("no_rope_layers") or [(i + 1) % 4 != 0 for i in range(n)]]
    return window, [kind in EVERY_LAYER or i >= values.get("max_window_layers", 28) for i in range(n)]


def to_hf(c: Config) -> dict[str, Any]:
    """What `config.json` says of the architecture; refuses a model that this `model_type` can't express."""
    kind = c.model_type
    allowed = dict(
        qk_norm=kind == "qwen3", qkv_bias=kind not in EVERY_LAYER, o_bias=kind not in ("mistral", "phi3", "qwen2"),
        mlp_bias=kind in ("llama", "smollm3"), window=kind != "llama",
    )  # fmt: skip
    for name, ok in allowed.items():
        if getattr(c, name) and not ok:
            raise ValueError(f"model.{name}: not in files of model_type {kind!r}; set another model.model_type")
    if kind != "smollm3" and not all(c.rotated):
        raise ValueError(f"model.rotated: {kind!r} rotates every layer; set model.model_type=smollm3")
    if (
        (kind == "qwen3") != c.qk_norm
        or (kind == "qwen2" and not c.qkv_bias)
        or (kind not in ("qwen2",) and c.qkv_bias != c.o_bias)
    ):
        raise ValueError(f"model.model_type: {kind!r} does not have these norms and biases; set the one that fits")
    out: dict[str, Any] = dict(
        architectures=[ARCHITECTURES[kind]], model_type=kind, vocab_size=c.vocab, num_hidden_layers=c.layers,
        hidden_size=c.width, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_width,
        intermediate_size=c.ffn, hidden_act="silu", rms_norm_eps=c.eps, rope_parameters=rope.to_hf(c.rope),
        max_position_embeddings=c.positions or 1 << 20, tie_word_embeddings=c.tied,
    )  # fmt: skip
    each = kinds(c)
    if kind in ("llama", "qwen3", "smollm3"):
        out["attention_bias"] = c.o_bias
    if kind in ("llama", "smollm3"):
        out["mlp_bias"] = c.mlp_bias
    if kind in EVERY_LAYER:
        if not all(c.windowed):
            raise ValueError(f"model.windowed: {kind} has the window in every layer; set model.model_type=qwen2")
        out["sliding_window"] = c.window
    elif kind != "llama":
        out |= dict(use_sliding_window=c.window is not None, sliding_window=c.window)
        out["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w, _ in each]
    if kind == "smollm3":
        out["no_rope_layers"] = [int(r) for _, r in each]
    if kind == "phi3" and c.rope.trained:  # transformers takes this one, whatever rope_parameters say
        out["original_max_position_embeddings"] = c.rope.trained
    return out
