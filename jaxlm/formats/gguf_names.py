"""GGUF's architectures beside Hugging Face's: keys of the metadata, names of tensors, and how their numbers differ.

Facts about the format are llama.cpp's: what its converter writes and its loaders expect.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.core.errors import nearest
from jaxlm.formats import gguf_rope
from jaxlm.formats.gguf_rope import Fields, Values


@dataclass(frozen=True)
class Architecture:
    model_types: tuple[str, ...]
    """Those of config.json that this architecture holds; the first is assumed of a file."""
    stems: Mapping[str, str]
    """GGUF's name of a tensor, without `.weight` or `.bias`, → Hugging Face's."""
    keys: Mapping[str, str]
    """GGUF's key, after the architecture's name → config.json's."""
    pairs: tuple[str, ...] = ()
    """Stems whose rows stand in pairs for interleaved rotation: first, middle, second, middle + 1 … of each head."""
    turned: tuple[str, ...] = ()
    """Stems whose weights Hugging Face stores [in, out]."""
    one: bool = False
    """Norm scales are stored plus one."""
    name: str = ""
    """What files call it, where another row of the table has that name too."""
    more: Callable[[Fields, Values], Values] = lambda fields, values: {}
    """Further values of config.json: what the architecture implies, or says in its own way."""
    extra: Callable[[Values], dict[str, Any]] = lambda values: {}
    """The inverse of `more`: further fields, from values."""


KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL = {"attention.head_count_kv", "attention.key_length", "attn_logit_softcapping", "final_logit_softcapping"}
MIXTRAL_KEYS = KEYS | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
QWEN3MOE_KEYS = KEYS | {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
GPT2_KEYS = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}

_BLOCK = "model.layers.{layer}."
STEMS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    **{
        "blk.{layer}." + ours: _BLOCK + theirs
        for ours, theirs in {
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }.items()
    },
}
_AFTER = {
    "blk.{layer}.post_attention_norm": _BLOCK + "post_attention_layernorm",
    "blk.{layer}.post_ffw_norm": _BLOCK + "post_feedforward_layernorm",
}
GEMMA_STEMS = {ours: theirs for ours, theirs in STEMS.items() if ours != "output"}  # the head is always the embedding
GEMMA2_STEMS = GEMMA_STEMS | _AFTER | {"blk.{layer}.ffn_norm": _BLOCK + "pre_feedforward_layernorm"}
OLMO2_STEMS = {k: v for k, v in STEMS.items() if not k.endswith((".attn_norm", ".ffn_norm"))} | _AFTER
# All experts of a layer stand in one tensor, one after another.
MIXTRAL_STEMS = STEMS | {
    "blk.{layer}.ffn_gate_inp": _BLOCK + "block_sparse_moe.gate",
    "blk.{layer}.ffn_gate_exps": _BLOCK + "block_sparse_moe.experts.{expert}.w1",
    "blk.{layer}.ffn_up_exps": _BLOCK + "block_sparse_moe.experts.{expert}.w3",
    "blk.{layer}.ffn_down_exps": _BLOCK + "block_sparse_moe.experts.{expert}.w2",
}
QWEN3MOE_STEMS = STEMS | {
    "blk.{layer}.ffn_gate_inp": _BLOCK + "mlp.gate",
    **{f"blk.{{layer}}.ffn_{n}_exps": _BLOCK + f"mlp.experts.{{expert}}.{n}_proj" for n in ("gate", "up", "down")},
}
GPT2_STEMS = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    **{
        "blk.{layer}." + ours: "transformer.h.{layer}." + theirs
        for ours, theirs in {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        }.items()
    },
}
PAIRS = ("blk.{layer}.attn_q", "blk.{layer}.attn_k")


# -------------------------------------------------------------------------------------- what an architecture adds


def _llama(fields: Fields, values: Values) -> Values:
    held = values["tensors"]
    return dict(attention_bias="blk.0.attn_q.bias" in held, mlp_bias="blk.0.ffn_up.bias" in held)


def _square(values: Values) -> dict[str, Any]:
    """llama.cpp's loaders of some architectures want queries as wide as the model."""
    if values["head_dim"] * values["num_attention_heads"] != values["hidden_size"]:
        heads = f"{values['num_attention_heads']} heads of {values['head_dim']}"
        raise ValueError(
            f"gguf: llama.cpp wants {values['model_type']} with heads × head_dim = hidden_size, not {heads}"
        )
    return {}


def _qwen3moe(fields: Fields, values: Values) -> Values:
    return dict(norm_topk_prob=True, mlp_only_layers=[], decoder_sparse_step=1)


def _gemma(fields: Fields, values: Values) -> Values:
    return dict(hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh")


def _score_width(values: Values, large: int) -> float:
    """Scores are divided by the root of this: the head width, but the largest model of a series has width / heads."""
    if values["num_hidden_layers"] == large:
        return values["hidden_size"] // values["num_attention_heads"]
    return values["head_dim"]


def _local(values: Values, period: int) -> list[str]:
    """Kinds of layers of which each `period`-th sees everything."""
    count = values["num_hidden_layers"]
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(count)]


def _gemma2(fields: Fields, values: Values) -> Values:
    return _gemma(fields, values) | dict(
        query_pre_attn_scalar=_score_width(values, 46),
        layer_types=_local(values, 2),
        sliding_window=fields.get("gemma2.attention.sliding_window", 4096),
        attn_logit_softcapping=fields.get("gemma2.attn_logit_softcapping", 50.0),
        final_logit_softcapping=fields.get("gemma2.final_logit_softcapping", 30.0),
    )


def _gemma2_extra(values: Values) -> dict[str, Any]:
    names = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    return {("attention." if n == "sliding_window" else "") + n: values[n] for n in names if values.get(n) is not None}


def _gemma3(fields: Fields, values: Values) -> Values:
    everywhere = values.pop("rope_parameters")
    local = {"rope_type": "default", "rope_theta": fields.get("gemma3.rope.freq_base_swa", 10000.0)}
    return _gemma(fields, values) | dict(
        query_pre_attn_scalar=_score_width(values, 62),
        layer_types=_local(values, 6),
        sliding_window=fields.get("gemma3.attention.sliding_window"),
        rope_parameters={"full_attention": everywhere, "sliding_attention": local},
    )


def _gemma3_extra(values: Values) -> dict[str, Any]:
    local = values["rope_parameters"]["sliding_attention"]
    out = {"attention.sliding_window": values["sliding_window"], "rope.freq_base_swa": float(local["rope_theta"])}
    if local.get("rope_type", "default") != "default":
        raise ValueError(f"gguf: gemma3 can't hold rope_type {local['rope_type']!r} of sliding_attention layers")
    return out


def _gpt2(fields: Fields, values: Values) -> Values:
    return dict(activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(("llama", "mistral"), STEMS, KEYS, PAIRS, more=_llama),
    "mixtral": Architecture(("mixtral",), MIXTRAL_STEMS, MIXTRAL_KEYS, PAIRS, name="llama"),
    "smollm3": Architecture(("smollm3",), STEMS, KEYS, PAIRS, more=_llama),
    "qwen2": Architecture(("qwen2",), STEMS, KEYS, extra=_square),
    "qwen3": Architecture(("qwen3",), STEMS, KEYS),
    "qwen3moe": Architecture(("qwen3_moe",), QWEN3MOE_STEMS, QWEN3MOE_KEYS, more=_qwen3moe),
    "olmo2": Architecture(("olmo2",), OLMO2_STEMS, KEYS, extra=_square),
    "gemma": Architecture(("gemma",), GEMMA_STEMS, KEYS, one=True, more=_gemma),
    "gemma2": Architecture(("gemma2",), GEMMA2_STEMS, KEYS, one=True, more=_gemma2, extra=_gemma2_extra),
    "gemma3": Architecture(("gemma3_text",), GEMMA2_STEMS, KEYS, one=True, more=_gemma3, extra=_gemma3_extra),
    "gpt2": Architecture(
        ("gpt2",),
        GPT2_STEMS,
        GPT2_KEYS,
        turned=tuple("blk.{layer}." + n for n in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
        more=_gpt2,
    ),
}


def of_fields(fields: Fields) -> str:
    """Row of the table for a file's metadata."""
    name = fields.get("general.architecture")
    if name == "llama" and fields.get("llama.expert_count"):
        return "mixtral"
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        hint = nearest(str(name), ARCHITECTURES)
        raise ValueError(f"general.architecture is {name!r}{hint}; known are {known}")
    return str(name)


def of_model_type(model_type: str) -> str:
    for name, a in ARCHITECTURES.items():
        if model_type in a.model_types:
            return name
    known = ", ".join(t for a in ARCHITECTURES.values() for t in a.model_types)
    raise ValueError(f"gguf: no architecture of the format for model_type {model_type!r} here; there is for {known}")


# ------------------------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Place:
    """Where a tensor of the Hugging Face form stands in a GGUF file, and how its numbers are brought over."""

    name: str
    stem: str
    a: Architecture
    group: int = 1
    """Rows that stay together: those of a head where they stand in pairs."""
    expert: int | None = None
    """Which part of the tensor, where all experts are in one."""

    def read(self, w: np.ndarray) -> np.ndarray:
        if self.stem in self.a.pairs:
            w = w.reshape(-1, self.group // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
        if self.stem in self.a.turned and w.ndim == 2:
            w = w.T
        return w - w.dtype.type(1) if self._plus_one else w

    def write(self, w: np.ndarray) -> np.ndarray:
        if self.stem in self.a.pairs:
            w = w.reshape(-1, 2, self.group // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
        if self.stem in self.a.turned and w.ndim == 2:
            w = w.T
        return w + w.dtype.type(1) if self._plus_one else w

    @property
    def _plus_one(self) -> bool:
        return self.a.one and self.stem.endswith("_norm")


def theirs(a: Architecture, name: str) -> str | None:
    """The Hugging Face name of a GGUF file's tensor, `{expert}` standing for the number of each."""
    body, _, suffix = name.rpartition(".")
    number = re.match(r"blk\.(\d+)\.", body)
    stem = a.stems.get(re.sub(r"^blk\.\d+\.", "blk.{layer}.", body))
    return stem and f"{stem.format(layer=number and number[1], expert='{expert}')}.{suffix}"


def place(a: Architecture, file: str, values: Values) -> Place | None:
    """Where the Hugging Face tensor `file` stands; None if the architecture has no such tensor."""
    body, _, suffix = file.rpartition(".")
    number = re.search(r"\.(\d+)\.", body)
    layer = number[1] if number else ""
    template = re.sub(r"\.\d+\.", ".{layer}.", body, count=1)
    expert = re.search(r"\.experts\.(\d+)\.", template)
    template = re.sub(r"\.experts\.\d+\.", ".experts.{expert}.", template)
    stem = next((ours for ours, theirs in a.stems.items() if theirs == template), None)
    if stem is None:
        return None
    group = values["head_dim"] if stem in a.pairs else 1
    return Place(f"{stem.format(layer=layer)}.{suffix}", stem, a, group, int(expert[1]) if expert else None)


# -------------------------------------------------------------------------------------------------------------- config


def config(fields: Fields, shapes: Mapping[str, tuple[int, ...]], factors: np.ndarray | None) -> Values:
    """What config.json would say. `shapes` of the file's tensors; `factors`: its `rope_freqs.weight`, if any."""
    a = ARCHITECTURES[of_fields(fields)]
    name = fields["general.architecture"]
    values: Values = {"model_type": a.model_types[0]}
    for key, theirs in a.keys.items():
        found = fields.get(f"{name}.{key}")
        if found is None and key not in OPTIONAL:
            raise ValueError(f"{name}.{key} is missing from the metadata")
        if isinstance(found, list):
            if len(set(found)) > 1:
                raise ValueError(f"{name}.{key} differs between layers, which no family here has")
            found = found[0]
        if found is not None:
            values[theirs] = gguf_rope.shortest(found)
    if fields.get(f"{name}.expert_count") and "expert_count" not in a.keys:
        raise ValueError(f"{name}.expert_count: a mixture of experts in a GGUF file is not read")
    if "token_embd.weight" not in shapes:
        raise ValueError("token_embd.weight is missing")
    values["vocab_size"] = shapes["token_embd.weight"][0]
    values["tie_word_embeddings"] = "output.weight" not in shapes
    if a.keys is not GPT2_KEYS:
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        values["rope_parameters"] = gguf_rope.read(fields, name, factors)
        width = fields.get(f"{name}.attention.value_length", values["head_dim"])
        turned = fields.get(f"{name}.rope.dimension_count", values["head_dim"])
        if width != values["head_dim"] or turned != values["head_dim"]:
            raise ValueError(f"{name}: heads whose keys, values and rotated parts differ in width are not read")
    values["tensors"] = shapes.keys()
    values |= a.more({k: gguf_rope.shortest(v) for k, v in fields.items()}, values)
    del values["tensors"]
    return values


def complete(values: Values) -> Values:
    """With what config.json may leave open."""
    if "n_embd" in values:
        return values | {"n_inner": values.get("n_inner") or 4 * values["n_embd"]}
    return {"head_dim": values["hidden_size"] // values["num_attention_heads"]} | values


def metadata(values: Values) -> tuple[dict[str, Any], np.ndarray | None]:
    """The inverse of `config`: fields, and the divisors of frequencies (`rope_freqs.weight`) where there are some."""
    name = of_model_type(values["model_type"])
    a = ARCHITECTURES[name]
    fields: dict[str, Any] = {key: values[theirs] for key, theirs in a.keys.items() if values.get(theirs) is not None}
    factors = None
    if a.keys is not GPT2_KEYS:
        fields |= {"rope.dimension_count": values["head_dim"], "attention.value_length": values["head_dim"]}
        rope = values["rope_parameters"]
        more, factors = gguf_rope.write(rope.get("full_attention", rope), values["head_dim"])
        fields |= more
    fields |= {"vocab_size": values["vocab_size"]} | a.extra(values)
    prefix = a.name or name
    return {"general.architecture": prefix} | {f"{prefix}.{key}": value for key, value in fields.items()}, factors
