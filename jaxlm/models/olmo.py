"""OLMo 2 (OLMo Team 2024) is Llama with norms after each half, and on all queries and keys together.

B batch, T position, D model width, H heads, K key/value heads, C head width.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax

from jaxlm.core.ranges import Count, NonNegative
from jaxlm.core.spec import Spec, norm, normal, stacked
from jaxlm.core.weight_names import Name, vector
from jaxlm.nn import attention_layers, block_stack, decoder, layers, rope
from jaxlm.nn.cache import Cache
from jaxlm.nn.family import Batch, Key, Kind, Task, TaskFiles
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.nn.rope import Rope

kind: Kind = "decoder"
generates = True


@dataclass(frozen=True)
class Config(decoder.DecoderConfig):
    vocab: Count = 100352
    layers: Count = 16
    width: Count = 2048
    heads: Count = 16
    kv_heads: Count = 16
    head_width: Count = 128
    ffn: Count = 8192
    rope: Rope = field(default_factory=lambda: Rope(theta=5e5))
    bias: bool = False
    """Biases are added to q, k, v and o."""
    eps: NonNegative = 1e-6
    model_type: Literal["olmo2"] = "olmo2"


def block_specs(c: Config) -> dict[str, Spec]:
    D, H, K, C = c.width, c.heads, c.kv_heads, c.head_width
    return dict(
        **decoder.attention_specs(c, "qkvo" if c.bias else ""),
        q_norm=norm(H, C, axes=("heads", None))._replace(scores=True),
        k_norm=norm(K, C, axes=("kv", None)),
        norm1=norm(D)._replace(silent=0.0),
        **decoder.gated_specs(D, c.ffn),
        norm2=norm(D)._replace(silent=0.0),
    )


def specs(c: Config) -> dict[str, Any]:
    return decoder.model_specs(c, normal(0.02), {"blocks": stacked(c.layers, block_specs(c))})


def forward(
    c: Config, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None, cache: Cache | None = None
) -> Output:
    k1, k2 = layers.subkeys(key, 2)
    mask, cache = decoder.mask_and_cache(batch, cache)
    rows = dict(mask=mask, sin_cos=rope.table(c.rope, c.head_width, batch["positions"]))
    rms = partial(layers.rms_norm, eps=c.eps)

    def block(p: dict, x_BTD: jax.Array, rows: dict, key: Key, kind: Any, layer_cache: Any) -> tuple[Any, Any]:
        k1, k2 = layers.subkeys(key, 2)
        a_BTD, layer_cache = attention_layers.self_attention(
            p, x_BTD, **rows, shard=shard, norm=rms, cache=cache, layer_cache=layer_cache
        )
        x_BTD += layers.dropout(rms(a_BTD, p["norm1"]), c.dropout, k1)
        d_BTD = layers.mlp(p, x_BTD, "silu", shard)
        return x_BTD + layers.dropout(rms(d_BTD, p["norm2"]), c.dropout, k2), layer_cache

    x_BTD = layers.dropout(layers.embed(params["embed"], batch["tokens"], shard), c.dropout, k1)
    x_BTD, cache = block_stack.run_blocks(
        block, params["blocks"], specs["blocks"], x_BTD, rows, shard=shard, key=k2, cache=cache
    )
    return Output(rms(x_BTD, params["norm"]), cache=cache)


attention_width, readout, init_cache = decoder.attention_width, decoder.readout, decoder.init_cache


# Published files.

MODEL_TYPES = ("olmo2",)


def task_files(c: Config, task: Task) -> TaskFiles | None:
    return decoder.task_files(c, task, names(c), to_hf, of_tokens="")


FILES = replace(decoder.FILES, task=task_files)


def names(c: Config) -> dict[str, Name]:
    return decoder.names() | {
        "blocks/norm1": vector(decoder.LAYER + "post_attention_layernorm.weight"),
        "blocks/norm2": vector(decoder.LAYER + "post_feedforward_layernorm.weight"),
    }


def from_hf(values: dict[str, Any]) -> Config:
    decoder.check_silu(values)
    return Config(
        **decoder.from_hf(values, eps=1e-5),
        ffn=values["intermediate_size"],
        rope=rope.from_hf(values, 1e4),
        bias=bool(values.get("attention_bias", False)),
    )


def to_hf(c: Config) -> dict[str, Any]:
    out = decoder.to_hf(c, "Olmo2ForCausalLM", 1 << 17) | dict(intermediate_size=c.ffn, attention_bias=c.bias)
    if c.head_width * c.heads == c.width:  # what files without the key mean
        del out["head_dim"]
    return out
