"""GPT-OSS (OpenAI 2025) has experts with biases, attention sinks, and a sliding window in every other layer.

B batch, T position, D model width, H heads.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.core.ranges import Count, Positive
from jaxlm.core.spec import Spec, norm, normal, stacked, zeros
from jaxlm.core.weight_names import Name, fused, linear, vector
from jaxlm.nn import attention_layers, block_stack, decoder, layers, moe, rope
from jaxlm.nn.cache import Cache
from jaxlm.nn.family import Batch, Files, Key, Kind, Task, TaskFiles
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.nn.moe import Moe
from jaxlm.nn.rope import Rope

kind: Kind = "decoder"
generates = True

YARN = Rope(theta=150000.0, scaling="yarn", factor=32.0, trained=4096, truncate=False)


@dataclass(frozen=True)
class Config(decoder.WindowedConfig):
    moe: Moe = field(default_factory=Moe)
    alpha: Positive = 1.702
    """Slope of the sigmoid that the gate goes through."""
    limit: Positive = 7.0
    """Gates above it and other halves beyond it are cut off."""
    rope: Rope = YARN
    window: Count | None = 128
    windowed: tuple[bool, ...] = (True, False)
    attention_bias: bool = True
    model_type: Literal["gpt_oss"] = "gpt_oss"
    """What published files of this model call its architecture."""


def block_specs(c: Config) -> dict[str, Any]:
    scale = decoder.deep(c)
    return dict(
        norm1=norm(c.width),
        **decoder.attention_specs(c, "qkvo" if c.attention_bias else "", scale),
        sinks=Spec((c.heads,), ("heads",), zeros),
        norm2=norm(c.width),
        **moe.specs(c.moe, c.width, deep=scale, biases=True),
    )


def specs(c: Config) -> dict[str, Any]:
    return decoder.model_specs(c, normal(0.02 if c.tied else 1.0), {"blocks": stacked(c.layers, block_specs(c))})


def gated(alpha: float, limit: float, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Computes the clamped SwiGLU gate · sigmoid(α · gate) · (up + 1)."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def forward(
    c: Config, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None, cache: Cache | None = None
) -> Output:
    k1, k2 = layers.subkeys(key, 2)
    mask, cache = decoder.mask_and_cache(batch, cache)
    rows = dict(mask=mask, sin_cos=rope.table(c.rope, c.head_width, batch["positions"]))
    act, rms = partial(gated, c.alpha, c.limit), partial(layers.rms_norm, eps=c.eps)

    def block(p: dict, state: Any, rows: dict, key: Key, window: Any, layer_cache: Any) -> tuple[Any, Any]:
        x_BTD, tally = state
        k1, k2 = layers.subkeys(key, 2)
        mask, sin_cos = replace(rows["mask"], window=window), rows["sin_cos"]
        a_BTD, layer_cache = attention_layers.self_attention(
            p, rms(x_BTD, p["norm1"]), mask, shard=shard, sin_cos=sin_cos, cache=cache, layer_cache=layer_cache
        )
        x_BTD += layers.dropout(a_BTD, c.dropout, k1)
        h_BTD = rms(x_BTD, p["norm2"])
        d_BTD, now = moe.mixture(c.moe, p, h_BTD, mask.segments_BT, shard=shard, act=act, may_drop=cache is None)
        return (x_BTD + layers.dropout(d_BTD, c.dropout, k2), tally.plus(now)), layer_cache

    x_BTD = layers.dropout(layers.embed(params["embed"], batch["tokens"], shard), c.dropout, k1)
    state, kinds = (x_BTD, moe.start(x_BTD, shard)), decoder.windows(c)
    (x_BTD, tally), cache = block_stack.run_blocks(
        block, params["blocks"], specs["blocks"], state, rows, shard=shard, key=k2, kinds=kinds, cache=cache
    )
    return Output(rms(x_BTD, params["norm"]), tally.aux_B, cache, tally.shown(c.moe, c.layers))


attention_width, readout, init_cache = decoder.attention_width, decoder.readout, decoder.init_cache


# Published files.

MODEL_TYPES = ("gpt_oss",)


def task_files(c: Config, task: Task) -> TaskFiles | None:
    return decoder.task_files(c, task, names(c), to_hf)


FILES = Files(task=task_files)


def names(c: Config) -> dict[str, Name]:
    mlp = decoder.LAYER + "mlp."
    gate_up = tuple(f"blocks/experts/{n}" for n in ("gate", "up"))
    return {
        **decoder.names(),
        **fused(linear, mlp + "experts.gate_up_proj", *gate_up, axis=-1, order="in_out"),
        **fused(vector, mlp + "experts.gate_up_proj_bias", *(f"{n}_bias" for n in gate_up), axis=-1),
        "blocks/experts/down": linear(mlp + "experts.down_proj", order="in_out"),
        "blocks/experts/down_bias": vector(mlp + "experts.down_proj_bias"),
        "blocks/sinks": vector(decoder.LAYER + "self_attn.sinks"),
        "blocks/router": linear(mlp + "router.weight"),
        "blocks/router_bias": vector(mlp + "router.bias"),
    }


def from_hf(values: dict[str, Any]) -> Config:
    decoder.check_silu(values)
    n = values["num_hidden_layers"]
    types = values.get("layer_types") or ["full_attention" if i % 2 else decoder.SLIDING for i in range(n)]
    stretched = values.get("rope_parameters") or values.get("rope_scaling")
    return Config(
        **decoder.from_hf(values, eps=1e-5),
        moe=Moe(
            experts=values["num_local_experts"],
            top_k=values.get("num_experts_per_tok") or values["experts_per_token"],
            ffn=values["intermediate_size"],
        ),
        alpha=values.get("swiglu_alpha", 1.702),
        limit=values.get("swiglu_limit", 7.0),
        rope=rope.from_hf(values, YARN.theta) if stretched else YARN,
        window=values.get("sliding_window", 128),
        windowed=block_stack.pattern([t == decoder.SLIDING for t in types]),
        attention_bias=bool(values.get("attention_bias", True)),
    )


def to_hf(c: Config) -> dict[str, Any]:
    """Returns what config.json says of the architecture; refuses a model that it can't express."""
    moe.check_published(c.moe, Moe(experts=c.moe.experts, top_k=c.moe.top_k, ffn=c.moe.ffn), "gpt_oss")
    windowed = block_stack.repeated(c.windowed, c.layers)
    return decoder.to_hf(c, "GptOssForCausalLM") | dict(
        num_local_experts=c.moe.experts, num_experts_per_tok=c.moe.top_k, intermediate_size=c.moe.ffn,
        swiglu_alpha=c.alpha, swiglu_limit=c.limit, sliding_window=c.window, attention_bias=c.attention_bias,
        layer_types=[decoder.SLIDING if w else "full_attention" for w in windowed],
    )  # fmt: skip
