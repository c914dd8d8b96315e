"""These tables translate between GGUF and Hugging Face: keys of metadata, names of tensors, and how numbers differ.

Facts about the format are llama.cpp's: what its converter writes and its loaders expect.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.core.errors import misspelt
from jaxlm.core.published_config import PublishedConfig
from jaxlm.formats import gguf_rope
from jaxlm.formats.gguf_metadata import Metadata
from jaxlm.formats.gguf_rope import Fields, Values


@dataclass(frozen=True)
class Architecture:
    """An architecture of GGUF says how its files correspond to Hugging Face's.

    model_types: the `model_type`s of config.json that it serves; the first is assumed of a file.
    stems: GGUF's name of a tensor, without `.weight` or `.bias`, → Hugging Face's.
    keys: GGUF's key, after the architecture's name → config.json's.
    interleaved: stems whose rows stand in pairs for rotation: first, middle, second, middle + 1 … of each head.
    transposed: stems whose weights Hugging Face stores [in, out].
    norms_plus_one: whether norm scales are stored plus one.
    name: the name in files, where another row of the table has that name too.
    read_extra: returns further values of config.json, which the architecture implies or states in its own way.
    write_extra: returns further fields by the values: the inverse of `read_extra`.
    """

    model_types: tuple[str, ...]
    stems: Mapping[str, str]
    keys: Mapping[str, str]
    interleaved: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    norms_plus_one: bool = False
    name: str = ""
    read_extra: Callable[[Fields, Values], Values] = lambda fields, values: {}
    write_extra: Callable[[Values], dict[str, Any]] = lambda values: {}


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
    names = values["tensors"]
    return dict(attention_bias="blk.0.attn_q.bias" in names, mlp_bias="blk.0.ffn_up.bias" in names)


def _check_square(values: Values) -> dict[str, Any]:
    """Raises where queries aren't as wide as the model, which llama.cpp's loaders of some architectures want."""
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
    """Returns the number whose root divides scores: the head width, but width / heads in a series' largest model."""
    if values["num_hidden_layers"] == large:
        return values["hidden_size"] // values["num_attention_heads"]
    return values["head_dim"]


def _layer_types(values: Values, period: int) -> list[str]:
    """Returns the kinds of layers, of which each `period`-th sees everything."""
    count = values["num_hidden_layers"]
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(count)]


def _gemma2(fields: Fields, values: Values) -> Values:
    return _gemma(fields, values) | dict(
        query_pre_attn_scalar=_score_width(values, 46),
        layer_types=_layer_types(values, 2),
        sliding_window=fields.get("gemma2.attention.sliding_window", 4096),
        attn_logit_softcapping=fields.get("gemma2.attn_logit_softcapping", 50.0),
        final_logit_softcapping=fields.get("gemma2.final_logit_softcapping", 30.0),
    )


def _gemma2_extra(values: Values) -> dict[str, Any]:
    names = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    return {("attention." if n == "sliding_window" else "") + n: values[n] for n in names if values.get(n) is not None}


def _gemma3(fields: Fields, values: Values) -> Values:
    full = values.pop("rope_parameters")
    local = {"rope_type": "default", "rope_theta": fields.get("gemma3.rope.freq_base_swa", 10000.0)}
    return _gemma(fields, values) | dict(
        query_pre_attn_scalar=_score_width(values, 62),
        layer_types=_layer_types(values, 6),
        sliding_window=fields.get("gemma3.attention.sliding_window"),
        rope_parameters={"full_attention": full, "sliding_attention": local},
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
    "llama": Architecture(("llama", "mistral"), STEMS, KEYS, PAIRS, read_extra=_llama),
    "mixtral": Architecture(("mixtral",), MIXTRAL_STEMS, MIXTRAL_KEYS, PAIRS, name="llama"),
    "smollm3": Architecture(("smollm3",), STEMS, KEYS, PAIRS, read_extra=_llama),
    "qwen2": Architecture(("qwen2",), STEMS, KEYS, write_extra=_check_square),
    "qwen3": Architecture(("qwen3",), STEMS, KEYS),
    "qwen3moe": Architecture(("qwen3_moe",), QWEN3MOE_STEMS, QWEN3MOE_KEYS, read_extra=_qwen3moe),
    "olmo2": Architecture(("olmo2",), OLMO2_STEMS, KEYS, write_extra=_check_square),
    "gemma": Architecture(("gemma",), GEMMA_STEMS, KEYS, norms_plus_one=True, read_extra=_gemma),
    "gemma2": Architecture(
        ("gemma2",), GEMMA2_STEMS, KEYS, norms_plus_one=True, read_extra=_gemma2, write_extra=_gemma2_extra
    ),
    "gemma3": Architecture(
        ("gemma3_text",), GEMMA2_STEMS, KEYS, norms_plus_one=True, read_extra=_gemma3, write_extra=_gemma3_extra
    ),
    "gpt2": Architecture(
        ("gpt2",),
        GPT2_STEMS,
        GPT2_KEYS,
        transposed=tuple("blk.{layer}." + n for n in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
        read_extra=_gpt2,
    ),
}


def architecture_of_fields(fields: Fields) -> str:
    """Returns the key in `ARCHITECTURES` for a file's metadata; raises a ValueError where there is none."""
    name = fields.get("general.architecture")
    if name == "llama" and fields.get("llama.expert_count"):
        return "mixtral"
    if not isinstance(name, str) or name not in ARCHITECTURES:
        hint = misspelt(str(name), ARCHITECTURES)
        raise ValueError(f"general.architecture is {name!r}{hint}; known are {', '.join(ARCHITECTURES)}")
    return str(name)


def architecture_of_model_type(model_type: str) -> str:
    """Returns the key in `ARCHITECTURES` for a `model_type`; raises a ValueError where there is none."""
    for name, a in ARCHITECTURES.items():
        if model_type in a.model_types:
            return name
    known = ", ".join(t for a in ARCHITECTURES.values() for t in a.model_types)
    raise ValueError(f"gguf: no architecture of the format for model_type {model_type!r} here; there is for {known}")


# ------------------------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Place:
    """A place says where a Hugging Face tensor stands in a GGUF file, and converts its numbers.

    `group` is the number of rows that stay together: those of a head where rows stand in pairs. `expert` is the part of
    the tensor, where all experts are in one.
    """

    name: str
    stem: str
    architecture: Architecture
    group: int = 1
    expert: int | None = None

    def read(self, w: np.ndarray) -> np.ndarray:
        """Converts GGUF's numbers to Hugging Face's."""
        if self.stem in self.architecture.interleaved:
            w = w.reshape(-1, self.group // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
        if self.stem in self.architecture.transposed and w.ndim == 2:
            w = w.T
        return w - w.dtype.type(1) if self._plus_one else w

    def write(self, w: np.ndarray) -> np.ndarray:
        """Converts Hugging Face's numbers to GGUF's."""
        if self.stem in self.architecture.interleaved:
            w = w.reshape(-1, 2, self.group // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
        if self.stem in self.architecture.transposed and w.ndim == 2:
            w = w.T
        return w + w.dtype.type(1) if self._plus_one else w

    @property
    def _plus_one(self) -> bool:
        return self.architecture.norms_plus_one and self.stem.endswith("_norm")


def hf_name(a: Architecture, name: str) -> str | None:
    """Returns the Hugging Face name of a GGUF tensor, None if unknown; `{expert}` stands for the number of each."""
    body, _, suffix = name.rpartition(".")
    number = re.match(r"blk\.(\d+)\.", body)
    stem = a.stems.get(re.sub(r"^blk\.\d+\.", "blk.{layer}.", body))
    return stem and f"{stem.format(layer=number and number[1], expert='{expert}')}.{suffix}"


def place_of(a: Architecture, name: str, values: Values) -> Place | None:
    """Returns where the Hugging Face tensor `name` stands; None if the architecture has no such tensor."""
    body, _, suffix = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", body)
    layer = number[1] if number else ""
    template = re.sub(r"\.\d+\.", ".{layer}.", body, count=1)
    expert = re.search(r"\.experts\.(\d+)\.", template)
    template = re.sub(r"\.experts\.\d+\.", ".experts.{expert}.", template)
    stem = next((stem for stem, theirs in a.stems.items() if theirs == template), None)
    if stem is None:
        return None
    group = values["head_dim"] if stem in a.interleaved else 1
    return Place(f"{stem.format(layer=layer)}.{suffix}", stem, a, group, int(expert[1]) if expert else None)


# -------------------------------------------------------------------------------------------------------------- config


def config(fields: Fields, shapes: Mapping[str, tuple[int, ...]], factors: np.ndarray | None) -> Values:
    """Returns the content of a config.json for a file's metadata.

    `shapes` are those of the file's tensors, `factors` its `rope_freqs.weight`, if any. Raises a ValueError that names
    the key where one is missing or says what no family here does.
    """
    fields = Metadata({k: gguf_rope.shortest(v) for k, v in fields.items()})
    a = ARCHITECTURES[architecture_of_fields(fields)]
    name = fields["general.architecture"]
    values: Values = PublishedConfig({"model_type": a.model_types[0]}, "metadata")
    for key, theirs in a.keys.items():
        value = fields.get(f"{name}.{key}")
        if value is None and key not in OPTIONAL:
            raise ValueError(f"{name}.{key} is missing from the metadata")
        if isinstance(value, list):
            if not value or any(v != value[0] for v in value):
                raise ValueError(f"{name}.{key} is empty or differs between layers, which no family here has")
            value = value[0]
        if value is not None:
            values[theirs] = value
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
        rotated = fields.get(f"{name}.rope.dimension_count", values["head_dim"])
        if width != values["head_dim"] or rotated != values["head_dim"]:
            raise ValueError(f"{name}: heads whose keys, values and rotated parts differ in width are not read")
    values["tensors"] = shapes.keys()
    values |= a.read_extra(fields, values)
    del values["tensors"]
    return values


def complete(values: Values) -> Values:
    """Returns values with the defaults of those that a config.json may leave out."""
    if "n_embd" in values:
        return values | {"n_inner": values.get("n_inner") or 4 * values["n_embd"]}
    return {"head_dim": values["hidden_size"] // values["num_attention_heads"]} | values


def metadata(values: Values) -> tuple[dict[str, Any], np.ndarray | None]:
    """Returns (fields, divisors of frequencies for `rope_freqs.weight` or None): the inverse of `config`."""
    name = architecture_of_model_type(values["model_type"])
    a = ARCHITECTURES[name]
    fields: dict[str, Any] = {key: values[theirs] for key, theirs in a.keys.items() if values.get(theirs) is not None}
    factors = None
    if a.keys is not GPT2_KEYS:
        fields |= {"rope.dimension_count": values["head_dim"], "attention.value_length": values["head_dim"]}
        rope = values["rope_parameters"]
        rope_fields, factors = gguf_rope.write(rope.get("full_attention", rope), values["head_dim"])
        fields |= rope_fields
    fields |= {"vocab_size": values["vocab_size"]} | a.write_extra(values)
    prefix = a.name or name
    return {"general.architecture": prefix} | {f"{prefix}.{key}": value for key, value in fields.items()}, factors
