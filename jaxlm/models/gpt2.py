"""GPT-2 (Radford et al. 2019) has learned positions, LayerNorm before each half, GELU, biases, and a tied head.

B batch, T position, D model width, H heads, C head width, F ffn width, V vocabulary.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jaxlm.core import spec
from jaxlm.core.ranges import BelowOne, Count, NonNegative
from jaxlm.core.spec import Spec, bias, layer_norm, normal, stacked
from jaxlm.core.weight_names import Name, fused, linear, same, vector
from jaxlm.nn import attention_layers, block_stack, decoder, layers
from jaxlm.nn.cache import Cache, empty_cache
from jaxlm.nn.family import Batch, Files, Key, Kind, ModelConfig, Task, TaskFiles
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import Mask

kind: Kind = "decoder"
generates = True


@dataclass(frozen=True)
class Config(ModelConfig):
    vocab: Count = 50257
    layers: Count = 12
    width: Count = 768
    heads: Count = 12
    ffn: Count | None = None
    """None: four times the width."""
    positions: Count = 1024
    tied: bool = True
    """The head is the embedding."""
    activation: str = "gelu_new"
    dropout: BelowOne = 0.0
    """Share of embeddings, attention outputs and ffn outputs that is dropped."""
    eps: NonNegative = 1e-5
    head: bool = True
    """It predicts tokens; false: files with a task's head have no other."""
    model_type = "gpt2"


def attention_width(c: Config) -> int:
    return c.layers * c.width


def block_specs(c: Config) -> dict[str, Spec]:
    D, H, C, F = c.width, c.heads, c.width // c.heads, c.ffn or 4 * c.width
    into, out = normal(0.02), normal(0.02 / math.sqrt(2 * c.layers))
    return dict(
        **layer_norm("norm1", D),
        q=Spec((D, H, C), ("embed", "heads", None), into, scores=True),
        k=Spec((D, H, C), ("embed", "heads", None), into),
        v=Spec((D, H, C), ("embed", "heads", None), into),
        q_bias=bias((H, C), "heads", None)._replace(scores=True),
        k_bias=bias((H, C), "heads", None),
        v_bias=bias((H, C), "heads", None),
        o=Spec((H, C, D), ("heads", None, "embed"), out),
        o_bias=bias(D),
        **layer_norm("norm2", D),
        up=Spec((D, F), ("embed", "ffn"), into),
        up_bias=bias(F, "ffn"),
        down=Spec((F, D), ("ffn", "embed"), out),
        down_bias=bias(D),
    )


def specs(c: Config) -> dict[str, Any]:
    if c.width % c.heads:
        raise ValueError(f"model.width: {c.width} is not a multiple of model.heads {c.heads}")
    out = dict(
        embed=spec.table(c.vocab, c.width, normal(0.02), "vocab"),
        position=spec.table(c.positions, c.width, normal(0.02)),
        blocks=stacked(c.layers, block_specs(c)),
        **layer_norm("norm", c.width, before_head=True),
    )
    if not c.tied and c.head:
        out["head"] = spec.head(c.vocab, c.width, normal(0.02))
    return out


def forward(
    c: Config, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None, cache: Cache | None = None
) -> Output:
    k1, k2 = layers.subkeys(key, 2)
    rows, cache = decoder.mask_and_cache(batch, cache)

    def block(p: dict, x_BTD: jax.Array, mask: Mask, key: Key, kind: Any, layer_cache: Any) -> tuple[Any, Any]:
        k1, k2 = layers.subkeys(key, 2)
        h_BTD = layers.layer_norm(x_BTD, p["norm1"], p["norm1_bias"], c.eps)
        a_BTD, layer_cache = attention_layers.self_attention(
            p, h_BTD, mask, shard=shard, cache=cache, layer_cache=layer_cache
        )
        x_BTD += layers.dropout(a_BTD, c.dropout, k1)
        h_BTD = layers.layer_norm(x_BTD, p["norm2"], p["norm2_bias"], c.eps)
        return x_BTD + layers.dropout(layers.mlp(p, h_BTD, c.activation, shard), c.dropout, k2), layer_cache

    x_BTD = layers.embed(params["embed"], batch["tokens"], shard)
    x_BTD += layers.embed(params["position"], batch["positions"], shard, rows=None)
    x_BTD = layers.dropout(x_BTD, c.dropout, k1)
    x_BTD, cache = block_stack.run_blocks(
        block, params["blocks"], specs["blocks"], x_BTD, rows, shard=shard, key=k2, cache=cache
    )
    return Output(layers.layer_norm(x_BTD, params["norm"], params["norm_bias"], c.eps), cache=cache)


readout = decoder.readout


def init_cache(c: Config, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
    layer_cache = attention_layers.kv_cache([None] * c.layers, rows, length, c.heads, c.width // c.heads, dtype, slack)
    return empty_cache(layer_cache, rows, length)


# Published files.

MODEL_TYPES = ("gpt2",)


def task_files(c: Config, task: Task) -> TaskFiles | None:
    return decoder.task_files(c, task, names(c), to_hf, stem="GPT2", of_tokens="classifier")


# Causal masks are kept as buffers.
FILES = Files(prefixes=("transformer.",), ignored=(r".*\.attn\.(masked_)?bias",), task=task_files)


def names(c: Config) -> dict[str, Name]:
    layer, conv = "transformer.h.{layer}.", partial(linear, order="in_out")
    qkv, biases = ("blocks/q", "blocks/k", "blocks/v"), ("blocks/q_bias", "blocks/k_bias", "blocks/v_bias")
    return {
        "embed": same("transformer.wte.weight"),
        "position": same("transformer.wpe.weight"),
        "blocks/norm1": vector(layer + "ln_1.weight"),
        "blocks/norm1_bias": vector(layer + "ln_1.bias"),
        **fused(conv, layer + "attn.c_attn.weight", *qkv),
        **fused(vector, layer + "attn.c_attn.bias", *biases),
        "blocks/o": conv(layer + "attn.c_proj.weight", ins=2),
        "blocks/o_bias": vector(layer + "attn.c_proj.bias"),
        "blocks/norm2": vector(layer + "ln_2.weight"),
        "blocks/norm2_bias": vector(layer + "ln_2.bias"),
        "blocks/up": conv(layer + "mlp.c_fc.weight"),
        "blocks/up_bias": vector(layer + "mlp.c_fc.bias"),
        "blocks/down": conv(layer + "mlp.c_proj.weight"),
        "blocks/down_bias": vector(layer + "mlp.c_proj.bias"),
        "norm": vector("transformer.ln_f.weight"),
        "norm_bias": vector("transformer.ln_f.bias"),
        "head": same("lm_head.weight"),
    }


def from_hf(values: dict[str, Any]) -> Config:
    for name, usual in dict(
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    ).items():
        if values.get(name, usual) != usual:
            raise ValueError(f"config.json: {name} {values[name]!r} of gpt2 is not supported, only {usual}")
    activation = values.get("activation_function", "gelu_new")
    if activation not in layers.ACTIVATIONS:
        raise ValueError(f"config.json: activation_function {activation!r} is unknown")
    return Config(
        vocab=values["vocab_size"],
        layers=values["n_layer"],
        width=values["n_embd"],
        heads=values["n_head"],
        ffn=values.get("n_inner"),
        positions=values["n_positions"],
        tied=bool(values.get("tie_word_embeddings", True)),
        activation=activation,
        dropout=float(values.get("resid_pdrop", 0.1)),
        eps=values.get("layer_norm_epsilon", 1e-5),
    )


def to_hf(c: Config) -> dict[str, Any]:
    return dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=c.vocab, n_layer=c.layers, n_embd=c.width,
        n_head=c.heads, n_inner=c.ffn, n_positions=c.positions, activation_function=c.activation,
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=0.0, layer_norm_epsilon=c.eps,
        tie_word_embeddings=c.tied,
    )  # fmt: skip
