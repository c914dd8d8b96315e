"""Mixtral (Jiang et al. 2024) and Qwen 3 MoE: Llama's block with a mixture of experts for its feed-forward half.

Qwen 3 MoE adds norms on queries and keys and may begin with dense layers. B batch, T position, D model width, H heads,
K key/value heads, C head width, F ffn width, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax

from jaxlm.core.spec import Spec, fan_in, normal, ones, stacked, zeros
from jaxlm.core.weight_names import Name, linear, same, vector
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


@dataclass(frozen=True)
class Config:
    vocab: int = 32000
    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int = 4
    head_width: int = 64
    moe: Moe = field(default_factory=Moe)
    dense: int = 0
    """Layers at the beginning that have a plain feed-forward network of width `ffn` (model_type qwen3_moe)."""
    ffn: int = 2048
    """Width of the dense layers; the experts' is `moe.ffn`."""
    positions: int | None = None
    """Longest sequence; None: no limit."""
    rope: Rope = field(default_factory=lambda: Rope(theta=1e6))
    tied: bool = False
    """The head is the embedding."""
    window: int | None = None
    """Sliding-window attention over this many positions, in every layer."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys."""
    qkvo_bias: bool = False
    dropout: float = 0.0
    eps: float = 1e-5
    model_type: Literal["mixtral", "qwen3_moe"] = "mixtral"
    """What published files of this model call its architecture."""


def attention_width(c: Config) -> int:
    return c.layers * c.heads * c.head_width


def attention_specs(c: Config, deep: float) -> dict[str, Spec]:
    D, H, K, C = c.width, c.heads, c.kv_heads, c.head_width
    out = dict(
        norm1=Spec((D,), (None,), ones),
        q=Spec((D, H, C), ("embed", "heads", None), fan_in(0)),
        k=Spec((D, K, C), ("embed", "kv", None), fan_in(0)),
        v=Spec((D, K, C), ("embed", "kv", None), fan_in(0)),
        o=Spec((H, C, D), ("heads", None, "embed"), fan_in(0, 1, scale=deep)),
        norm2=Spec((D,), (None,), ones),
    )
    if c.qk_norm:
        out |= dict(q_norm=Spec((C,), (None,), ones), k_norm=Spec((C,), (None,), ones))
    if c.qkvo_bias:
        out["q_bias"] = Spec((H, C), ("heads", None), zeros)
        out |= {f"{n}_bias": Spec((K, C), ("kv", None), zeros) for n in "kv"}
        out["o_bias"] = Spec((D,), (None,), zeros)
    return out


def specs(c: Config) -> dict[str, Any]:
    if c.heads % c.kv_heads:
        raise ValueError(f"model.heads: {c.heads} is not a multiple of model.kv_heads {c.kv_heads}")
    if not 0 <= c.dense < c.layers:
        raise ValueError(f"model.dense: {c.dense} of {c.layers} layers would be dense; leave one with experts")
    deep = (2 * c.layers) ** -0.5  # keeps the residual stream's variance near one at any depth
    D, F = c.width, c.ffn
    out: dict[str, Any] = dict(embed=Spec((c.vocab, D), ("vocab", "embed"), normal(0.02 if c.tied else 1.0)))
    if c.dense:
        wide = Spec((D, F), ("embed", "ffn"), fan_in(0))
        plain = dict(gate=wide, up=wide, down=Spec((F, D), ("ffn", "embed"), fan_in(0, scale=deep)))
        out["dense"] = stacked(c.dense, attention_specs(c, deep) | plain)
    out["blocks"] = stacked(c.layers - c.dense, attention_specs(c, deep) | moe.specs(c.moe, D, deep=deep))
    out["norm"] = Spec((D,), (None,), ones)
    if not c.tied:
        out["head"] = Spec((c.vocab, D), ("vocab", "embed"), fan_in(1))
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
        mask=Mask(True, c.window, segments_BT, segments_BT, batch.get("prefix")),
        sin_cos=rope.table(c.rope, c.head_width, batch["positions"]),
    )

    def block(p: dict, state: Any, rows: dict, key: jax.Array | None, _: Any, kept: Any) -> tuple[Any, Any]:
        x_BTD, tally = state
        k1, k2 = layers.subkeys(key, 2)
        a_BTD, kept = attention_layers.self_attention(
            p,
            layers.rms_norm(x_BTD, p["norm1"], c.eps),
            **rows,
            shard=shard,
            norm=lambda x, scale: layers.rms_norm(x, scale, c.eps),
            cache=cache,
            kept=kept,
        )
        x_BTD += layers.dropout(a_BTD, c.dropout, k1)
        h_BTD = layers.rms_norm(x_BTD, p["norm2"], c.eps)
        if "router" in p:
            d_BTD, now = moe.mixture(c.moe, p, h_BTD, rows["mask"].segments_BT, shard=shard, may_drop=cache is None)
            tally = tally.plus(now)
        else:
            d_BTD = layers.mlp(p, h_BTD, "silu", shard)
        return (x_BTD + layers.dropout(d_BTD, c.dropout, k2), tally), kept

    x_BTD = layers.dropout(layers.embed(params["embed"], batch["tokens"], shard), c.dropout, k1)
    sizes = dict(dense=c.dense, blocks=c.layers - c.dense)
    stacks = [(params[name], specs[name], [None] * n) for name, n in sizes.items() if n]
    (x_BTD, tally), cache = block_stack.run_stacks(
        block, stacks, (x_BTD, moe.start(x_BTD, shard)), rows, shard=shard, key=k2, cache=cache
    )
    x_BTD = layers.rms_norm(x_BTD, params["norm"], c.eps)
    return Output(x_BTD, tally.aux_B, cache, tally.shown(c.moe, sizes["blocks"]))


def readout(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    head = "embed" if c.tied else "head"
    return Readout(x_BTD.astype(shard.dtype), shard.gather(params[head], specs[head]))


def init_cache(c: Config, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
    windows = [c.window] * c.layers
    return empty_cache(
        attention_layers.kv_cache(windows, rows, length, c.kv_heads, c.head_width, dtype, slack), rows, length
    )


# Published files.

ARCHITECTURES = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
MODEL_TYPES = tuple(ARCHITECTURES)
IGNORED = (r".*rotary_emb\.inv_freq",)


def names(c: Config) -> dict[str, Name]:
    layer = "model.layers.{layer}."
    if c.model_type == "mixtral":
        inner = layer + "block_sparse_moe."
        gate, up, down = (inner + f"experts.{{expert}}.{n}.weight" for n in ("w1", "w3", "w2"))
    else:
        inner = layer + "mlp."
        gate, up, down = (inner + f"experts.{{expert}}.{n}_proj.weight" for n in ("gate", "up", "down"))
    table = {"embed": same("model.embed_tokens.weight")}
    for stack, first in (("dense", 0), ("blocks", c.dense)):
        table |= {
            f"{stack}/norm1": vector(layer + "input_layernorm.weight", first=first),
            f"{stack}/q_norm": vector(layer + "self_attn.q_norm.weight", first=first),
            f"{stack}/k_norm": vector(layer + "self_attn.k_norm.weight", first=first),
            f"{stack}/norm2": vector(layer + "post_attention_layernorm.weight", first=first),
        }
        for n in "qkvo":
            table[f"{stack}/{n}"] = linear(layer + f"self_attn.{n}_proj.weight", ins=1 + (n == "o"), first=first)
            table[f"{stack}/{n}_bias"] = vector(layer + f"self_attn.{n}_proj.bias", first=first)
    return table | {
        "dense/gate": linear(layer + "mlp.gate_proj.weight"),
        "dense/up": linear(layer + "mlp.up_proj.weight"),
        "dense/down": linear(layer + "mlp.down_proj.weight"),
        "blocks/router": linear(inner + "gate.weight", first=c.dense),
        "blocks/experts/gate": linear(gate, first=c.dense),
        "blocks/experts/up": linear(up, first=c.dense),
        "blocks/experts/down": linear(down, first=c.dense),
        "norm": vector("model.norm.weight"),
        "head": same("lm_head.weight"),
    }


def from_hf(values: dict[str, Any]) -> Config:
    kind, heads = values["model_type"], values["num_attention_heads"]
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act {values['hidden_act']!r} of {kind} is not supported, only silu")
    qwen = kind == "qwen3_moe"
    return Config(
        vocab=values["vocab_size"],
        layers=values["num_hidden_layers"],
        width=values["hidden_size"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_width=values.get("head_dim") or values["hidden_size"] // heads,
        moe=Moe(
            experts=values["num_experts"] if qwen and "num_experts" in values else values["num_local_experts"],
            top_k=values["num_experts_per_tok"],
            ffn=values["moe_intermediate_size" if qwen else "intermediate_size"],
            normalized=bool(values.get("norm_topk_prob", False)) if qwen else True,
        ),
        dense=_dense(values) if qwen else 0,
        ffn=values["intermediate_size"],
        positions=values.get("max_position_embeddings"),
        rope=rope.from_hf(values, 1e4 if qwen else 1e6),
        tied=bool(values.get("tie_word_embeddings", False)),
        window=values.get("sliding_window") if not qwen or values.get("use_sliding_window", False) else None,
        qk_norm=qwen,
        qkvo_bias=qwen and bool(values.get("attention_bias", False)),
        eps=values.get("rms_norm_eps", 1e-6 if qwen else 1e-5),
        model_type=kind,
    )


def _dense(values: dict[str, Any]) -> int:
    """How many layers without experts the model begins with; none may stand between others."""
    n, plain = values["num_hidden_layers"], values.get("mlp_only_layers") or []
    step = values.get("decoder_sparse_step", 1)
    sparse = [i not in plain and step > 0 and (i + 1) % step == 0 for i in range(n)]
    first = sparse.index(True) if True in sparse else n
    if not all(sparse[first:]) or first == n:
        named = f"mlp_only_layers {plain}" if plain else f"decoder_sparse_step {step}"
        raise ValueError(f"config.json: {named} puts dense layers after those with experts; they may only come first")
    return first


def to_hf(c: Config) -> dict[str, Any]:
    """What `config.json` says of the architecture; refuses a model that this `model_type` can't express."""
    kind, qwen = c.model_type, c.model_type == "qwen3_moe"
    published = Moe(experts=c.moe.experts, top_k=c.moe.top_k, ffn=c.moe.ffn, normalized=c.moe.normalized or not qwen)
    moe.check_published(c.moe, published, kind)
    for name, ok in dict(dense=qwen, qkvo_bias=qwen, qk_norm=qwen).items():
        if getattr(c, name) and not ok:
            raise ValueError(f"model.{name}: not in files of model_type {kind!r}; set model.model_type=qwen3_moe")
    if qwen and not c.qk_norm:
        raise ValueError("model.qk_norm: files of model_type 'qwen3_moe' always have it; set model.model_type=mixtral")
    out: dict[str, Any] = dict(
        architectures=[ARCHITECTURES[kind]], model_type=kind, vocab_size=c.vocab, num_hidden_layers=c.layers,
        hidden_size=c.width, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_width,
        hidden_act="silu", rms_norm_eps=c.eps, rope_parameters=rope.to_hf(c.rope), tie_word_embeddings=c.tied,
        max_position_embeddings=c.positions or 1 << 20, num_experts_per_tok=c.moe.top_k, sliding_window=c.window,
    )  # fmt: skip
    if not qwen:
        return out | dict(num_local_experts=c.moe.experts, intermediate_size=c.moe.ffn)
    return out | dict(
        num_experts=c.moe.experts, moe_intermediate_size=c.moe.ffn, norm_topk_prob=c.moe.normalized,
        mlp_only_layers=list(range(c.dense)), decoder_sparse_step=1, attention_bias=c.qkvo_bias,
        intermediate_size=c.ffn, use_sliding_window=c.window is not None,
    )  # fmt: skip
