"""ModernBERT (Warner et al. 2024) has RoPE, local and global layers, a norm before each half, and a gated ffn.

The first layer has no norm before its attention, since the embeddings' own norm comes right before; it stands alone
under `first`, so that the others are one stack. B batch, T position, D model width, H heads, C head width, F ffn width.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax

from jaxlm.core import spec
from jaxlm.core.ranges import BelowOne, Count, NonNegative
from jaxlm.core.spec import Spec, bias, normal, stacked
from jaxlm.core.weight_names import Name, fused, linear, same, vector
from jaxlm.nn import attention_layers, block_stack, layers, rope
from jaxlm.nn.cache import Cache
from jaxlm.nn.family import Batch, Files, Key, Kind, ModelConfig, Task, TaskFiles, TaskLayer, no_cache
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import Readout
from jaxlm.nn.mask import Mask
from jaxlm.nn.rope import Rope

kind: Kind = "encoder"
generates = False


@dataclass(frozen=True)
class Config(ModelConfig):
    vocab: Count = 50368
    layers: Count = 22
    width: Count = 768
    heads: Count = 12
    ffn: Count = 1152
    positions: Count = 8192
    rope: Rope = field(default_factory=lambda: Rope(theta=160_000.0))
    rope_local: Rope = field(default_factory=Rope)
    """The rotation of the layers that the window holds for."""
    window: Count = 65
    """A token sees this many to either side, itself included, in the layers that `windowed` names."""
    windowed: tuple[bool, ...] = (False, True, True)
    """Which layers the window holds for, as a pattern that repeats."""
    tied: bool = True
    """The head's last matrix is the embedding."""
    head: bool = True
    """The masked-LM head."""
    task_transform: bool = False
    """Heads of tasks read states through the masked-LM head's dense layer and its norm."""
    mean_pooling: bool = False
    """Heads of whole texts read the mean of the states; false: that of the first token."""
    activation: str = "gelu"
    head_activation: str = "gelu"
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    transform_bias: bool = False
    """The head's dense layer has a bias."""
    head_bias: bool = True
    """The logits have a bias."""
    dropout: BelowOne = 0.0
    eps: NonNegative = 1e-5
    model_type: Literal["modernbert"] = "modernbert"

    @property
    def task_layer(self) -> TaskLayer | None:
        """The masked-LM head's dense layer and norm, where heads of tasks read them."""
        layer = TaskLayer("transform", self.head_activation, "transform_norm", self.eps, each=True)
        return layer if self.task_transform else None


def attention_width(c: Config) -> int:
    return c.layers * c.width


def norm_specs(c: Config, name: str, below_layers: bool = False, before_head: bool = False) -> dict[str, Spec]:
    both = spec.layer_norm(name, c.width, below_layers, before_head)
    return both if c.norm_bias else {name: both[name]}


def block_specs(c: Config, *, first: bool) -> dict[str, Spec]:
    D, H, C, F = c.width, c.heads, c.width // c.heads, c.ffn
    into, back = normal(0.02), normal(0.02 / math.sqrt(2 * c.layers))
    out = dict(
        q=Spec((D, H, C), ("embed", "heads", None), into, scores=True),
        k=Spec((D, H, C), ("embed", "heads", None), into),
        v=Spec((D, H, C), ("embed", "heads", None), into),
        o=Spec((H, C, D), ("heads", None, "embed"), back),
        gate=Spec((D, F), ("embed", "ffn"), into),
        up=Spec((D, F), ("embed", "ffn"), into),
        down=Spec((F, D), ("ffn", "embed"), back),
        **norm_specs(c, "norm2"),
    )
    if not first:
        out |= norm_specs(c, "norm1")
    if c.attention_bias:
        out |= {f"{n}_bias": bias((H, C), "heads", None)._replace(scores=n == "q") for n in "qkv"}
        out["o_bias"] = bias(D)
    if c.mlp_bias:
        out |= {f"{n}_bias": bias(F, "ffn") for n in ("gate", "up")}
        out["down_bias"] = bias(D)
    return out


def specs(c: Config) -> dict[str, Any]:
    if c.width % c.heads:
        raise ValueError(f"model.width: {c.width} is not a multiple of model.heads {c.heads}")
    for one in (c.rope, c.rope_local):
        rope.check(one, c.width // c.heads, "width")
    if c.layers < 2:
        raise ValueError(f"model.layers: {c.layers} is too few; ModernBERT has a first layer and at least one more")
    D, back = c.width, normal(0.02 / math.sqrt(2 * c.layers))
    out: dict[str, Any] = dict(
        embed=spec.table(c.vocab, D, normal(0.02), "vocab"),
        **norm_specs(c, "embed_norm", below_layers=True),
        first=stacked(1, block_specs(c, first=True), above=c.layers - 1),
        blocks=stacked(c.layers - 1, block_specs(c, first=False)),
        **norm_specs(c, "norm"),
    )
    if c.head or c.task_transform:
        out |= dict(transform=Spec((D, D), ("embed", None), back), **norm_specs(c, "transform_norm", before_head=True))
        if c.transform_bias:
            out["transform_bias"] = bias(D)
    if c.head:  # the dense layer and the norm stand before the embedding, or a matrix of its own
        if c.head_bias:
            out["head_bias"] = bias(c.vocab, "vocab")
        if not c.tied:
            out["head"] = spec.head(c.vocab, D, back)
    return out


def norm(c: Config, p: dict, name: str, x_BTD: jax.Array) -> jax.Array:
    return layers.layer_norm(x_BTD, p[name], p.get(f"{name}_bias"), c.eps)


def forward(
    c: Config, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None, cache: Cache | None = None
) -> Output:
    keys = layers.subkeys(key, 3)
    segments_BT, positions_BT, C = batch.get("segments"), batch["positions"], c.width // c.heads
    rows = dict(
        mask=Mask(False, None, segments_BT, segments_BT, packed=True),
        near=rope.table(c.rope_local, C, positions_BT),
        far=rope.table(c.rope, C, positions_BT),
    )

    def block(p: dict, x_BTD: jax.Array, rows: dict, key: Key, windowed: Any, layer_cache: Any) -> tuple[Any, Any]:
        k1, k2 = layers.subkeys(key, 2)
        mask = replace(rows["mask"], window=c.window if windowed else None)
        h_BTD = norm(c, p, "norm1", x_BTD) if "norm1" in p else x_BTD
        a_BTD, _ = attention_layers.self_attention(
            p, h_BTD, mask, shard=shard, sin_cos=rows["near" if windowed else "far"]
        )
        x_BTD += layers.dropout(a_BTD, c.dropout, k1)
        d_BTD = layers.mlp(p, norm(c, p, "norm2", x_BTD), c.activation, shard)
        return x_BTD + layers.dropout(d_BTD, c.dropout, k2), None

    x_BTD = norm(c, params, "embed_norm", layers.embed(params["embed"], batch["tokens"], shard))
    x_BTD = layers.dropout(x_BTD, c.dropout, keys[0])
    windowed = block_stack.repeated(c.windowed, c.layers)
    for name, kinds, k in (("first", windowed[:1], keys[1]), ("blocks", windowed[1:], keys[2])):
        x_BTD, _ = block_stack.run_blocks(
            block, params[name], specs[name], x_BTD, rows, shard=shard, key=k, kinds=kinds
        )
    return Output(norm(c, params, "norm", x_BTD))


def readout(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    if not c.head:
        raise ValueError("model.head: this model has none, so it predicts no tokens; set it to true")
    p = {n: shard.gather(params[n], specs[n]) for n in ("transform", "transform_bias") if n in specs}
    h_BTD = layers.project(p, "transform", "btd,de->bte", x_BTD, shard, "batch", "seq", None)
    h_BTD = norm(c, params, "transform_norm", layers.ACTIVATIONS[c.head_activation](h_BTD))
    last = "embed" if c.tied else "head"
    return Readout(h_BTD, shard.gather(params[last], specs[last]), params.get("head_bias"))


init_cache = no_cache


# Published files.

MODEL_TYPES = ("modernbert",)


def names(c: Config) -> dict[str, Name]:
    return _names("model." if c.head else "")  # a bare model's files leave it out


def _names(trunk: str) -> dict[str, Name]:
    out = {
        "embed": same(trunk + "embeddings.tok_embeddings.weight"),
        "embed_norm": vector(trunk + "embeddings.norm.weight"),
        "embed_norm_bias": vector(trunk + "embeddings.norm.bias"),
        "norm": vector(trunk + "final_norm.weight"),
        "norm_bias": vector(trunk + "final_norm.bias"),
        "transform": linear("head.dense.weight"),
        "transform_bias": vector("head.dense.bias"),
        "transform_norm": vector("head.norm.weight"),
        "transform_norm_bias": vector("head.norm.bias"),
        "head": same("decoder.weight"),
        "head_bias": vector("decoder.bias"),
    }
    return out | _layer_names(trunk, "first", 0) | _layer_names(trunk, "blocks", 1)


def _layer_names(trunk: str, stack: str, first: int) -> dict[str, Name]:
    layer = trunk + "layers.{layer}."
    qkv, biases = ([f"{stack}/{n}{end}" for n in "qkv"] for end in ("", "_bias"))
    return {
        f"{stack}/norm1": vector(layer + "attn_norm.weight", first=first),
        f"{stack}/norm1_bias": vector(layer + "attn_norm.bias", first=first),
        **fused(linear, layer + "attn.Wqkv.weight", *qkv, first=first),
        **fused(vector, layer + "attn.Wqkv.bias", *biases, first=first),
        f"{stack}/o": linear(layer + "attn.Wo.weight", ins=2, first=first),
        f"{stack}/o_bias": vector(layer + "attn.Wo.bias", first=first),
        f"{stack}/norm2": vector(layer + "mlp_norm.weight", first=first),
        f"{stack}/norm2_bias": vector(layer + "mlp_norm.bias", first=first),
        **fused(linear, layer + "mlp.Wi.weight", f"{stack}/gate", f"{stack}/up", first=first),
        **fused(vector, layer + "mlp.Wi.bias", f"{stack}/gate_bias", f"{stack}/up_bias", first=first),
        f"{stack}/down": linear(layer + "mlp.Wo.weight", first=first),
        f"{stack}/down_bias": vector(layer + "mlp.Wo.bias", first=first),
    }


# Names of config.json, by ours.
FIELDS = dict(
    vocab="vocab_size", layers="num_hidden_layers", width="hidden_size", heads="num_attention_heads",
    ffn="intermediate_size", positions="max_position_embeddings",
)  # fmt: skip
OPTIONS = dict(
    activation="hidden_activation", head_activation="classifier_activation", norm_bias="norm_bias",
    attention_bias="attention_bias", mlp_bias="mlp_bias", transform_bias="classifier_bias", head_bias="decoder_bias",
    tied="tie_word_embeddings", dropout="mlp_dropout", eps="norm_eps",
)  # fmt: skip


def from_hf(values: dict[str, Any]) -> Config:
    architecture, n = (values.get("architectures") or ["ModernBertModel"])[0], values["num_hidden_layers"]
    options = {ours: values[name] for ours, name in OPTIONS.items() if name in values}
    for ours in ("activation", "head_activation"):
        if options.get(ours, "gelu") not in layers.ACTIVATIONS:
            raise ValueError(f"config.json: {OPTIONS[ours]} {options[ours]!r} of modernbert is unknown")
    period = values.get("global_attn_every_n_layers", 3)
    types = values.get("layer_types") or ["sliding_attention" if i % period else "full_attention" for i in range(n)]
    return Config(
        **{ours: values[name] for ours, name in FIELDS.items()},
        **options,
        rope=_rope(values, "full_attention", values.get("global_rope_theta", 160_000.0)),
        rope_local=_rope(values, "sliding_attention", values.get("local_rope_theta", 10_000.0)),
        window=values.get("local_attention", 128) // 2 + 1,
        windowed=block_stack.pattern([t == "sliding_attention" for t in types]),
        mean_pooling=values.get("classifier_pooling", "cls") == "mean",
        head=architecture == "ModernBertForMaskedLM",
    )


def infer_from_files(c: Config, files: Collection[str]) -> Config:
    """Returns the config with the head if the files have it, whatever class config.json names."""
    return replace(c, head="head.dense.weight" in files and ("decoder.bias" in files or not c.head_bias))


def task_files(c: Config, task: Task) -> TaskFiles:
    c = replace(c, head=False, task_transform=True)
    table = _names("model.") | {"task": linear("classifier.weight"), "task_bias": vector("classifier.bias")}
    del table["head"]

    def values() -> dict[str, Any]:
        return to_hf(replace(c, task_transform=False)) | dict(architectures=[f"ModernBertFor{task}"])

    return TaskFiles(c, table, values)


FILES = Files(prefixes=("model.",), infer_from_files=infer_from_files, task=task_files)


def _rope(values: dict[str, Any], kind: str, theta: float) -> Rope:
    """Returns the rotation of one kind of layer. An early file's scaling holds for both."""
    nested = (values.get("rope_parameters") or {}).get(kind) or {}
    return rope.from_hf(values, theta, {"rope_theta": theta} | (values.get("rope_scaling") or {}) | nested)


def to_hf(c: Config) -> dict[str, Any]:
    """Returns what config.json says of the architecture."""
    if c.task_transform and not c.head:
        raise ValueError("model.task_transform: not in files of a bare model; export it with its task's head")
    windowed = block_stack.repeated(c.windowed, c.layers)
    small = {} if c.vocab > 50283 else dict(pad_token_id=None)  # transformers refuses its default where it doesn't fit
    return small | dict(
        architectures=["ModernBertForMaskedLM" if c.head else "ModernBertModel"], model_type="modernbert",
        **{name: getattr(c, ours) for ours, name in (FIELDS | OPTIONS).items()},
        classifier_pooling="mean" if c.mean_pooling else "cls",
        local_attention=2 * (c.window - 1), embedding_dropout=c.dropout, attention_dropout=c.dropout,
        layer_types=["sliding_attention" if w else "full_attention" for w in windowed],
        rope_parameters=dict(full_attention=rope.to_hf(c.rope), sliding_attention=rope.to_hf(c.rope_local)),
    )  # fmt: skip
