"""DeepSeek V2 and V3 (DeepSeek-AI 2024) have multi-head latent attention and many small experts.

Keys and values are made from one narrow latent per token, which is all that a cache keeps, beside one rotated key that
all heads share. B batch, T query position, S key position, D model width, H heads, N head width without rotation,
R rotated head width, W value width, L width of the latent, V vocabulary.
"""

import dataclasses
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.core.ranges import BelowOne, Count, Natural, NonNegative
from jaxlm.core.spec import Spec, bias, fan_in, norm, normal
from jaxlm.core.weight_names import Name, fused, linear, vector
from jaxlm.nn import block_stack, decoder, layers, moe, rope
from jaxlm.nn.attention import attend
from jaxlm.nn.cache import Cache, empty_cache, remember
from jaxlm.nn.family import Batch, Files, Key, Kind, ModelConfig, Task, TaskFiles
from jaxlm.nn.layers import Output, project, rms_norm
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import Mask
from jaxlm.nn.moe import Moe
from jaxlm.nn.rope import Rope

kind: Kind = "decoder"
generates = True


def _moe() -> Moe:
    return Moe(experts=16, top_k=4, ffn=512, shared=512, score="sigmoid", scale=2.5, selection_bias=True, balance=1e-4)


@dataclass(frozen=True)
class Config(ModelConfig):
    vocab: Count = 32000
    layers: Count = 12
    width: Count = 768
    heads: Count = 12
    plain_width: Count = 64
    """Part of each head's queries and keys that is not rotated."""
    rotated_width: Count = 32
    """Part of each head's queries and keys that is rotated."""
    value_width: Count = 64
    query_rank: Count | None = None
    """Width of the latent that queries are made from; None: made from the input."""
    latent: Count = 256
    """Width of the latent that keys and values are made from."""
    moe: Moe = field(default_factory=_moe)
    dense: Natural = 1
    """Layers at the beginning that have a plain feed-forward network of width `ffn`."""
    ffn: Count = 2048
    positions: Count | None = None
    """Longest sequence; None: no limit."""
    rope: Rope = field(default_factory=Rope)
    interleaved: bool = True
    """Rotated pairs are neighbours."""
    attention_bias: bool = False
    tied: bool = False
    """The head is the embedding."""
    dropout: BelowOne = 0.0
    eps: NonNegative = 1e-6
    head: bool = True
    """It predicts tokens; false: files with a task's head have no other."""
    model_type: Literal["deepseek_v3", "deepseek_v2"] = "deepseek_v3"
    """What published files of this model call its architecture."""
    layer_counts = MappingProxyType({"dense": ("layers", "dense")})
    width_fields = (*ModelConfig.width_fields, "query_rank", "latent")


NORM_EPS = 1e-6  # of the latents' norms, whatever `eps` is


def attention_width(c: Config) -> int:
    return c.layers * c.heads * (c.plain_width + c.rotated_width + c.value_width) // 2


def attention_specs(c: Config) -> dict[str, Spec]:
    D, H, L, Q = c.width, c.heads, c.latent, c.query_rank
    per_head = (H, c.plain_width + c.rotated_width)
    out = dict(
        norm1=norm(D),
        kv_a=Spec((D, L), ("embed", None), fan_in(0)),
        k_rotated=Spec((D, c.rotated_width), ("embed", None), fan_in(0)),
        kv_norm=norm(L),
        k_b=Spec((L, H, c.plain_width), ("embed", "heads", None), fan_in(0), role="absorbed"),
        v_b=Spec((L, H, c.value_width), ("embed", "heads", None), fan_in(0), role="absorbed"),
        o=Spec((H, c.value_width, D), ("heads", None, "embed"), fan_in(0, 1, scale=decoder.deep(c))),
        norm2=norm(D),
    )
    if Q is None:
        out["q"] = Spec((D, *per_head), ("embed", "heads", None), fan_in(0), scores=True)
    else:
        out["q_a"] = Spec((D, Q), ("embed", None), fan_in(0))
        out["q_norm"] = norm(Q)
        out["q_b"] = Spec((Q, *per_head), ("embed", "heads", None), fan_in(0), scores=True)
    if c.attention_bias:
        widths = dict(kv_a_bias=L, k_rotated_bias=c.rotated_width, o_bias=D) | ({} if Q is None else {"q_a_bias": Q})
        out |= {name: bias(n) for name, n in widths.items()}
    return out


def specs(c: Config) -> dict[str, Any]:
    rope.check(c.rope, c.rotated_width, "rotated_width")
    stacks = decoder.sparse_stacks(c, attention_specs(c))
    return decoder.model_specs(c, normal(0.02 if c.tied else 1.0), stacks)


def score_scale(c: Config) -> float:
    """Returns attention's 1/√width, with YaRN's temperature where it is asked for."""
    scale = (c.plain_width + c.rotated_width) ** -0.5
    if c.rope.scaling == "default" or not c.rope.mscale_all_dim:
        return scale
    return scale * rope.temperature(c.rope.factor, c.rope.mscale_all_dim) ** 2


def latent_attention(
    c: Config,
    p: dict,
    x_BTD: jax.Array,
    mask: Mask,
    sin_cos: Any,
    *,
    shard: Layout,
    cache: Cache | None,
    layer_cache: Any,
) -> tuple[jax.Array, Any]:
    """Computes `[B, T, D]` from `[B, T, D]`, and what the layer's cache keeps: latents and rotated keys."""
    if "q_a" in p:
        q_BTQ = rms_norm(project(p, "q_a", "btd,dq->btq", x_BTD, shard, "batch", "seq", None), p["q_norm"], NORM_EPS)
        q_BTHC = project(p, "q_b", "btq,qhc->bthc", q_BTQ, shard, "batch", "seq", "heads", None)
    else:
        q_BTHC = project(p, "q", "btd,dhc->bthc", x_BTD, shard, "batch", "seq", "heads", None)
    l_BTL = project(p, "kv_a", "btd,dl->btl", x_BTD, shard, "batch", "seq", None)
    l_BTL = rms_norm(l_BTL, p["kv_norm"], NORM_EPS)
    r_BTR = project(p, "k_rotated", "btd,dr->btr", x_BTD, shard, "batch", "seq", None)
    r_BTR = rope.rotate(r_BTR[:, :, None], sin_cos, c.interleaved)[:, :, 0]
    q_BTHN, q_BTHR = q_BTHC[..., : c.plain_width], rope.rotate(q_BTHC[..., c.plain_width :], sin_cos, c.interleaved)
    fresh = cache is None or cache.fresh
    seen, mask, layer_cache = remember(layer_cache, dict(latent=l_BTL, rotated=r_BTR), mask, cache)
    l_BSL, r_BSR = (seen[n].astype(x_BTD.dtype) for n in ("latent", "rotated"))
    if fresh:
        k_BSHN = shard.einsum("bsl,lhn->bshn", l_BSL, p["k_b"], "batch", "seq", "heads", None)
        v_BSHW = shard.einsum("bsl,lhw->bshw", l_BSL, p["v_b"], "batch", "seq", "heads", None)
        r_BSHR = jnp.broadcast_to(r_BSR[:, :, None], (*k_BSHN.shape[:3], c.rotated_width))
        k_BSHC = jnp.concatenate([k_BSHN, shard(r_BSHR, "batch", "seq", "heads", None)], -1)
        q_BTHC = jnp.concatenate([q_BTHN, q_BTHR], -1)
        a_BTHW = attend(q_BTHC, k_BSHC, v_BSHW, mask, shard=shard, scale=score_scale(c))
    else:  # queries go to the latents, of which there is one a token, and not keys to every head
        q_BTHL = shard(jnp.einsum("bthn,lhn->bthl", q_BTHN, p["k_b"]), "batch", "seq", "heads", None)
        q_BTHC = jnp.concatenate([q_BTHL, q_BTHR], -1)
        k_BS1C = jnp.concatenate([l_BSL, r_BSR], -1)[:, :, None]
        one = dataclasses.replace(shard, compute={**shard.compute, "kv": ()})  # the one key is on every device
        a_BTHL = attend(q_BTHC, k_BS1C, l_BSL[:, :, None], mask, shard=one, scale=score_scale(c))
        a_BTHW = shard(jnp.einsum("bthl,lhw->bthw", a_BTHL, p["v_b"]), "batch", "seq", "heads", None)
    return project(p, "o", "bthw,hwd->btd", a_BTHW, shard, "batch", "seq", None), layer_cache


def forward(
    c: Config, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None, cache: Cache | None = None
) -> Output:
    k1, k2 = layers.subkeys(key, 2)
    mask, cache = decoder.mask_and_cache(batch, cache)
    rows = dict(mask=mask, sin_cos=rope.table(c.rope, c.rotated_width, batch["positions"]))

    def block(p: dict, state: Any, rows: dict, key: Key, _: Any, layer_cache: Any) -> tuple[Any, Any]:
        x_BTD, tally = state
        k1, k2 = layers.subkeys(key, 2)
        h_BTD = rms_norm(x_BTD, p["norm1"], c.eps)
        a_BTD, layer_cache = latent_attention(c, p, h_BTD, **rows, shard=shard, cache=cache, layer_cache=layer_cache)
        x_BTD += layers.dropout(a_BTD, c.dropout, k1)
        h_BTD = rms_norm(x_BTD, p["norm2"], c.eps)
        if "router" in p:
            d_BTD, now = moe.mixture(c.moe, p, h_BTD, rows["mask"].segments_BT, shard=shard, may_drop=cache is None)
            tally = tally.plus(now)
        else:
            d_BTD = layers.mlp(p, h_BTD, "silu", shard)
        return (x_BTD + layers.dropout(d_BTD, c.dropout, k2), tally), layer_cache

    x_BTD = layers.dropout(layers.embed(params["embed"], batch["tokens"], shard), c.dropout, k1)
    sizes = dict(dense=c.dense, blocks=c.layers - c.dense)
    stacks = [(params[name], specs[name], [None] * n) for name, n in sizes.items() if n]
    (x_BTD, tally), cache = block_stack.run_stacks(
        block, stacks, (x_BTD, moe.start(x_BTD, shard)), rows, shard=shard, key=k2, cache=cache
    )
    x_BTD = rms_norm(x_BTD, params["norm"], c.eps)
    return Output(x_BTD, tally.aux_B, cache, tally.shown(c.moe, sizes["blocks"]))


def init_cache(c: Config, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
    widths = dict(latent=c.latent, rotated=c.rotated_width)
    each = [{n: jnp.zeros((rows, length, width), dtype) for n, width in widths.items()} for _ in range(c.layers)]
    return empty_cache(each, rows, length)


readout = decoder.readout


# Published files.

ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
MODEL_TYPES = tuple(ARCHITECTURES)
OF_TOKENS = {"deepseek_v2": "", "deepseek_v3": "score"}  # the matrix of a head on each token


def task_files(c: Config, task: Task) -> TaskFiles | None:
    return decoder.task_files(c, task, names(c), to_hf, of_tokens=OF_TOKENS[c.model_type])


# The layer after the last one of V3's files predicts a second token, which nothing here uses.
FILES = Files(ignored=(*decoder.FILES.ignored, r"model\.layers\.61\..*"), task=task_files)


def names(c: Config) -> dict[str, Name]:
    stacks = {"dense": 0, "blocks": c.dense}
    attention, mlp = decoder.LAYER + "self_attn.", decoder.LAYER + "mlp."
    table = decoder.names(stacks)
    for s, first in stacks.items():
        table |= {
            f"{s}/q_a": linear(attention + "q_a_proj.weight", first=first),
            f"{s}/q_a_bias": vector(attention + "q_a_proj.bias", first=first),
            f"{s}/q_norm": vector(attention + "q_a_layernorm.weight", first=first),
            f"{s}/q_b": linear(attention + "q_b_proj.weight", first=first),
            f"{s}/kv_norm": vector(attention + "kv_a_layernorm.weight", first=first),
        }
        a, b = attention + "kv_a_proj_with_mqa.", attention + "kv_b_proj.weight"
        table |= fused(linear, a + "weight", f"{s}/kv_a", f"{s}/k_rotated", first=first)
        table |= fused(vector, a + "bias", f"{s}/kv_a_bias", f"{s}/k_rotated_bias", first=first)
        table |= fused(linear, b, f"{s}/k_b", f"{s}/v_b", axis=1, first=first)
    for n in ("gate", "up", "down"):
        table |= {
            f"blocks/experts/{n}": linear(mlp + f"experts.{{expert}}.{n}_proj.weight", first=c.dense),
            f"blocks/shared/{n}": linear(mlp + f"shared_experts.{n}_proj.weight", first=c.dense),
        }
    return table | {
        "blocks/router": linear(mlp + "gate.weight", first=c.dense),
        "blocks/selection_bias": vector(mlp + "gate.e_score_correction_bias", first=c.dense),
    }


METHODS = {"deepseek_v2": ("greedy", "group_limited_greedy"), "deepseek_v3": ("noaux_tc",)}


def from_hf(values: dict[str, Any]) -> Config:
    kind, heads = values["model_type"], values["num_attention_heads"]
    v3 = kind == "deepseek_v3"
    method = values.get("topk_method") or METHODS[kind][0]
    refused = {
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "topk_method": method not in METHODS[kind],
        "scoring_func": values.get("scoring_func", "sigmoid" if v3 else "softmax") != ("sigmoid" if v3 else "softmax"),
        "norm_topk_prob": not v3 and bool(values.get("norm_topk_prob", False)),
        "num_key_value_heads": (values.get("num_key_value_heads") or heads) != heads,
        "mlp_bias": bool(values.get("mlp_bias", False)),
        "moe_layer_freq": values.get("moe_layer_freq", 1) != 1,
    }
    for name, wrong in refused.items():
        if wrong:
            raise ValueError(f"config.json: {name} {values[name]!r} of {kind} is not supported")
    grouped = v3 or method == "group_limited_greedy"
    groups = (values.get("n_group", 8 if v3 else None) or 1) if grouped else 1
    ffn = values.get("moe_intermediate_size", 2048 if v3 else 1407)
    return Config(
        vocab=values["vocab_size"],
        layers=values["num_hidden_layers"],
        width=values["hidden_size"],
        heads=heads,
        plain_width=values.get("qk_nope_head_dim", 128),
        rotated_width=values.get("qk_rope_head_dim", 64),
        value_width=values.get("v_head_dim", 128),
        query_rank=values.get("q_lora_rank", 1536),
        latent=values.get("kv_lora_rank", 512),
        moe=Moe(
            experts=values.get("n_routed_experts") or values["num_local_experts" if v3 else "num_experts"],
            top_k=values["num_experts_per_tok"],
            ffn=ffn,
            shared=ffn * (values.get("n_shared_experts", 1 if v3 else 2) or 0),
            score="sigmoid" if v3 else "softmax",
            normalized=v3 and bool(values.get("norm_topk_prob", True)),
            scale=values.get("routed_scaling_factor", 2.5 if v3 else 1.0),
            groups=groups,
            top_groups=(values.get("topk_group", 4 if v3 else None) or 1) if groups > 1 else 1,
            selection_bias=v3,
            balance=1e-4 if v3 else 1e-3,
        ),
        dense=values.get("first_k_dense_replace", 3 if v3 else 0) or 0,
        ffn=values["intermediate_size"],
        positions=values.get("max_position_embeddings"),
        rope=rope.from_hf(values, 1e4),
        interleaved=not v3 or values.get("rope_interleave", True) is not False,
        attention_bias=bool(values.get("attention_bias", False)),
        tied=bool(values.get("tie_word_embeddings", False)),
        eps=values.get("rms_norm_eps", 1e-6),
        model_type=kind,
    )


def to_hf(c: Config) -> dict[str, Any]:
    """Returns what config.json says of the architecture; refuses a model that its `model_type` can't express."""
    kind, m, v3 = c.model_type, c.moe, c.model_type == "deepseek_v3"
    published = Moe(
        experts=m.experts, top_k=m.top_k, ffn=m.ffn, shared=max(1, m.shared // m.ffn) * m.ffn, scale=m.scale,
        score="sigmoid" if v3 else "softmax", normalized=v3 and m.normalized, selection_bias=v3,
        groups=m.groups, top_groups=m.top_groups,
    )  # fmt: skip
    moe.check_published(m, published, kind)
    if not v3 and not c.interleaved:
        raise ValueError("model.interleaved: files of model_type 'deepseek_v2' always are; set it, or use deepseek_v3")
    out: dict[str, Any] = dict(
        architectures=[ARCHITECTURES[kind]], model_type=kind, vocab_size=c.vocab, num_hidden_layers=c.layers,
        hidden_size=c.width, num_attention_heads=c.heads, num_key_value_heads=c.heads, hidden_act="silu",
        qk_nope_head_dim=c.plain_width, qk_rope_head_dim=c.rotated_width, v_head_dim=c.value_width,
        q_lora_rank=c.query_rank, kv_lora_rank=c.latent, intermediate_size=c.ffn, moe_intermediate_size=m.ffn,
        n_routed_experts=m.experts, n_shared_experts=m.shared // m.ffn, num_experts_per_tok=m.top_k,
        routed_scaling_factor=m.scale, n_group=m.groups, topk_group=m.top_groups, norm_topk_prob=m.normalized,
        first_k_dense_replace=c.dense, max_position_embeddings=c.positions or 1 << 20,
        rope_parameters=rope.to_hf(c.rope), attention_bias=c.attention_bias, tie_word_embeddings=c.tied,
        rms_norm_eps=c.eps,
    )  # fmt: skip
    if v3:
        return out | dict(rope_interleave=c.interleaved, num_nextn_predict_layers=0, topk_method="noaux_tc")
    return out | dict(topk_method="group_limited_greedy" if m.groups > 1 else "greedy", mlp_bias=False)
