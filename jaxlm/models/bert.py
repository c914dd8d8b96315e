"""BERT (Devlin et al. 2019) and its kin are bidirectional, with LayerNorm after each half.

RoBERTa (also XLM-RoBERTa) counts positions from its padding id, DistilBERT has neither token types nor a pooler, MPNet
adds a bias by distance to the scores.
B batch, T position, D model width, H heads, C head width, F ffn width, V vocabulary.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.core.ranges import BelowOne, Count, Natural, NonNegative
from jaxlm.core.spec import Spec, bias, layer_norm, normal, stacked, table
from jaxlm.core.weight_names import Name, linear, same, vector
from jaxlm.nn import attention_layers, block_stack, layers
from jaxlm.nn.cache import Cache
from jaxlm.nn.family import Batch, Files, Key, Kind, ModelConfig, Task, TaskFiles, TaskLayer, no_cache
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import Readout
from jaxlm.nn.mask import Mask

kind: Kind = "encoder"
generates = False


@dataclass(frozen=True)
class Config(ModelConfig):
    vocab: Count = 30522
    layers: Count = 12
    width: Count = 768
    heads: Count = 12
    ffn: Count = 3072
    positions: Count = 512
    types: Natural = 2
    """Segment (token type) embeddings; 0: none."""
    offset: Natural = 0
    """Row of the position table that the first position has; those before are never read."""
    relative: bool = False
    """Add a bias by distance, shared by all layers, to the scores."""
    activation: str = "gelu"
    pooler: bool = True
    """A dense layer on the first token."""
    pooler_activation: Literal["tanh", "relu"] = "tanh"
    head: bool = True
    """The masked-LM head."""
    next_sentence: bool = False
    """The next-sentence head of published files; the objective of that name brings its own."""
    dropout: BelowOne = 0.1
    eps: NonNegative = 1e-12
    model_type: Literal["bert", "roberta", "xlm-roberta", "distilbert", "mpnet"] = "bert"
    """What published files of this model call its architecture."""

    @property
    def task_layer(self) -> TaskLayer | None:
        """The pooler, which heads that read a text as a whole read, if there is one."""
        return TaskLayer("pooler", self.pooler_activation) if self.pooler else None


BUCKETS, LONGEST = 32, 128  # of the bias by distance; MPNet has no others


def attention_width(c: Config) -> int:
    return c.layers * c.width


def block_specs(c: Config) -> dict[str, Spec]:
    D, H, C, F = c.width, c.heads, c.width // c.heads, c.ffn
    w = normal(0.02)
    return dict(
        q=Spec((D, H, C), ("embed", "heads", None), w, scores=True),
        k=Spec((D, H, C), ("embed", "heads", None), w),
        v=Spec((D, H, C), ("embed", "heads", None), w),
        q_bias=bias((H, C), "heads", None)._replace(scores=True),
        k_bias=bias((H, C), "heads", None),
        v_bias=bias((H, C), "heads", None),
        o=Spec((H, C, D), ("heads", None, "embed"), w),
        o_bias=bias(D),
        **layer_norm("norm1", D),
        up=Spec((D, F), ("embed", "ffn"), w),
        up_bias=bias(F, "ffn"),
        down=Spec((F, D), ("ffn", "embed"), w),
        down_bias=bias(D),
        **layer_norm("norm2", D),
    )


def specs(c: Config) -> dict[str, Any]:
    if c.width % c.heads:
        raise ValueError(f"model.width: {c.width} is not a multiple of model.heads {c.heads}")
    D, w = c.width, normal(0.02)
    out: dict[str, Any] = dict(
        embed=table(c.vocab, D, w, "vocab"),
        position=table(c.positions + c.offset, D, w),
        **layer_norm("norm", D, below_layers=True),
        blocks=stacked(c.layers, block_specs(c)),
    )
    if c.types:
        out["type"] = table(c.types, D, w)
    if c.relative:
        out["relative"] = Spec((BUCKETS, c.heads), (None, "heads"), w, below_layers=True)
    if c.pooler:
        out |= dict(pooler=Spec((D, D), ("embed", None), w), pooler_bias=bias(D))
    if c.head:  # a dense layer before the tied embedding
        out |= dict(
            transform=Spec((D, D), ("embed", None), w),
            transform_bias=bias(D),
            **layer_norm("transform_norm", D, before_head=True),
            head_bias=bias(c.vocab, "vocab"),
        )
    if c.next_sentence:
        out |= dict(next_sentence=Spec((D, 2), ("embed", None), w), next_sentence_bias=bias(2))
    return out


def forward(
    c: Config, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None, cache: Cache | None = None
) -> Output:
    k1, k2 = layers.subkeys(key, 2)
    tokens_BT = batch["tokens"]
    mask, T = Mask(False, None, batch.get("segments"), batch.get("segments"), packed=True), tokens_BT.shape[1]
    bias_BHTS = None
    if c.relative:
        bias_BHTS = attention_layers.relative_bias(
            params["relative"], mask, T, T, longest=LONGEST, both_ways=True, shard=shard
        )

    def block(p: dict, x_BTD: jax.Array, mask: Mask, key: Key, kind: Any, layer_cache: Any) -> tuple[Any, Any]:
        k1, k2 = layers.subkeys(key, 2)
        bias = None if bias_BHTS is None else lambda *_: bias_BHTS
        a_BTD, _ = attention_layers.self_attention(p, x_BTD, mask, shard=shard, bias=bias)
        x_BTD = layers.layer_norm(x_BTD + layers.dropout(a_BTD, c.dropout, k1), p["norm1"], p["norm1_bias"], c.eps)
        d_BTD = layers.dropout(layers.mlp(p, x_BTD, c.activation, shard), c.dropout, k2)
        return layers.layer_norm(x_BTD + d_BTD, p["norm2"], p["norm2_bias"], c.eps), None

    x_BTD = layers.embed(params["embed"], tokens_BT, shard)
    x_BTD += layers.embed(params["position"], batch["positions"] + c.offset, shard, rows=None)
    if c.types:
        x_BTD += layers.embed(params["type"], batch.get("types", jnp.zeros_like(tokens_BT)), shard, rows=None)
    x_BTD = layers.dropout(layers.layer_norm(x_BTD, params["norm"], params["norm_bias"], c.eps), c.dropout, k1)
    x_BTD, _ = block_stack.run_blocks(block, params["blocks"], specs["blocks"], x_BTD, mask, shard=shard, key=k2)
    return Output(x_BTD)


def readout(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    if not c.head:
        raise ValueError("model.head: this model has none, so it predicts no tokens; set it to true")
    w_DD = shard.gather(params["transform"], specs["transform"])
    h_BTD = layers.add_bias(shard.einsum("btd,de->bte", x_BTD, w_DD, "batch", "seq", None), params["transform_bias"])
    fixed = c.model_type in ("roberta", "xlm-roberta", "mpnet")  # whatever the layers have
    h_BTD = layers.ACTIVATIONS["gelu" if fixed else c.activation](h_BTD)
    h_BTD = layers.layer_norm(h_BTD, params["transform_norm"], params["transform_norm_bias"], c.eps)
    return Readout(h_BTD, shard.gather(params["embed"], specs["embed"]), params["head_bias"])


init_cache = no_cache


# Published files.

STEMS = {  # of the classes that transformers has for them
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "distilbert": "DistilBert",
    "mpnet": "MPNet",
}
MODEL_TYPES = tuple(STEMS)

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
CLS, LM = "cls.predictions.", "lm_head."
# The head's dense layer, its norm, the matrix that is the embedding, and the bias of the vocabulary.
HEADS = {
    "bert": (CLS + "transform.dense", CLS + "transform.LayerNorm", CLS + "decoder.weight", CLS + "bias"),
    "distilbert": ("vocab_transform", "vocab_layer_norm", "vocab_projector.weight", "vocab_projector.bias"),
    "roberta": (LM + "dense", LM + "layer_norm", LM + "decoder.weight", LM + "bias"),
}


PREFIXES = {"xlm-roberta": "roberta"}  # of names in files, where it is not the model_type


def names(c: Config) -> dict[str, Name]:
    return _names(c, f"{PREFIXES.get(c.model_type, c.model_type)}." if c.head else "")  # a bare model leaves it out


def _names(c: Config, trunk: str) -> dict[str, Name]:
    stem = PREFIXES.get(c.model_type, c.model_type)
    layer = trunk + ("transformer.layer.{layer}." if stem == "distilbert" else "encoder.layer.{layer}.")
    transform, transform_norm, head, head_bias = HEADS[stem if stem in HEADS else "roberta"]
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
        "head": same(head),  # never a weight of ours: files may hold the embedding under this name too
        "head_bias": vector(head_bias),
    }
    for ours, theirs in modules.items():
        file = theirs + ".weight"
        out[ours] = vector(file) if "norm" in ours else linear(file, ins=2 if ours == "blocks/o" else 1)
        out[f"{ours}_bias"] = vector(theirs + ".bias")
    return out


# Names of config.json, by ours. Their attention has a dropout of its own, ours has none.
FIELDS = dict(
    vocab="vocab_size", layers="num_hidden_layers", width="hidden_size", heads="num_attention_heads",
    ffn="intermediate_size", activation="hidden_act", dropout="hidden_dropout_prob",
)  # fmt: skip
DISTILBERT_FIELDS = dict(
    vocab="vocab_size", layers="n_layers", width="dim", heads="n_heads", ffn="hidden_dim", activation="activation",
    dropout="dropout",
)  # fmt: skip
ONLY = dict(  # values that change what a model computes, and the only one we compute
    position_embedding_type="absolute", is_decoder=False, add_cross_attention=False, tie_word_embeddings=True,
    relative_attention_num_buckets=BUCKETS,
)  # fmt: skip


def from_hf(values: dict[str, Any]) -> Config:
    kind = values["model_type"]
    for name, only in ONLY.items():
        if values.get(name, only) != only:
            raise ValueError(f"config.json: {name} {values[name]!r} of {kind} is not supported, only {only!r}")
    architecture = (values.get("architectures") or [f"{STEMS[kind]}Model"])[0]
    part = architecture.removeprefix(STEMS[kind])
    ours = {ours: values[name] for ours, name in (DISTILBERT_FIELDS if kind == "distilbert" else FIELDS).items()}
    if ours["activation"] not in layers.ACTIVATIONS:
        raise ValueError(f"config.json: activation {ours['activation']!r} of {kind} is unknown")
    offset = 0
    if kind not in ("bert", "distilbert"):  # MPNet's code has its padding id written into it
        offset = 2 if kind == "mpnet" else values.get("pad_token_id", 1) + 1
    return Config(
        **ours,
        positions=values["max_position_embeddings"] - offset,
        types=0 if kind in ("distilbert", "mpnet") else values.get("type_vocab_size", 2),
        offset=offset,
        relative=kind == "mpnet",
        pooler=bool(values.get("add_pooling_layer", part != "ForMaskedLM" and kind != "distilbert")),
        head=part in ("ForMaskedLM", "ForPreTraining"),
        next_sentence=part == "ForPreTraining",
        eps=values.get("layer_norm_eps", 1e-12),
        model_type=kind,
    )


def infer_from_files(c: Config, files: Collection[str]) -> Config:
    """Returns the config with the heads that the files have: config.json often names the class of another model."""

    def has(module: str) -> bool:
        return any(name.endswith(f"{module}.weight") for name in files)

    head = has(names(c)["transform"].file.removesuffix(".weight"))
    return replace(c, head=head, pooler=has("pooler.dense"), next_sentence=head and has("cls.seq_relationship"))


def task_files(c: Config, task: Task) -> TaskFiles:
    """Returns how files with a task's head look. Heads of whole texts read the pooler, which stands elsewhere in files
    of DistilBERT and of RoBERTa's and MPNet's classifiers."""
    stem, distilled = PREFIXES.get(c.model_type, c.model_type), c.model_type == "distilbert"
    whole = task in ("SequenceClassification", "MultipleChoice")
    c = replace(c, head=False, next_sentence=False, pooler=whole)
    c = replace(c, pooler_activation="relu" if distilled else "tanh") if whole else c
    table, last = _names(c, f"{stem}."), "qa_outputs" if task == "QuestionAnswering" else "classifier"
    if whole and distilled:
        pooler = "pre_classifier"
    elif task == "SequenceClassification" and c.model_type != "bert":
        pooler, last = "classifier.dense", "classifier.out_proj"
    else:
        pooler = f"{stem}.pooler.dense"
    del table["head"]
    table |= {"pooler": linear(f"{pooler}.weight"), "pooler_bias": vector(f"{pooler}.bias")}
    table |= {"task": linear(f"{last}.weight"), "task_bias": vector(f"{last}.bias")}

    def values() -> dict[str, Any]:
        said = to_hf(replace(c, pooler=False)) | dict(architectures=[f"{STEMS[c.model_type]}For{task}"])
        return {name: value for name, value in said.items() if name != "add_pooling_layer"}

    unread = () if pooler.startswith(stem) and whole else (r"(.*\.)?pooler\.dense\.(weight|bias)",)
    return TaskFiles(c, table, values, unread)


FILES = Files(
    prefixes=("bert.", "roberta.", "distilbert.", "mpnet."),
    ignored=(r"(.*\.)?embeddings\.position_ids",),
    tied={"cls.predictions.decoder.bias": "cls.predictions.bias", "lm_head.decoder.bias": "lm_head.bias"},
    infer_from_files=infer_from_files,
    task=task_files,
)


def to_hf(c: Config) -> dict[str, Any]:
    """Returns what config.json says of the architecture; refuses a model that its `model_type` can't express."""
    kind = c.model_type
    fits = dict(
        types=(c.types > 0) == (kind not in ("distilbert", "mpnet")),
        offset={"bert": c.offset == 0, "distilbert": c.offset == 0, "mpnet": c.offset == 2}.get(kind, c.offset > 0),
        relative=c.relative == (kind == "mpnet"),
        pooler=not (c.pooler and kind == "distilbert"),
        pooler_activation=not c.pooler or c.pooler_activation == "tanh",
        next_sentence=not c.next_sentence or (kind == "bert" and c.head and c.pooler),
        eps=c.eps == 1e-12 or kind != "distilbert",
    )
    for name, ok in fits.items():
        if not ok:
            raise ValueError(f"model.{name}: {getattr(c, name)} isn't in {kind!r} files; set another model.model_type")
    part = "ForPreTraining" if c.next_sentence else "ForMaskedLM" if c.head else "Model"
    out: dict[str, Any] = dict(architectures=[STEMS[kind] + part], model_type=kind)
    out |= {name: getattr(c, ours) for ours, name in (DISTILBERT_FIELDS if kind == "distilbert" else FIELDS).items()}
    out |= dict(max_position_embeddings=c.positions + c.offset, tie_word_embeddings=True)
    if kind == "distilbert":
        return out | dict(attention_dropout=0.0, sinusoidal_pos_embds=False)
    out |= dict(attention_probs_dropout_prob=0.0, layer_norm_eps=c.eps)
    if c.types:
        out["type_vocab_size"] = c.types
    if c.offset and kind != "mpnet":
        out["pad_token_id"] = c.offset - 1
    if c.relative:
        out["relative_attention_num_buckets"] = BUCKETS
    if c.pooler != (part != "ForMaskedLM"):  # what the class doesn't say
        out["add_pooling_layer"] = c.pooler
    return out
