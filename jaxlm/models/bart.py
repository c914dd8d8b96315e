"""BART (Lewis et al. 2020) and mBART (Liu et al. 2020) have an encoder and a decoder with learned positions, LayerNorm
after each part (mBART: before it, and one at the end), biases, GELU, one embedding for both sides and the head.

B batch, T target position, S source position, D model width, H heads, C head width, F ffn width, V vocabulary.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.core import spec
from jaxlm.core.ranges import BelowOne, Count, Natural
from jaxlm.core.spec import Spec, bias, layer_norm, normal, stacked
from jaxlm.core.weight_names import Name, linear, same, vector
from jaxlm.nn import attention_layers, block_stack, decoder, layers
from jaxlm.nn.cache import Cache, empty_cache
from jaxlm.nn.family import Batch, Files, Key, Kind, ModelConfig
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import Readout
from jaxlm.nn.mask import Mask

kind: Kind = "encoder_decoder"
generates = True

UNUSED = 2  # rows at the head of a position table: the first one counted positions from its padding id on
EPS = 1e-5


@dataclass(frozen=True)
class Config(ModelConfig):
    vocab: Count = 50265
    layers: Count = 6
    """Layers of the encoder."""
    decoder_layers: Count | None = None
    """None: as many as the encoder has."""
    width: Count = 768
    heads: Count = 12
    decoder_heads: Count | None = None
    """None: the same as the encoder."""
    ffn: Count = 3072
    decoder_ffn: Count | None = None
    """None: the same as the encoder."""
    positions: Count = 1024
    activation: str = "gelu"
    norm_first: bool = False
    """LayerNorm before each part and at the end of each stack, not after each part: mBART."""
    scaled: bool = False
    """Embeddings are multiplied by width^1/2."""
    tied: bool = True
    """The head is the embedding."""
    own_embeddings: bool = False
    """Each stack has an embedding of its own, as in published files whose head isn't tied. These hold a shared one too,
    which nothing reads."""
    head_bias: bool = False
    """Constants that published files add to the logits, zeros in most. They are not trained."""
    decoder_start: Natural | None = 2
    """Id of the token that targets begin after: EOS. mBART: None, it depends on the language."""
    dropout: BelowOne = 0.1
    """Share of embeddings, attention outputs and ffn outputs that is dropped."""
    model_type: Literal["bart", "mbart"] = "bart"
    """What published files of this model call its architecture."""
    layer_counts = MappingProxyType({"decoder/blocks": ("decoder_layers",)})


def sides(c: Config) -> dict[str, tuple[int, int, int]]:
    """Returns (layers, heads, ffn width) of both stacks."""
    of = lambda own, encoder: encoder if own is None else own  # noqa: E731
    decoder = of(c.decoder_layers, c.layers), of(c.decoder_heads, c.heads), of(c.decoder_ffn, c.ffn)
    return dict(encoder=(c.layers, c.heads, c.ffn), decoder=decoder)


def attention_width(c: Config) -> int:
    return (c.layers + 2 * sides(c)["decoder"][0]) * c.width


def block_specs(D: int, H: int, F: int, cross: bool) -> dict[str, Spec]:
    C, w = D // H, normal(0.02)
    out = {}
    for part in ("", "cross_") if cross else ("",):
        for n in "qkv":
            axis = "heads" if n == "q" else "kv"
            out[f"{part}{n}"] = Spec((D, H, C), ("embed", axis, None), w)
            out[f"{part}{n}_bias"] = bias((H, C), axis, None)
        out[f"{part}o"] = Spec((H, C, D), ("heads", None, "embed"), w)
        out[f"{part}o_bias"] = bias(D)
    out |= dict(
        up=Spec((D, F), ("embed", "ffn"), w),
        up_bias=bias(F, "ffn"),
        down=Spec((F, D), ("ffn", "embed"), w),
        down_bias=bias(D),
    )
    for n in ("norm1", "norm_cross", "norm2") if cross else ("norm1", "norm2"):
        out |= layer_norm(n, D)
    return out


def specs(c: Config) -> dict[str, Any]:
    D, V = c.width, c.vocab
    out: dict[str, Any] = dict(embed=spec.table(V, D, normal(0.02), "vocab"))
    for side, (n, heads, ffn) in sides(c).items():
        if D % heads:
            name = "heads" if side == "encoder" else "decoder_heads"
            raise ValueError(f"model.width: {D} is not a multiple of model.{name} {heads}")
        out[side] = dict(
            position=spec.table(UNUSED + c.positions, D, normal(0.02)),
            blocks=stacked(n, block_specs(D, heads, ffn, side == "decoder")),
            **layer_norm("norm_embed", D, below_layers=True),
            **(layer_norm("norm", D) if c.norm_first else {}),
        )
    if c.own_embeddings:
        if c.tied:
            raise ValueError("model.own_embeddings: goes with a head of its own alone; set model.tied=false")
        for side in sides(c):
            out[side]["embed"] = spec.table(V, D, normal(0.02), "vocab")
    if not c.tied:
        out["head"] = spec.head(V, D, normal(0.02))
    if c.head_bias:
        out["head_bias"] = bias(V, "vocab")
    return out


def encode(c: Config, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None) -> jax.Array:
    """Computes `[B, S, D]`, what the decoder looks at."""
    segments_BS, positions_BS = batch.get("source_segments"), batch["source_positions"]
    if segments_BS is not None:  # padding may go on behind the last position, where the table has nothing but NaN
        positions_BS = jnp.where(segments_BS > 0, positions_BS, 0)
    mask = Mask(False, None, segments_BS, segments_BS, packed=True)
    return _stack(c, "encoder", specs, params, batch["source"], positions_BS, dict(mask=mask), shard=shard, key=key)[0]


def forward(
    c: Config, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None, cache: Cache | None = None
) -> Output:
    """Computes the decoder's states.

    With a cache the first call brings the source, and later ones look at what the layers kept of it.
    """
    k1, k2 = layers.subkeys(key, 2)
    memory_BSD = encode(c, specs, params, batch, shard=shard, key=k1) if "source" in batch else None
    attend_source = partial(attention_layers.cross_attention, shard=shard)
    mask, cache = decoder.mask_and_cache(batch, cache)
    rows = dict(mask=mask, memory=memory_BSD, source_segments=batch.get("source_segments"))
    x_BTD, cache = _stack(
        c,
        "decoder",
        specs,
        params,
        batch["tokens"],
        batch["positions"],
        rows,
        attend_source,
        shard=shard,
        key=k2,
        cache=cache,
    )
    return Output(x_BTD, cache=cache)


def _stack(
    c: Config,
    side: str,
    specs: Any,
    params: Any,
    ids_BT: jax.Array,
    positions_BT: jax.Array,
    rows: dict,
    attend_source: Callable[..., tuple[jax.Array, dict]] | None = None,
    *,
    shard: Layout,
    key: Key,
    cache: Cache | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Runs the encoder, or the decoder, which looks at the encoder's output by `attend_source`."""
    k1, k2 = layers.subkeys(key, 2)

    def norm(p: dict, name: str, x_BTD: jax.Array) -> jax.Array:
        return layers.layer_norm(x_BTD, p[name], p[f"{name}_bias"], EPS)

    def block(p: dict, x_BTD: jax.Array, rows: dict, key: Key, kind: Any, layer_cache: Any) -> tuple[Any, Any]:
        keys = iter(layers.subkeys(key, 3))

        def part(x_BTD: jax.Array, name: str, f: Callable[[jax.Array], tuple[jax.Array, Any]]) -> tuple[jax.Array, Any]:
            y_BTD, found = f(norm(p, name, x_BTD) if c.norm_first else x_BTD)
            x_BTD += layers.dropout(y_BTD, c.dropout, next(keys))
            return x_BTD if c.norm_first else norm(p, name, x_BTD), found

        own_cache = attention_layers.without_source(layer_cache)
        x_BTD, now = part(x_BTD, "norm1", lambda h: attention_layers.self_attention(
            p, h, rows["mask"], shard=shard, cache=cache, layer_cache=own_cache))  # fmt: skip
        if attend_source is not None:
            x_BTD, seen = part(x_BTD, "norm_cross", lambda h: attend_source(p, h, rows, layer_cache=layer_cache))
            now = now and now | seen
        x_BTD, _ = part(x_BTD, "norm2", lambda h: (layers.mlp(p, h, c.activation, shard), None))
        return x_BTD, now

    p = params[side]
    embedded = layers.embed(p.get("embed", params["embed"]), ids_BT, shard)
    x_BTD = layers.times(embedded, c.width**0.5) if c.scaled else embedded
    x_BTD += layers.embed(p["position"], positions_BT + UNUSED, shard, rows=None)
    x_BTD = layers.dropout(norm(p, "norm_embed", x_BTD), c.dropout, k1)
    x_BTD, cache = block_stack.run_blocks(
        block, p["blocks"], specs[side]["blocks"], x_BTD, rows, shard=shard, key=k2, cache=cache
    )
    return norm(p, "norm", x_BTD) if c.norm_first else x_BTD, cache


def readout(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    bias_V = jax.lax.stop_gradient(params["head_bias"]) if c.head_bias else None
    return replace(decoder.readout(c, specs, params, x_BTD, shard=shard), bias_V=bias_V)


def init_cache(c: Config, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
    """Returns an empty cache of the decoder. The first call adds each layer's keys and values of the source."""
    n, heads, _ = sides(c)["decoder"]
    return empty_cache(
        attention_layers.kv_cache([None] * n, rows, length, heads, c.width // heads, dtype), rows, length
    )


# Published files.

ARCHITECTURES = {"bart": "BartForConditionalGeneration", "mbart": "MBartForConditionalGeneration"}
MODEL_TYPES = tuple(ARCHITECTURES)


def names(c: Config) -> dict[str, Name]:
    out = {"embed": same("model.shared.weight")}
    for side in ("encoder", "decoder"):
        if c.own_embeddings:
            out[f"{side}/embed"] = same(f"model.{side}.embed_tokens.weight")
        layer = f"model.{side}.layers." + "{layer}."
        out[f"{side}/position"] = same(f"model.{side}.embed_positions.weight")
        attention = dict(self_attn="", encoder_attn="cross_") if side == "decoder" else dict(self_attn="")
        for theirs, ours in attention.items():
            for n in "qkv":
                out[f"{side}/blocks/{ours}{n}"] = linear(f"{layer}{theirs}.{n}_proj.weight")
                out[f"{side}/blocks/{ours}{n}_bias"] = vector(f"{layer}{theirs}.{n}_proj.bias")
            out[f"{side}/blocks/{ours}o"] = linear(f"{layer}{theirs}.out_proj.weight", ins=2)
            out[f"{side}/blocks/{ours}o_bias"] = vector(f"{layer}{theirs}.out_proj.bias")
        for theirs, ours in dict(fc1="up", fc2="down").items():
            out[f"{side}/blocks/{ours}"] = linear(f"{layer}{theirs}.weight")
            out[f"{side}/blocks/{ours}_bias"] = vector(f"{layer}{theirs}.bias")
        norms = {f"{layer}self_attn_layer_norm": "blocks/norm1", f"{layer}final_layer_norm": "blocks/norm2"}
        if side == "decoder":
            norms[f"{layer}encoder_attn_layer_norm"] = "blocks/norm_cross"
        norms |= {f"model.{side}.layernorm_embedding": "norm_embed", f"model.{side}.layer_norm": "norm"}
        for theirs, ours in norms.items():
            out[f"{side}/{ours}"] = vector(f"{theirs}.weight")
            out[f"{side}/{ours}_bias"] = vector(f"{theirs}.bias")
    # The bias is [1, V] there.
    return out | {"head": same("lm_head.weight"), "head_bias": Name("final_logits_bias", ins=0, order="in_out")}


def from_hf(values: dict[str, Any]) -> Config:
    kind = values["model_type"]
    first = kind == "mbart"
    usual = dict(normalize_before=first, add_final_layer_norm=first, normalize_embedding=True,
                 static_position_embeddings=False, add_bias_logits=False, extra_pos_embeddings=UNUSED)  # fmt: skip
    for name, value in usual.items():
        if values.get(name, value) != value:
            raise ValueError(f"config.json: {name} {values[name]!r} of {kind} is not supported, only {value}")
    activation = values.get("activation_function", "gelu")
    if activation not in layers.ACTIVATIONS:
        raise ValueError(f"config.json: activation_function {activation!r} is unknown")
    return Config(
        vocab=values["vocab_size"],
        layers=values["encoder_layers"],
        decoder_layers=values["decoder_layers"],
        width=values["d_model"],
        heads=values["encoder_attention_heads"],
        decoder_heads=values["decoder_attention_heads"],
        ffn=values["encoder_ffn_dim"],
        decoder_ffn=values["decoder_ffn_dim"],
        positions=values["max_position_embeddings"],
        activation=activation,
        norm_first=first,
        scaled=bool(values.get("scale_embedding", False)),
        tied=bool(values.get("tie_word_embeddings", True)),
        head_bias=True,
        decoder_start=values.get("decoder_start_token_id", None if first else values.get("eos_token_id", 2)),
        dropout=float(values.get("dropout", 0.1)),
        model_type=kind,
    )


def infer_from_files(c: Config, tensors: Collection[str]) -> Config:
    """Returns the config with the bias of the logits and the embeddings that the files have, which config.json leaves
    open."""
    own = not c.tied and any(name.endswith("decoder.embed_tokens.weight") for name in tensors)
    return replace(c, head_bias=c.head_bias and "final_logits_bias" in tensors, own_embeddings=own)


FILES = Files(
    prefixes=("model.",),
    ignored=(r"(model\.)?(encoder|decoder)\.version",),
    tied={f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in ("encoder", "decoder")},
    infer_from_files=infer_from_files,
)


def to_hf(c: Config) -> dict[str, Any]:
    """Returns what config.json says of the architecture; refuses a model that its `model_type` can't express."""
    if c.norm_first != (c.model_type == "mbart"):
        fits = "mbart" if c.norm_first else "bart"
        raise ValueError(
            f"model.norm_first: not so in files of model_type {c.model_type!r}; set model.model_type={fits}"
        )
    (_, heads, ffn), (n, decoder_heads, decoder_ffn) = sides(c).values()
    out: dict[str, Any] = dict(
        architectures=[ARCHITECTURES[c.model_type]], model_type=c.model_type, is_encoder_decoder=True,
        vocab_size=c.vocab, d_model=c.width, encoder_layers=c.layers, decoder_layers=n, encoder_attention_heads=heads,
        decoder_attention_heads=decoder_heads, encoder_ffn_dim=ffn, decoder_ffn_dim=decoder_ffn,
        max_position_embeddings=c.positions, activation_function=c.activation, scale_embedding=c.scaled,
        dropout=c.dropout, tie_word_embeddings=c.tied,
    )  # fmt: skip
    return out if c.decoder_start is None else out | dict(decoder_start_token_id=c.decoder_start)
