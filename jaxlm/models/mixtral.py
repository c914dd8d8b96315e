"""Mixtral (Jiang et al. 2024) and Qwen 3 MoE have Llama's block with experts for its feed-forward half.

Qwen 3 MoE adds norms on queries and keys and may begin with dense layers.
B batch, T position, D model width.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from jaxlm.core.ranges import Count, Natural
from jaxlm.core.spec import Spec, norm, normal
from jaxlm.core.weight_names import Name, linear
from jaxlm.nn import attention_layers, block_stack, decoder, layers, moe, rope
from jaxlm.nn.cache import Cache
from jaxlm.nn.family import Batch, Key, Kind, Task, TaskFiles
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.nn.moe import Moe
from jaxlm.nn.rope import Rope

kind: Kind = "decoder"
generates = True


@dataclass(frozen=True)
class Config(decoder.DecoderConfig):
    moe: Moe = field(default_factory=Moe)
    dense: Natural = 0
    """Layers at the beginning that have a plain feed-forward network of width `ffn` (model_type qwen3_moe)."""
    ffn: Count = 2048
    """Width of the dense layers; the experts' is `moe.ffn`."""
    rope: Rope = field(default_factory=lambda: Rope(theta=1e6))
    window: Count | None = None
    """Sliding-window attention over this many positions, in every layer."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys."""
    qkvo_bias: bool = False
    model_type: Literal["mixtral", "qwen3_moe"] = "mixtral"
    """What published files of this model call its architecture."""
    layer_counts = MappingProxyType({"dense": ("layers", "dense")})


def attention_specs(c: Config) -> dict[str, Spec]:
    attention = decoder.attention_specs(c, "qkvo" if c.qkvo_bias else "", decoder.deep(c))
    norms = dict(q_norm=norm(c.head_width)._replace(scores=True), k_norm=norm(c.head_width)) if c.qk_norm else {}
    return dict(norm1=norm(c.width), norm2=norm(c.width), **attention, **norms)


def specs(c: Config) -> dict[str, Any]:
    stacks = decoder.sparse_stacks(c, attention_specs(c))
    return decoder.model_specs(c, normal(0.02 if c.tied else 1.0), stacks)


def forward(
    c: Config, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None, cache: Cache | None = None
) -> Output:
    k1, k2 = layers.subkeys(key, 2)
    mask, cache = decoder.mask_and_cache(batch, cache, c.window)
    rows = dict(mask=mask, sin_cos=rope.table(c.rope, c.head_width, batch["positions"]))
    rms = partial(layers.rms_norm, eps=c.eps)

    def block(p: dict, state: Any, rows: dict, key: Key, _: Any, layer_cache: Any) -> tuple[Any, Any]:
        x_BTD, tally = state
        k1, k2 = layers.subkeys(key, 2)
        a_BTD, layer_cache = attention_layers.self_attention(
            p, rms(x_BTD, p["norm1"]), **rows, shard=shard, norm=rms, cache=cache, layer_cache=layer_cache
        )
        x_BTD += layers.dropout(a_BTD, c.dropout, k1)
        h_BTD = rms(x_BTD, p["norm2"])
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
    return Output(rms(x_BTD, params["norm"]), tally.aux_B, cache, tally.shown(c.moe, sizes["blocks"]))


attention_width, readout, init_cache = decoder.attention_width, decoder.readout, decoder.init_cache


# Published files.

ARCHITECTURES = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
MODEL_TYPES = tuple(ARCHITECTURES)


def task_files(c: Config, task: Task) -> TaskFiles | None:
    return decoder.task_files(c, task, names(c), to_hf)


FILES = replace(decoder.FILES, task=task_files)


def names(c: Config) -> dict[str, Name]:
    mixtral = c.model_type == "mixtral"
    inner = decoder.LAYER + ("block_sparse_moe." if mixtral else "mlp.")
    experts = dict(gate="w1", up="w3", down="w2") if mixtral else {n: f"{n}_proj" for n in ("gate", "up", "down")}
    return {
        **decoder.names({"dense": 0, "blocks": c.dense}),
        "blocks/router": linear(inner + "gate.weight", first=c.dense),
        **{
            f"blocks/experts/{ours}": linear(f"{inner}experts.{{expert}}.{theirs}.weight", first=c.dense)
            for ours, theirs in experts.items()
        },
    }


def from_hf(values: dict[str, Any]) -> Config:
    decoder.check_silu(values)
    qwen = values["model_type"] == "qwen3_moe"
    return Config(
        **decoder.from_hf(values, eps=1e-6 if qwen else 1e-5),
        moe=Moe(
            experts=values["num_experts"] if qwen and "num_experts" in values else values["num_local_experts"],
            top_k=values["num_experts_per_tok"],
            ffn=values["moe_intermediate_size" if qwen else "intermediate_size"],
            normalized=bool(values.get("norm_topk_prob", False)) if qwen else True,
        ),
        dense=_dense(values) if qwen else 0,
        ffn=values["intermediate_size"],
        rope=rope.from_hf(values, 1e4 if qwen else 1e6),
        window=values.get("sliding_window") if not qwen or values.get("use_sliding_window", False) else None,
        qk_norm=qwen,
        qkvo_bias=qwen and bool(values.get("attention_bias", False)),
    )


def _dense(values: dict[str, Any]) -> int:
    """Returns how many layers without experts the model begins with; none may stand between others."""
    n, plain = values["num_hidden_layers"], values.get("mlp_only_layers") or []
    step = values.get("decoder_sparse_step", 1)
    sparse = [i not in plain and step > 0 and (i + 1) % step == 0 for i in range(n)]
    first = sparse.index(True) if True in sparse else n
    if not all(sparse[first:]) or first == n:
        named = f"mlp_only_layers {plain}" if plain else f"decoder_sparse_step {step}"
        raise ValueError(f"config.json: {named} puts dense layers after those with experts; they may only come first")
    return first


def to_hf(c: Config) -> dict[str, Any]:
    """Returns what config.json says of the architecture; refuses a model that its `model_type` can't express."""
    kind, qwen = c.model_type, c.model_type == "qwen3_moe"
    published = Moe(experts=c.moe.experts, top_k=c.moe.top_k, ffn=c.moe.ffn, normalized=c.moe.normalized or not qwen)
    moe.check_published(c.moe, published, kind)
    for name, used in dict(dense=c.dense, qkvo_bias=c.qkvo_bias, qk_norm=c.qk_norm).items():
        if used and not qwen:
            raise ValueError(f"model.{name}: not in files of model_type {kind!r}; set model.model_type=qwen3_moe")
    if qwen and not c.qk_norm:
        raise ValueError("model.qk_norm: files of model_type 'qwen3_moe' always have it; set model.model_type=mixtral")
    out = decoder.to_hf(c, ARCHITECTURES[kind]) | dict(num_experts_per_tok=c.moe.top_k, sliding_window=c.window)
    if not qwen:
        return out | dict(num_local_experts=c.moe.experts, intermediate_size=c.moe.ffn)
    return out | dict(
        num_experts=c.moe.experts, moe_intermediate_size=c.moe.ffn, norm_topk_prob=c.moe.normalized,
        mlp_only_layers=list(range(c.dense)), decoder_sparse_step=1, attention_bias=c.qkvo_bias,
        intermediate_size=c.ffn, use_sliding_window=c.window is not None,
    )  # fmt: skip
