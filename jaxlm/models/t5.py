"""T5 (Raffel et al. 2020), T5 v1.1 and FLAN, mT5 (Xue et al. 2021) have an encoder and a decoder, RMSNorm before each
part, no biases, unscaled attention, and positions as a bias by distance that all layers of a stack share.

B batch, T target position, S source position, N bucket of distances, D model width, H heads, C head width, F ffn width,
V vocabulary.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import jax

from jaxlm.core import spec
from jaxlm.core.ranges import BelowOne, Count, Natural, NonNegative
from jaxlm.core.spec import Spec, fan_in, norm, normal, stacked
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


@dataclass(frozen=True)
class Config(ModelConfig):
    vocab: Count = 32128
    layers: Count = 12
    """Layers of the encoder."""
    decoder_layers: Count | None = None
    """None: as many as the encoder has."""
    width: Count = 768
    heads: Count = 12
    head_width: Count = 64
    ffn: Count = 2048
    activation: str = "gelu_new"
    gated: bool = True
    """The ffn has a gate: T5 v1.1, FLAN and mT5."""
    buckets: Count = 32
    """Distances fall into this many buckets, each with a bias of its own in every head."""
    longest: Count = 128
    """Distance from which all share one bucket."""
    positions: Count | None = None
    """Longest sequence; None: no limit."""
    tied: bool = False
    """The head is the embedding."""
    scaled: bool = False
    """The decoder's output is scaled by width^-1/2 before the head: the first T5, whose head is tied."""
    decoder_start: Natural | None = 0
    """Id of the token that targets begin after: padding."""
    dropout: BelowOne = 0.0
    eps: NonNegative = 1e-6
    model_type: Literal["t5", "mt5"] = "t5"
    """What published files of this model call its architecture."""
    layer_counts = MappingProxyType({"decoder/blocks": ("decoder_layers",)})

    @property
    def depth(self) -> int:
        """The decoder has this many layers."""
        return self.layers if self.decoder_layers is None else self.decoder_layers


def attention_width(c: Config) -> int:
    return (c.layers + 2 * c.depth) * c.heads * c.head_width


def block_specs(c: Config, cross: bool) -> dict[str, Spec]:
    D, H, C, F = c.width, c.heads, c.head_width, c.ffn
    out = dict(norm1=norm(D), norm2=norm(D))
    for part in ("", "cross_") if cross else ("",):
        # Scores are not scaled by C^-1/2, so queries begin that much smaller.
        out[f"{part}q"] = Spec((D, H, C), ("embed", "heads", None), fan_in(0, scale=C**-0.5))
        out[f"{part}k"] = Spec((D, H, C), ("embed", "kv", None), fan_in(0))
        out[f"{part}v"] = Spec((D, H, C), ("embed", "kv", None), fan_in(0))
        out[f"{part}o"] = Spec((H, C, D), ("heads", None, "embed"), fan_in(0, 1))
    if cross:
        out["norm_cross"] = norm(D)
    out["up"] = Spec((D, F), ("embed", "ffn"), fan_in(0))
    if c.gated:
        out["gate"] = Spec((D, F), ("embed", "ffn"), fan_in(0))
    return out | dict(down=Spec((F, D), ("ffn", "embed"), fan_in(0)))


def specs(c: Config) -> dict[str, Any]:
    if c.buckets < 4 or c.longest <= c.buckets // 2:
        raise ValueError(f"model.buckets: {c.buckets} must be at least 4, and model.longest {c.longest} above its half")

    def stack(n: int, cross: bool) -> dict[str, Any]:
        return dict(
            blocks=stacked(n, block_specs(c, cross)),
            bias=Spec((c.buckets, c.heads), (None, "heads"), normal(c.width**-0.5), role="bias", below_layers=True),
            norm=norm(c.width),
        )

    out = dict(
        embed=spec.table(c.vocab, c.width, normal(1.0), "vocab"),
        encoder=stack(c.layers, False),
        decoder=stack(c.depth, True),
    )
    if not c.tied:
        out["head"] = spec.head(c.vocab, c.width, fan_in(1))
    return out


def encode(c: Config, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None) -> jax.Array:
    """Computes `[B, S, D]`, what the decoder looks at."""
    mask = Mask(False, None, batch.get("source_segments"), batch.get("source_segments"), packed=True)
    x_BSD = layers.embed(params["embed"], batch["source"], shard)
    return _stack(c, specs["encoder"], params["encoder"], x_BSD, dict(mask=mask), shard=shard, key=key)[0]


def forward(
    c: Config, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None, cache: Cache | None = None
) -> Output:
    """Computes the decoder's states.

    With a cache the first call brings the source, and later ones look at what the layers kept of it.
    """
    k1, k2 = layers.subkeys(key, 2)
    memory_BSD = encode(c, specs, params, batch, shard=shard, key=k1) if "source" in batch else None
    attend_source = partial(attention_layers.cross_attention, shard=shard, scale=1.0)
    mask, cache = decoder.mask_and_cache(batch, cache)
    rows = dict(mask=mask, memory=memory_BSD, source_segments=batch.get("source_segments"))
    x_BTD = layers.embed(params["embed"], batch["tokens"], shard)
    x_BTD, cache = _stack(
        c, specs["decoder"], params["decoder"], x_BTD, rows, attend_source, shard=shard, key=k2, cache=cache
    )
    return Output(x_BTD, cache=cache)


def _stack(
    c: Config,
    specs: Any,
    params: Any,
    x_BTD: jax.Array,
    rows: dict,
    attend_source: Callable[..., tuple[jax.Array, dict]] | None = None,
    *,
    shard: Layout,
    key: Key,
    cache: Cache | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Runs the encoder, or the decoder, which looks at the encoder's output by `attend_source`."""
    k1, k2, k3 = layers.subkeys(key, 3)
    T, mask = x_BTD.shape[1], rows["mask"]
    bias: Any = partial(
        attention_layers.relative_bias, params["bias"], longest=c.longest, both_ways=not mask.causal, shard=shard
    )
    if cache is None:  # all layers add the same
        bias_1HTT = bias(mask, T, T)
        bias = lambda *_: bias_1HTT  # noqa: E731

    def block(p: dict, x_BTD: jax.Array, rows: dict, key: Key, kind: Any, layer_cache: Any) -> tuple[Any, Any]:
        k1, k2, k3 = layers.subkeys(key, 3)
        h_BTD = layers.rms_norm(x_BTD, p["norm1"], c.eps)
        a_BTD, now = attention_layers.self_attention(
            p, h_BTD, rows["mask"], shard=shard, scale=1.0, bias=bias, cache=cache,
            layer_cache=attention_layers.without_source(layer_cache),
        )  # fmt: skip
        x_BTD += layers.dropout(a_BTD, c.dropout, k1)
        if attend_source is not None:
            a_BTD, seen = attend_source(
                p, layers.rms_norm(x_BTD, p["norm_cross"], c.eps), rows, layer_cache=layer_cache
            )
            x_BTD += layers.dropout(a_BTD, c.dropout, k2)
            now = now and now | seen
        d_BTD = layers.mlp(p, layers.rms_norm(x_BTD, p["norm2"], c.eps), c.activation, shard)
        return x_BTD + layers.dropout(d_BTD, c.dropout, k3), now

    x_BTD, cache = block_stack.run_blocks(
        block,
        params["blocks"],
        specs["blocks"],
        layers.dropout(x_BTD, c.dropout, k1),
        rows,
        shard=shard,
        key=k2,
        cache=cache,
    )
    return layers.dropout(layers.rms_norm(x_BTD, params["norm"], c.eps), c.dropout, k3), cache


def readout(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    return decoder.readout(c, specs, params, layers.times(x_BTD, c.width**-0.5) if c.scaled else x_BTD, shard=shard)


def init_cache(c: Config, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
    """Returns an empty cache of the decoder. The first call adds each layer's keys and values of the source."""
    return empty_cache(
        attention_layers.kv_cache([None] * c.depth, rows, length, c.heads, c.head_width, dtype), rows, length
    )


# Published files.

ARCHITECTURES = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration"}
MODEL_TYPES = tuple(ARCHITECTURES)


def names(c: Config) -> dict[str, Name]:
    out = {"embed": same("shared.weight")}
    for stack, ffn in (("encoder", 1), ("decoder", 2)):
        layer = stack + ".block.{layer}.layer."
        attention = [("", "norm1", "0", "SelfAttention")]
        if stack == "decoder":
            attention.append(("cross_", "norm_cross", "1", "EncDecAttention"))
        out[f"{stack}/bias"] = same(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        for part, scale, i, name in attention:
            out[f"{stack}/blocks/{scale}"] = vector(f"{layer}{i}.layer_norm.weight")
            out |= {f"{stack}/blocks/{part}{n}": linear(f"{layer}{i}.{name}.{n}.weight") for n in "qkv"}
            out[f"{stack}/blocks/{part}o"] = linear(f"{layer}{i}.{name}.o.weight", ins=2)
        dense = f"{layer}{ffn}.DenseReluDense."
        out[f"{stack}/blocks/norm2"] = vector(f"{layer}{ffn}.layer_norm.weight")
        out[f"{stack}/blocks/gate"] = linear(dense + "wi_0.weight")
        out[f"{stack}/blocks/up"] = linear(dense + ("wi_1.weight" if c.gated else "wi.weight"))
        out[f"{stack}/blocks/down"] = linear(dense + "wo.weight")
        out[f"{stack}/norm"] = vector(f"{stack}.final_layer_norm.weight")
    return out | {"head": same("lm_head.weight")}


def from_hf(values: dict[str, Any]) -> Config:
    kind = values["model_type"]
    ffn = values.get("feed_forward_proj", "gated-gelu" if kind == "mt5" else "relu")
    gate, _, activation = ffn.rpartition("-")
    activation = "gelu_new" if ffn == "gated-gelu" else activation
    if gate not in ("", "gated") or activation not in layers.ACTIVATIONS:
        raise ValueError(f"config.json: feed_forward_proj {ffn!r} is unknown; it may be relu or gated-gelu")
    # Only the first T5 ties its head and scales for it. Files written today call every model tied.
    tied = values.get("tie_word_embeddings", True)
    scaled = values.get("scale_decoder_outputs", tied) and kind == "t5"
    return Config(
        vocab=values["vocab_size"],
        layers=values["num_layers"],
        decoder_layers=values.get("num_decoder_layers") or values["num_layers"],
        width=values["d_model"],
        heads=values["num_heads"],
        head_width=values["d_kv"],
        ffn=values["d_ff"],
        activation=activation,
        gated=gate == "gated",
        buckets=values.get("relative_attention_num_buckets", 32),
        longest=values.get("relative_attention_max_distance", 128),
        tied=bool(tied and scaled),
        scaled=bool(scaled),
        decoder_start=values.get("decoder_start_token_id", values.get("pad_token_id", 0)),
        dropout=float(values.get("dropout_rate", 0.1)),
        eps=values.get("layer_norm_epsilon", 1e-6),
        model_type=kind,
    )


def infer_from_files(c: Config, tensors: Collection[str]) -> Config:
    """Returns the config with the head that the files have, which config.json leaves open."""
    return c if "lm_head.weight" in tensors else replace(c, tied=True)


FILES = Files(
    # Of old files, unused.
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    tied={f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")},
    infer_from_files=infer_from_files,
)


def to_hf(c: Config) -> dict[str, Any]:
    """Returns what config.json says of the architecture; refuses a model that its `model_type` can't express."""
    activation = {("gelu_new", True): "gelu"}.get((c.activation, c.gated), c.activation)
    if c.model_type == "mt5" and c.scaled:
        raise ValueError("model.scaled: mT5 does not scale its output; set model.model_type=t5")
    if c.gated and c.activation == "gelu":
        raise ValueError(
            "model.activation: files of model_type 't5' can't say gated gelu but as gelu_new; use gelu_new"
        )
    out: dict[str, Any] = dict(
        architectures=[ARCHITECTURES[c.model_type]], model_type=c.model_type, is_encoder_decoder=True,
        vocab_size=c.vocab, num_layers=c.layers, num_decoder_layers=c.depth, d_model=c.width, num_heads=c.heads,
        d_kv=c.head_width, d_ff=c.ffn, feed_forward_proj=f"gated-{activation}" if c.gated else activation,
        relative_attention_num_buckets=c.buckets, relative_attention_max_distance=c.longest, dropout_rate=c.dropout,
        layer_norm_epsilon=c.eps, tie_word_embeddings=c.tied,
    )  # fmt: skip
    if c.tied != c.scaled and c.model_type == "t5":  # which tie_word_embeddings stands for both of, without this
        out["scale_decoder_outputs"] = c.scaled
    return out if c.decoder_start is None else out | dict(decoder_start_token_id=c.decoder_start)
