"""BERT (Devlin et al. 2019) and its kin: bidirectional, LayerNorm after each half, pooler, masked-LM head.

RoBERTa (also XLM-RoBERTa) counts positions from its padding id, DistilBERT has neither token types nor a pooler, MPNet
adds a bias by distance to the scores. B batch, T position, D model width, H heads, C head width, F ffn width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm import layers
from jaxlm.attention import Mask
from jaxlm.layers import Output
from jaxlm.losses import Readout
from jaxlm.names import Name, linear, same, vector
from jaxlm.params import Spec, normal, ones, stacked, zeros
from jaxlm.sharding import Layout

kind = "encoder"
generates = False


@dataclass(frozen=True)
class Config:
    vocab: int = 30522
    layers: int = 12
    width: int = 768
    heads: int = 12
    ffn: int = 3072
    positions: int = 512
    types: int = 2
    """Segment (token type) embeddings; 0: none."""
    offset: int = 0
    """Row of the position table that the first position has; those before are never read."""
    relative: bool = False
    """Add a bias by distance, shared by all layers, to the scores."""
    activation: str = "gelu"
    pooler: bool = True
    """A dense layer on the first token."""
    head: bool = True
    """The masked-LM head."""
    next_sentence: bool = False
    """The next-sentence head of published files; the objective of that name brings its own."""
    dropout: float = 0.1
    eps: float = 1e-12
    model_type: Literal["bert", "roberta", "xlm-roberta", "distilbert", "mpnet"] = "bert"
    """What published files of this model call its architecture."""


BUCKETS, LONGEST = 32, 128  # of the bias by distance; MPNet has no others


def attention_width(c: Config) -> int:
    return c.layers * c.width


def block_specs(c: Config) -> dict[str, Spec]:
    D, H, C, F = c.width, c.heads, c.width // c.heads, c.ffn
    w = normal(0.02)
    return dict(
        q=Spec((D, H, C), ("embed", "heads", None), w),
        k=Spec((D, H, C), ("embed", "heads", None), w),
        v=Spec((D, H, C), ("embed", "heads", None), w),
        q_bias=Spec((H, C), ("heads", None), zeros),
        k_bias=Spec((H, C), ("heads", None), zeros),
        v_bias=Spec((H, C), ("heads", None), zeros),
        o=Spec((H, C, D), ("heads", None, "embed"), w),
        o_bias=Spec((D,), (None,), zeros),
        norm1=Spec((D,), (None,), ones),
        norm1_bias=Spec((D,), (None,), zeros),
        up=Spec((D, F), ("embed", "ffn"), w),
        up_bias=Spec((F,), ("ffn",), zeros),
        down=Spec((F, D), ("ffn", "embed"), w),
        down_bias=Spec((D,), (None,), zeros),
        norm2=Spec((D,), (None,), ones),
        norm2_bias=Spec((D,), (None,), zeros),
    )


def specs(c: Config) -> dict[str, Any]:
    if c.width % c.heads:
        raise ValueError(f"model.width: {c.width} is not a multiple of model.heads {c.heads}")
    D, w = c.width, normal(0.02)
    out: dict[str, Any] = dict(
        embed=Spec((c.vocab, D), ("vocab", "embed"), w),
        position=Spec((c.positions + c.offset, D), (None, "embed"), w),
        norm=Spec((D,), (None,), ones),
        norm_bias=Spec((D,), (None,), zeros),
        blocks=stacked(c.layers, block_specs(c)),
    )
    if c.types:
        out["type"] = Spec((c.types, D), (None, "embed"), w)
    if c.relative:
        out["relative"] = Spec((BUCKETS, c.heads), (None, "heads"), w)
    if c.pooler:
        out |= dict(pooler=Spec((D, D), ("embed", None), w), pooler_bias=Spec((D,), (None,), zeros))
    if c.head:  # a dense layer before the tied embedding
        out |= dict(
            transform=Spec((D, D), ("embed", None), w),
            transform_bias=Spec((D,), (None,), zeros),
            transform_norm=Spec((D,), (None,), ones),
            transform_norm_bias=Spec((D,), (None,), zeros),
            head_bias=Spec((c.vocab,), ("vocab",), zeros),
        )
    if c.next_sentence:
        out |= dict(next_sentence=Spec((D, 2), ("embed", None), w), next_sentence_bias=Spec((2,), (None,), zeros))
    return out


def forward(
    c: Config, specs: Any, params: Any, batch: dict, *, shard: Layout, key: jax.Array | None = None, cache: None = None
) -> Output:
    k1, k2 = layers.subkeys(key, 2)
    tokens_BT = batch["tokens"]
    mask, T = Mask(False, None, batch.get("segments"), batch.get("segments")), tokens_BT.shape[1]
    bias_BHTS = None
    if c.relative:
        bias_BHTS = layers.relative_bias(params["relative"], mask, T, T, longest=LONGEST, both_ways=True, shard=shard)

    def block(p: dict, x_BTD: jax.Array, key: jax.Array | None, kind: Any, kept: Any) -> tuple[jax.Array, None]:
        k1, k2 = layers.subkeys(key, 2)
        bias = None if bias_BHTS is None else lambda *_: bias_BHTS
        a_BTD, _ = layers.self_attention(p, x_BTD, mask, shard=shard, bias=bias)
        x_BTD = layers.layer_norm(x_BTD + layers.dropout(a_BTD, c.dropout, k1), p["norm1"], p["norm1_bias"], c.eps)
        d_BTD = layers.dropout(layers.mlp(p, x_BTD, c.activation, shard), c.dropout, k2)
        return layers.layer_norm(x_BTD + d_BTD, p["norm2"], p["norm2_bias"], c.eps), None

    x_BTD = layers.embed(params["embed"], tokens_BT, shard)
    x_BTD += layers.embed(params["position"], batch["positions"] + c.offset, shard, rows=None)
    if c.types:
        x_BTD += layers.embed(params["type"], batch.get("types", jnp.zeros_like(tokens_BT)), shard, rows=None)
    x_BTD = layers.dropout(layers.layer_norm(x_BTD, params["norm"], params["norm_bias"], c.eps), c.dropout, k1)
    x_BTD, _ = layers.run_blocks(block, params["blocks"], specs["blocks"], x_BTD, shard=shard, key=k2)
    return Output(x_BTD)


def pooled(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> jax.Array:
    """`[B, D]`: tanh of a dense layer on the first token ([CLS])."""
    if not c.pooler:
        raise ValueError("model.pooler: this model has none; set it to true, or choose an objective without it")
    w_DD = shard.gather(params["pooler"], specs["pooler"])
    first_B1D = shard(x_BTD, "batch", None, None)[:, :1]
    out_B1D = shard.einsum("btd,de->bte", first_B1D, w_DD, "batch", None, None)
    return jnp.tanh(layers.add_bias(out_B1D, params["pooler_bias"]))[:, 0]


def readout(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    if not c.head:
        raise ValueError("model.head: this model has none, so it predicts no tokens; set it to true")
    w_DD = shard.gather(params["transform"], specs["transform"])
    h_BTD = layers.add_bias(shard.einsum("btd,de->bte", x_BTD, w_DD, "batch", "seq", None), params["transform_bias"])
    h_BTD = layers.ACTIVATIONS[c.activation](h_BTD)
    h_BTD = layers.layer_norm(h_BTD, params["transform_norm"], params["transform_norm_bias"], c.eps)
    return Readout(h_BTD, shard.gather(params["embed"], specs["embed"]), params["head_bias"])


# Published files.

STEMS = {  # of the classes that transformers has for them
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "distilbert": "DistilBert",
    "mpnet": "MPNet",
}
MODEL_TYPES = tuple(STEMS)
IGNORED = (r"(.*\.)?embeddings\.position_ids",)

BERT = dict(
    q="attention.self.query", k="attention.self.key", v="attention.self.value", o="attention.output.dense",
    norm1="attention.output.LayerNorm", up="intermediate.dense", down="output.dense", norm2="output.LayerNorm",
)  # fmt: skip
MPNET = dict(
    q="attention.attn.q", k="attention.attn.k", v="attention.attn.v", o="attention.attn.o",
    norm1="attention.LayerNorm",
)  # fmt: skip
DISTILBERT = dict(
    q="attention.q_lin", k="attention.k_lin", v="attention.v_lin", o="attention.out_lin",
    norm1="sa_layer_norm", up="ffn.lin1", down="ffn.lin2", norm2="output_layer_norm",
)  # fmt: skip
LAYER = {"bert": BERT, "roberta": BERT, "xlm-roberta": BERT, "mpnet": BERT | MPNET, "distilbert": DISTILBERT}
# The head's dense layer, its norm, and what the bias of the vocabulary belongs to.
HEADS = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions"),
    "distilbert": ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head"),
}


def names(c: Config) -> dict[str, Name]:
    stem = {"xlm-roberta": "roberta"}.get(c.model_type, c.model_type)
    trunk = f"{stem}." if c.head else ""  # a bare model's files leave it out
    layer = trunk + ("transformer.layer.{layer}." if stem == "distilbert" else "encoder.layer.{layer}.")
    transform, transform_norm, head = HEADS[stem if stem in HEADS else "roberta"]
    modules = {f"blocks/{ours}": layer + theirs for ours, theirs in LAYER[c.model_type].items()} | {
        "norm": trunk + "embeddings.LayerNorm",
        "pooler": trunk + "pooler.dense",
        "transform": transform,
        "transform_norm": transform_norm,
        "next_sentence": "cls.seq_relationship",
    }
    out = {
        "embed": same(trunk + "embeddings.word_embeddings.weight"),
        "position": same(trunk + "embeddings.position_embeddings.weight"),
        "type": same(trunk + "embeddings.token_type_embeddings.weight"),
        "relative": same(trunk + "encoder.relative_attention_bias.weight"),
        "head_bias": vector(head + ".bias"),
    }
    for ours, theirs in modules.items():
        file = theirs + ".weight"
        out[ours] = vector(file) if "norm" in ours else linear(file, ins=2 if ours == "blocks/o" else 1)
        out[f"{ours}_bias"] = vector(theirs + ".bias")
    return out
