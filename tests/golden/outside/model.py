"""A Transformer of one's own in a package of one's own: Llama's blocks with a learned scale of what each layer adds.

B batch, T position, D model width.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

import jaxlm
from jaxlm.core.spec import Spec, norm, normal, ones, stacked
from jaxlm.core.weight_names import Name
from jaxlm.nn import attention_layers, block_stack, decoder, layers
from jaxlm.nn.cache import Cache, empty_cache
from jaxlm.nn.family import Batch, Files, Key, Kind, ModelConfig
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout

kind: Kind = "decoder"
generates = True
readout = decoder.readout
MODEL_TYPES = ()
FILES = Files()


@dataclass(frozen=True)
class Config(ModelConfig):
    vocab: int = 384
    layers: int = 1
    width: int = 32
    heads: int = 2
    ffn: int = 64
    positions: int = 64
    tied: bool = False


def attention_width(c: Config) -> int:
    return c.layers * c.width


def specs(c: Config) -> dict[str, Any]:
    D, H, C = c.width, c.heads, c.width // c.heads
    block = dict(
        norm1=norm(D),
        **{name: Spec((D, H, C), ("embed", "heads", None), normal(0.05)) for name in ("q", "k", "v")},
        o=Spec((H, C, D), ("heads", None, "embed"), normal(0.05)),
        norm2=norm(D),
        **decoder.gated_specs(D, c.ffn, decoder.deep(c)),
        scale=Spec((D,), (None,), ones, role="norm"),
    )
    return decoder.model_specs(c, normal(0.5), {"blocks": stacked(c.layers, block)})


def forward(
    c: Config, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None, cache: Cache | None = None
) -> Output:
    rms = partial(layers.rms_norm, eps=1e-5)
    rows, cache = decoder.mask_and_cache(batch, cache)

    def block(p: dict, x_BTD: jax.Array, mask: Any, key: Key, kind: Any, layer_cache: Any) -> tuple[Any, Any]:
        a_BTD, layer_cache = attention_layers.self_attention(
            p, rms(x_BTD, p["norm1"]), mask, shard=shard, cache=cache, layer_cache=layer_cache
        )
        x_BTD += a_BTD * p["scale"].astype(a_BTD.dtype)[None, None]
        return x_BTD + layers.mlp(p, rms(x_BTD, p["norm2"]), "silu", shard), layer_cache

    x_BTD = layers.embed(params["embed"], batch["tokens"], shard)
    x_BTD, cache = block_stack.run_blocks(
        block, params["blocks"], specs["blocks"], x_BTD, rows, shard=shard, key=key, cache=cache
    )
    return Output(rms(x_BTD, params["norm"]), cache=cache)


def init_cache(c: Config, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
    stored = attention_layers.kv_cache([None] * c.layers, rows, length, c.heads, c.width // c.heads, dtype, slack)
    return empty_cache(stored, rows, length)


def names(c: Config) -> dict[str, Name]:
    return {}


def from_hf(values: dict[str, Any]) -> Config:
    raise ValueError("config.json: there are no published files of scaled models")


def to_hf(c: Config) -> dict[str, Any]:
    raise ValueError("model: scaled models have no published files; export stablehlo")


jaxlm.register_model("scaled", sys.modules[__name__])
