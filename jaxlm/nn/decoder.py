"""Holds what decoders of Llama's kind share: specs, caches, the head, and how their published files spell all that.

Each family writes its blocks and its `forward` out in its own file.
D model width, H heads, K key/value heads, C head width, F ffn width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from jaxlm.core import spec
from jaxlm.core.ranges import BelowOne, Count, NonNegative
from jaxlm.core.spec import Init, Spec, bias, fan_in, norm, ones, stacked
from jaxlm.core.weight_names import Name, linear, same, vector
from jaxlm.nn import attention_layers, block_stack, losses, moe, rope
from jaxlm.nn.cache import Cache, empty_cache, read_on
from jaxlm.nn.family import Batch, Files, ModelConfig, Task, TaskFiles
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import Readout
from jaxlm.nn.mask import Mask
from jaxlm.nn.rope import Rope


@dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """The fields that every decoder with rotary positions and grouped heads has."""

    vocab: Count = 32000
    layers: Count = 12
    width: Count = 768
    heads: Count = 12
    kv_heads: Count = 4
    head_width: Count = 64
    positions: Count | None = None
    """Longest sequence; None: no limit."""
    rope: Rope = field(default_factory=Rope)
    tied: bool = False
    """The head is the embedding."""
    dropout: BelowOne = 0.0
    eps: NonNegative = 1e-5
    head: bool = True
    """It predicts tokens; false: files with a task's head have no other."""


@dataclass(frozen=True)
class WindowedConfig(DecoderConfig):
    """The fields of decoders whose layers may differ in what they see."""

    window: Count | None = None
    """Sliding-window attention over this many positions, in the layers that `windowed` names."""
    windowed: tuple[bool, ...] = (True,)
    """Which layers the window holds for, as a pattern that repeats."""


# Specs.


def deep(c: ModelConfig) -> float:
    """Returns the scale of matrices that write to the residual stream, so that its variance stays near one."""
    return (2 * c.layers) ** -0.5


def attention_specs(c: DecoderConfig, biases: str = "", scale: float = 1.0) -> dict[str, Spec]:
    """Returns specs of q, k, v and o, and of the biases of those that `biases` has the letters of.

    `scale`: of what goes to the residual stream. ValueError: the key/value heads don't divide the heads.
    """
    if c.heads % c.kv_heads:
        raise ValueError(f"model.heads: {c.heads} is not a multiple of model.kv_heads {c.kv_heads}")
    rope.check(c.rope, c.head_width)
    D, H, K, C = c.width, c.heads, c.kv_heads, c.head_width
    every = dict(
        q=bias((H, C), "heads", None)._replace(scores=True),
        k=bias((K, C), "kv", None),
        v=bias((K, C), "kv", None),
        o=bias(D),
    )
    return dict(
        q=Spec((D, H, C), ("embed", "heads", None), fan_in(0), scores=True),
        k=Spec((D, K, C), ("embed", "kv", None), fan_in(0)),
        v=Spec((D, K, C), ("embed", "kv", None), fan_in(0)),
        o=Spec((H, C, D), ("heads", None, "embed"), fan_in(0, 1, scale=scale)),
        **{f"{n}_bias": every[n] for n in biases},
    )


def gated_specs(D: int, F: int, scale: float = 1.0, biased: bool = False) -> dict[str, Spec]:
    """Returns specs of a gated feed-forward network: gate and up (D F), down (F D), and their biases if `biased`."""
    wide = Spec((D, F), ("embed", "ffn"), fan_in(0))
    biases = dict(gate_bias=bias(F, "ffn"), up_bias=bias(F, "ffn"), down_bias=bias(D)) if biased else {}
    return dict(gate=wide, up=wide, down=Spec((F, D), ("ffn", "embed"), fan_in(0, scale=scale)), **biases)


def sparse_stacks(c: Any, attention: dict[str, Spec]) -> dict[str, Any]:
    """Returns specs of the layers with experts, `blocks`, and of the `c.dense` ones before them, `dense`.

    `attention`: specs of what both have. ValueError: no layer has experts.
    """
    if not 0 <= c.dense < c.layers:
        raise ValueError(f"model.dense: {c.dense} of {c.layers} layers would be dense; leave one with experts")
    out = dict(blocks=stacked(c.layers - c.dense, attention | moe.specs(c.moe, c.width, deep=deep(c))))
    if c.dense:
        out["dense"] = stacked(c.dense, attention | gated_specs(c.width, c.ffn, deep(c)), above=c.layers - c.dense)
    return out


def model_specs(c: Any, embed: Init, stacks: dict[str, Any], scale: Init = ones) -> dict[str, Any]:
    """Returns specs of a whole model: the embedding, stacks of layers by name, the last norm, and a head unless tied.

    `embed` and `scale` initialize the embedding and the norm.
    """
    last = norm(c.width, init=scale)._replace(before_head=True)
    out = dict(embed=spec.table(c.vocab, c.width, embed, "vocab"), **stacks, norm=last)
    return out if c.tied or not c.head else out | dict(head=spec.head(c.vocab, c.width, fan_in(1)))


# What a family needs besides its blocks.


def attention_width(c: DecoderConfig) -> int:
    """Returns layers × heads × head width, which attention's FLOPs grow with."""
    return c.layers * c.heads * c.head_width


def windows(c: ModelConfig) -> list[int | None]:
    """Returns each layer's window; None: the layer sees the whole row."""
    return [c.window if windowed else None for windowed in block_stack.repeated(c.windowed, c.layers)]


def mask_and_cache(batch: Batch, cache: Cache | None, window: int | None = None) -> tuple[Mask, Cache | None]:
    """Returns the causal mask of a batch, and the cache as it stands once the batch's tokens are in it."""
    segments_BT = batch.get("segments")
    cache = read_on(cache, segments_BT, batch["tokens"].shape)
    return Mask(True, window, segments_BT, segments_BT, batch.get("prefix"), packed=True), cache


def readout(c: ModelConfig, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    """Returns what the logits are made of: the states, and the head or the embedding that it is tied to."""
    if not c.head:
        raise ValueError("model.head: this model has none, so it predicts no tokens; start from one that does")
    head = "embed" if c.tied else "head"
    return losses.factors(x_BTD.astype(shard.dtype), params[head], specs[head], shard)


def init_cache(c: DecoderConfig, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
    """Returns an empty cache of keys and values, with rings for layers that have a window."""
    each = attention_layers.kv_cache(windows(c), rows, length, c.kv_heads, c.head_width, dtype, slack)
    return empty_cache(each, rows, length)


# Published files.

LAYER = "model.layers.{layer}."
FILES = Files(ignored=(r".*rotary_emb\.inv_freq",))


def names(stacks: Mapping[str, int] | None = None) -> dict[str, Name]:
    """Returns where weights stand in files of Llama's kind. Entries of weights that a model lacks do no harm.

    `stacks`: of each stack of layers the number of its first layer; None: all layers are `blocks`.
    """
    out = {"embed": same("model.embed_tokens.weight")}
    for stack, first in (stacks or {"blocks": 0}).items():
        for n in "qkvo":
            out[f"{stack}/{n}"] = linear(f"{LAYER}self_attn.{n}_proj.weight", ins=1 + (n == "o"), first=first)
            out[f"{stack}/{n}_bias"] = vector(f"{LAYER}self_attn.{n}_proj.bias", first=first)
        for n in ("gate", "up", "down"):
            out[f"{stack}/{n}"] = linear(f"{LAYER}mlp.{n}_proj.weight", first=first)
            out[f"{stack}/{n}_bias"] = vector(f"{LAYER}mlp.{n}_proj.bias", first=first)
        for ours, theirs in dict(
            norm1="input_layernorm", norm2="post_attention_layernorm", q_norm="self_attn.q_norm",
            k_norm="self_attn.k_norm",
        ).items():  # fmt: skip
            out[f"{stack}/{ours}"] = vector(f"{LAYER}{theirs}.weight", first=first)
    return out | {"norm": vector("model.norm.weight"), "head": same("lm_head.weight")}


def from_hf(values: dict[str, Any], *, eps: float, tied: bool = False, head_width: int | None = None) -> dict[str, Any]:
    """Returns the fields of a `DecoderConfig`, but for its `rope`, that a config.json states.

    `eps`, `tied` and `head_width` (None: the heads share the width) hold where it leaves them out. KeyError: a size is
    missing.
    """
    heads = values["num_attention_heads"]
    return dict(
        vocab=values["vocab_size"],
        layers=values["num_hidden_layers"],
        width=values["hidden_size"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_width=values.get("head_dim") or head_width or values["hidden_size"] // heads,
        positions=values.get("max_position_embeddings"),
        tied=bool(values.get("tie_word_embeddings", tied)),
        eps=values.get("rms_norm_eps", eps),
        model_type=values["model_type"],
    )


def check_silu(values: dict[str, Any]) -> None:
    """Refuses a config.json whose activation is another than SiLU."""
    if values.get("hidden_act", "silu") != "silu":
        kind = values["model_type"]
        raise ValueError(f"config.json: hidden_act {values['hidden_act']!r} of {kind} is not supported, only silu")


def to_hf(c: DecoderConfig, architecture: str, unlimited: int = 1 << 20) -> dict[str, Any]:
    """Returns what config.json says of a `DecoderConfig`'s fields. `unlimited` stands for no limit of positions."""
    return dict(
        architectures=[architecture], model_type=c.model_type, vocab_size=c.vocab, num_hidden_layers=c.layers,
        hidden_size=c.width, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_width,
        rms_norm_eps=c.eps, rope_parameters=rope.to_hf(c.rope, c.model_type == "phi3"),
        max_position_embeddings=c.positions or unlimited, tie_word_embeddings=c.tied, hidden_act="silu",
    )  # fmt: skip


def task_files(
    c: Any, task: Task, names: Mapping[str, Name], to_hf: Callable[[Any], dict[str, Any]], *, stem: str = "",
    of_tokens: str = "score",
) -> TaskFiles | None:  # fmt: skip
    """Returns how files with a task's head look: a matrix without bias on a text's last token, or one with a bias on
    each token; None: there is no such head.

    `names` and `to_hf` are those of the family. `stem` begins the names of the classes, and `of_tokens` is the matrix
    on each token, empty where there is none.
    """
    matrices = {"SequenceClassification": "score", "TokenClassification": of_tokens}
    if not (matrix := matrices.get(task)):
        return None
    table = {ours: name for ours, name in names.items() if ours != "head"} | {"task": linear(f"{matrix}.weight")}
    if task == "TokenClassification":
        table["task_bias"] = vector(f"{matrix}.bias")

    def values() -> dict[str, Any]:
        said = to_hf(c)
        return said | dict(architectures=[f"{stem or said['architectures'][0].removesuffix('ForCausalLM')}For{task}"])

    return TaskFiles(replace(c, head=False), table, values)


SLIDING = "sliding_attention"


def layer_types(c: ModelConfig) -> list[str]:
    """Returns what config.json calls each layer's attention."""
    return ["full_attention" if window is None else SLIDING for window in windows(c)]
