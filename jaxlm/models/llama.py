"""Llama (Touvron et al. 2023) and its kin have RoPE, RMSNorm before each half, a gated ffn, grouped heads.

Mistral adds sliding windows, Qwen 2 biases on q, k and v, Qwen 3 norms on queries and keys, SmolLM 3 layers without
rotation; Phi-3 keeps the same weights in fewer tensors.
B batch, T position, D model width.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import jax

from jaxlm.core.ranges import Count
from jaxlm.core.spec import Spec, norm, normal, stacked
from jaxlm.core.weight_names import Name, fused, linear
from jaxlm.nn import attention_layers, block_stack, decoder, layers, rope
from jaxlm.nn.cache import Cache
from jaxlm.nn.decoder import DecoderConfig
from jaxlm.nn.family import Batch, Key, Kind, Task, TaskFiles
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.nn.moe import Moe

kind: Kind = "decoder"
generates = True


@dataclass(frozen=True)
class Config(decoder.WindowedConfig):
    ffn: Count = 2048
    rotated: tuple[bool, ...] = (True,)
    """Which layers rotate queries and keys, as a pattern that repeats."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    model_type: Literal["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3"] = "llama"
    """What published files of this model call its architecture."""
    layer_patterns = ("windowed", "rotated")

    def with_experts(self, moe: Moe) -> tuple[str, dict[str, Any]]:
        """Returns Mixtral's name and fields; Qwen 3 becomes Qwen 3 MoE."""
        qwen = self.model_type == "qwen3"
        fits = dict(
            windowed=self.window is None or all(self.windowed), rotated=all(self.rotated), mlp_bias=not self.mlp_bias,
            qkv_bias=self.qkv_bias == self.o_bias and (qwen or not self.o_bias), qk_norm=self.qk_norm == qwen,
        )  # fmt: skip
        for name, ok in fits.items():
            if not ok:
                raise ValueError(f"experts: model.{name} of this model has no place in Mixtral's layers")
        shared = {f.name: getattr(self, f.name) for f in fields(DecoderConfig)}
        own = dict(moe=moe, ffn=self.ffn, window=self.window, qk_norm=self.qk_norm, qkvo_bias=self.o_bias)
        return "mixtral", shared | own | dict(model_type="qwen3_moe" if qwen else "mixtral")


def block_specs(c: Config) -> dict[str, Spec]:
    scale = decoder.deep(c)
    return dict(
        norm1=norm(c.width),
        **decoder.attention_specs(c, "qkv" * c.qkv_bias + "o" * c.o_bias, scale),
        **(dict(q_norm=norm(c.head_width)._replace(scores=True), k_norm=norm(c.head_width)) if c.qk_norm else {}),
        norm2=norm(c.width),
        **decoder.gated_specs(c.width, c.ffn, scale, c.mlp_bias),
    )


def specs(c: Config) -> dict[str, Any]:
    return decoder.model_specs(c, normal(0.02 if c.tied else 1.0), {"blocks": stacked(c.layers, block_specs(c))})


def kinds(c: Config) -> list[tuple[int | None, bool]]:
    """Returns (window, rotated) of each layer."""
    return list(zip(decoder.windows(c), block_stack.repeated(c.rotated, c.layers), strict=True))


def forward(
    c: Config, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None, cache: Cache | None = None
) -> Output:
    k1, k2 = layers.subkeys(key, 2)
    mask, cache = decoder.mask_and_cache(batch, cache)
    rows = dict(mask=mask, sin_cos=rope.table(c.rope, c.head_width, batch["positions"]))
    rms = partial(layers.rms_norm, eps=c.eps)

    def block(p: dict, x_BTD: jax.Array, rows: dict, key: Key, kind: Any, layer_cache: Any) -> tuple[Any, Any]:
        window, rotated = kind
        k1, k2 = layers.subkeys(key, 2)
        mask, sin_cos = replace(rows["mask"], window=window), rows["sin_cos"] if rotated else None
        a_BTD, layer_cache = attention_layers.self_attention(
            p,
            rms(x_BTD, p["norm1"]),
            mask,
            shard=shard,
            sin_cos=sin_cos,
            norm=rms,
            cache=cache,
            layer_cache=layer_cache,
        )
        x_BTD += layers.dropout(a_BTD, c.dropout, k1)
        d_BTD = layers.mlp(p, rms(x_BTD, p["norm2"]), "silu", shard)
        return x_BTD + layers.dropout(d_BTD, c.dropout, k2), layer_cache

    x_BTD = layers.dropout(layers.embed(params["embed"], batch["tokens"], shard), c.dropout, k1)
    x_BTD, cache = block_stack.run_blocks(
        block, params["blocks"], specs["blocks"], x_BTD, rows, shard=shard, key=k2, kinds=kinds(c), cache=cache
    )
    return Output(rms(x_BTD, params["norm"]), cache=cache)


attention_width, readout, init_cache = decoder.attention_width, decoder.readout, decoder.init_cache


# Published files.

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
MODEL_TYPES = tuple(ARCHITECTURES)


def task_files(c: Config, task: Task) -> TaskFiles | None:
    return decoder.task_files(c, task, names(c), to_hf)


FILES = replace(decoder.FILES, task=task_files)


def names(c: Config) -> dict[str, Name]:
    table, layer = decoder.names(), decoder.LAYER
    if c.model_type == "phi3":
        table |= fused(linear, layer + "self_attn.qkv_proj.weight", "blocks/q", "blocks/k", "blocks/v")
        table |= fused(linear, layer + "mlp.gate_up_proj.weight", "blocks/gate", "blocks/up")
    return table


THETA = {"smollm3": 2e6}  # where config.json leaves rope_theta out
BIASED = ("llama", "qwen3", "smollm3")  # these alone read attention_bias
MLP_BIASED = ("llama", "smollm3")
EVERY_LAYER = ("mistral", "phi3")  # a window that is stated holds everywhere


def from_hf(values: dict[str, Any]) -> Config:
    decoder.check_silu(values)
    kind, n = values["model_type"], values["num_hidden_layers"]
    bias = kind in BIASED and bool(values.get("attention_bias", False))
    window, windowed = _windows(kind, values, n)
    rotated = [True] * n
    if kind == "smollm3":
        every = values.get("no_rope_layer_interval", 4)
        rotated = values.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(n)]
    return Config(
        **decoder.from_hf(values, eps=1e-6, tied=kind == "smollm3", head_width=128 if kind == "qwen3" else None),
        ffn=values["intermediate_size"],
        rope=rope.from_hf(values, THETA.get(kind, 1e4), partial=kind == "phi3"),
        window=window,
        windowed=block_stack.pattern(windowed),
        rotated=block_stack.pattern([bool(r) for r in rotated]),
        qk_norm=kind == "qwen3",
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias,
        mlp_bias=kind in MLP_BIASED and bool(values.get("mlp_bias", False)),
    )


def _windows(kind: str, values: dict[str, Any], n: int) -> tuple[int | None, list[bool]]:
    """Returns (window, which layers it holds for). `use_sliding_window` may turn Qwen's and SmolLM's off."""
    window = values.get("sliding_window")
    if kind == "llama" or (kind not in EVERY_LAYER and not values.get("use_sliding_window", False)):
        window = None
    types = values.get("layer_types")
    if window is None:
        return None, [True]
    if types and kind not in EVERY_LAYER:
        return window, [t == decoder.SLIDING for t in types]
    if kind == "smollm3":
        return window, [not r for r in values.get("no_rope_layers") or [(i + 1) % 4 != 0 for i in range(n)]]
    return window, [kind in EVERY_LAYER or i >= values.get("max_window_layers", 28) for i in range(n)]


def to_hf(c: Config) -> dict[str, Any]:
    """Returns what config.json says of the architecture; refuses a model that its `model_type` can't express."""
    kind = c.model_type
    allowed = dict(
        qk_norm=kind == "qwen3", qkv_bias=kind not in EVERY_LAYER, o_bias=kind not in ("mistral", "phi3", "qwen2"),
        mlp_bias=kind in MLP_BIASED, window=kind != "llama",
    )  # fmt: skip
    for name, ok in allowed.items():
        if getattr(c, name) and not ok:
            raise ValueError(f"model.{name}: not in files of model_type {kind!r}; set another model.model_type")
    if kind != "smollm3" and not all(c.rotated):
        raise ValueError(f"model.rotated: {kind!r} rotates every layer; set model.model_type=smollm3")
    if (
        (kind == "qwen3") != c.qk_norm
        or (kind == "qwen2" and not c.qkv_bias)
        or (kind not in ("qwen2",) and c.qkv_bias != c.o_bias)
    ):
        raise ValueError(f"model.model_type: {kind!r} does not have these norms and biases; set the one that fits")
    out = decoder.to_hf(c, ARCHITECTURES[kind]) | dict(intermediate_size=c.ffn)
    if kind in BIASED:
        out["attention_bias"] = c.o_bias
    if kind in MLP_BIASED:
        out["mlp_bias"] = c.mlp_bias
    if kind in EVERY_LAYER:
        if not all(c.windowed):
            raise ValueError(f"model.windowed: {kind} has the window in every layer; set model.model_type=qwen2")
        out["sliding_window"] = c.window
    elif kind != "llama":
        out |= dict(use_sliding_window=c.window is not None, sliding_window=c.window)
        out["layer_types"] = decoder.layer_types(c)
    if kind == "smollm3":
        out["no_rope_layers"] = [int(rotated) for _, rotated in kinds(c)]
    if kind == "phi3" and c.rope.trained:  # transformers takes this one, whatever rope_parameters say
        out["original_max_position_embeddings"] = c.rope.trained
    return out
