"""Gemma 1, 2 and 3 (Gemma Team 2024, 2024b, 2025) have norms as 1 + w, scaled embeddings, GELU gates, wide heads.

Gemma 2 adds norms after each half, soft caps and alternating local layers; Gemma 3 norms queries and keys instead of
capping scores, and rotates local layers by frequencies of their own.
B batch, T position, D model width.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.core import spec
from jaxlm.core.published_config import PublishedConfig
from jaxlm.core.ranges import Count, NonNegative, Positive
from jaxlm.core.spec import Spec, normal, stacked, zeros
from jaxlm.core.weight_names import Name, vector
from jaxlm.nn import attention_layers, block_stack, decoder, layers, rope
from jaxlm.nn.cache import Cache
from jaxlm.nn.family import Batch, Key, Kind, Task, TaskFiles
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import Readout
from jaxlm.nn.rope import Rope

kind: Kind = "decoder"
generates = True


@dataclass(frozen=True)
class Config(decoder.WindowedConfig):
    vocab: Count = 256000
    heads: Count = 4
    kv_heads: Count = 1
    head_width: Count = 256
    ffn: Count = 3072
    rope_local: Rope = field(default_factory=Rope)
    """Gemma 3: the rotation of the layers that the window holds for."""
    windowed: tuple[bool, ...] = (True, False)
    score_width: Positive = 256
    """Scores are divided by the square root of this."""
    softcap_scores: Positive | None = None
    softcap_logits: Positive | None = None
    bias: bool = False
    """Biases are added to q, k, v and o."""
    tied: bool = True
    activation: str = "gelu_pytorch_tanh"
    eps: NonNegative = 1e-6
    model_type: Literal["gemma", "gemma2", "gemma3_text"] = "gemma3_text"
    """Decides the norms: gemma has none after the halves, gemma3_text has some on queries and keys."""


def block_specs(c: Config) -> dict[str, Spec]:
    D, scale, norm = c.width, decoder.deep(c), partial(spec.norm, init=zeros)
    out = dict(
        norm1=norm(D),
        **decoder.attention_specs(c, "qkvo" if c.bias else "", scale),
        norm2=norm(D),
        **decoder.gated_specs(D, c.ffn, scale),
    )
    if c.model_type != "gemma":
        # Norms by what they do, but the adapter `norms` leaves them as they are, and its runs rely on that.
        after = Spec((D,), (None,), zeros, silent=-1.0)
        out |= dict(after1=after, after2=after)
    if c.model_type == "gemma3_text":
        out |= dict(q_norm=norm(c.head_width), k_norm=norm(c.head_width))
    return out


def specs(c: Config) -> dict[str, Any]:
    return decoder.model_specs(c, normal(c.width**-0.5), {"blocks": stacked(c.layers, block_specs(c))}, zeros)


def forward(
    c: Config, specs: Any, params: Any, batch: Batch, *, shard: Layout, key: Key = None, cache: Cache | None = None
) -> Output:
    k1, k2 = layers.subkeys(key, 2)
    mask, cache = decoder.mask_and_cache(batch, cache)
    far = rope.table(c.rope, c.head_width, batch["positions"])
    near = rope.table(c.rope_local, c.head_width, batch["positions"]) if c.model_type == "gemma3_text" else far
    rows = dict(mask=mask, near=near, far=far)

    def norm(x: jax.Array, w: jax.Array) -> jax.Array:
        return layers.rms_norm(x, 1 + w.astype(jnp.float32), c.eps)

    def block(p: dict, x_BTD: jax.Array, rows: dict, key: Key, window: Any, layer_cache: Any) -> tuple[Any, Any]:
        k1, k2 = layers.subkeys(key, 2)
        mask, sin_cos = replace(rows["mask"], window=window), rows["far" if window is None else "near"]
        a_BTD, layer_cache = attention_layers.self_attention(
            p, norm(x_BTD, p["norm1"]), mask, shard=shard, sin_cos=sin_cos, norm=norm, scale=c.score_width**-0.5,
            softcap=c.softcap_scores, cache=cache, layer_cache=layer_cache,
        )  # fmt: skip
        a_BTD = norm(a_BTD, p["after1"]) if "after1" in p else a_BTD
        x_BTD += layers.dropout(a_BTD, c.dropout, k1)
        d_BTD = layers.mlp(p, norm(x_BTD, p["norm2"]), c.activation, shard)
        d_BTD = norm(d_BTD, p["after2"]) if "after2" in p else d_BTD
        return x_BTD + layers.dropout(d_BTD, c.dropout, k2), layer_cache

    x_BTD = layers.embed(params["embed"], batch["tokens"], shard)
    x_BTD = layers.dropout(x_BTD * jnp.asarray(c.width**0.5, x_BTD.dtype), c.dropout, k1)
    kinds = decoder.windows(c)
    x_BTD, cache = block_stack.run_blocks(
        block, params["blocks"], specs["blocks"], x_BTD, rows, shard=shard, key=k2, kinds=kinds, cache=cache
    )
    return Output(norm(x_BTD, params["norm"]), cache=cache)


def readout(c: Config, specs: Any, params: Any, x_BTD: jax.Array, *, shard: Layout) -> Readout:
    return replace(decoder.readout(c, specs, params, x_BTD, shard=shard), softcap=c.softcap_logits)


attention_width, init_cache = decoder.attention_width, decoder.init_cache


# Published files.

ARCHITECTURES = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
MODEL_TYPES = tuple(ARCHITECTURES)
# Of classes with a task's head: how their names begin, and the matrix on each token.
STEMS = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text"}
OF_TOKENS = {"gemma": "score", "gemma2": "score", "gemma3_text": ""}


def task_files(c: Config, task: Task) -> TaskFiles | None:
    return decoder.task_files(c, task, names(c), to_hf, stem=STEMS[c.model_type], of_tokens=OF_TOKENS[c.model_type])


FILES = replace(decoder.FILES, task=task_files)


def names(c: Config) -> dict[str, Name]:
    out = decoder.names()
    if c.model_type == "gemma":
        return out
    return out | {
        "blocks/norm2": vector(decoder.LAYER + "pre_feedforward_layernorm.weight"),
        "blocks/after1": vector(decoder.LAYER + "post_attention_layernorm.weight"),
        "blocks/after2": vector(decoder.LAYER + "post_feedforward_layernorm.weight"),
    }


SOFT_CAPS = {"gemma2": (50.0, 30.0)}  # of scores and logits, where config.json leaves them out


def from_hf(values: dict[str, Any]) -> Config:
    kind, n = values["model_type"], values["num_hidden_layers"]
    if values.get("use_bidirectional_attention"):
        raise ValueError(f"config.json: use_bidirectional_attention of {kind} is not supported")
    period = {"gemma2": 2, "gemma3_text": values.get("sliding_window_pattern") or 6}.get(kind, 1)
    types = values.get("layer_types") or ["full" if (i + 1) % period == 0 else decoder.SLIDING for i in range(n)]
    scores, logits = SOFT_CAPS.get(kind, (None, None))
    later: dict[str, Any] = dict(score_width=values.get("head_dim", 256))
    if kind != "gemma":
        later = dict(
            window=values.get("sliding_window", 4096),
            windowed=block_stack.pattern([t == decoder.SLIDING for t in types]),
            score_width=values.get("query_pre_attn_scalar", 256),
            # Gemma 3's code leaves it unread.
            softcap_scores=values.get("attn_logit_softcapping", scores) if kind == "gemma2" else None,
            softcap_logits=values.get("final_logit_softcapping", logits),
        )
    far, near = _ropes(values)
    return Config(
        **decoder.from_hf(values, eps=1e-6, tied=True, head_width=256) | dict(kv_heads=values["num_key_value_heads"]),
        **later,
        ffn=values["intermediate_size"],
        rope=far,
        rope_local=near,
        bias=bool(values.get("attention_bias", False)),
        activation=_activation(values),
    )


def _activation(values: dict[str, Any]) -> str:
    """Returns the activation's name. Early files say `gelu` and mean its tanh form."""
    first = values["model_type"] == "gemma"
    name = values.get("hidden_act" if first else "hidden_activation") or "gelu_pytorch_tanh"
    name = "gelu_pytorch_tanh" if name == "gelu" and first else name
    if name not in layers.ACTIVATIONS:
        raise ValueError(f"config.json: hidden_activation {name!r} of {values['model_type']} is not supported")
    return name


def _ropes(values: dict[str, Any]) -> tuple[Rope, Rope]:
    """Returns the rotations of global and of local layers. Early Gemma 3 files scale the global ones alone."""
    if values["model_type"] != "gemma3_text":
        return rope.from_hf(values, 1e4), Rope()
    nested = values.get("rope_parameters") or {}
    far = nested.get("full_attention") or values.get("rope_scaling")
    near = {"rope_theta": values.get("rope_local_base_freq") or 1e4} | (nested.get("sliding_attention") or {})
    plain = PublishedConfig(values).without("rope_theta", "rope_scaling", "rope_parameters")
    return rope.from_hf(values, 1e6, far or {"rope_type": "default"}), rope.from_hf(plain, 1e4, near)


def to_hf(c: Config) -> dict[str, Any]:
    """Returns what config.json says of the architecture; refuses a model that its `model_type` can't express."""
    kind = c.model_type
    if kind == "gemma" and (c.window or c.softcap_scores or c.softcap_logits or c.score_width != c.head_width):
        raise ValueError("model.model_type: gemma has no window, soft caps or score width; set gemma2 or gemma3_text")
    if kind == "gemma3_text" and c.softcap_scores:  # its config has the field, and its code ignores it
        raise ValueError("model.softcap_scores: not in files of model_type gemma3_text; set model.model_type=gemma2")
    out = decoder.to_hf(c, ARCHITECTURES[kind], 1 << 17) | dict(intermediate_size=c.ffn, attention_bias=c.bias)
    del out["hidden_act"]
    out["hidden_act" if kind == "gemma" else "hidden_activation"] = c.activation
    if kind == "gemma3_text":
        out["rope_parameters"] = dict(full_attention=rope.to_hf(c.rope), sliding_attention=rope.to_hf(c.rope_local))
    if kind != "gemma":
        out |= dict(
            sliding_window=c.window, query_pre_attn_scalar=c.score_width, attn_logit_softcapping=c.softcap_scores,
            final_logit_softcapping=c.softcap_logits, layer_types=decoder.layer_types(c),
        )  # fmt: skip
    return out
