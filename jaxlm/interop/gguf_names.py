"""GGUF's architectures beside Hugging Face's: keys of the metadata, names of tensors, and how their numbers differ.

Facts about the format are llama.cpp's: what its converter writes and its loaders expect.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.config import nearest

Fields = Mapping[str, Any]
Values = dict[str, Any]
"""What stands in a config.json."""


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
    "smollm3": Architecture(("smollm3",), STEMS, KEYS, PAIRS, more=_llama),
    "qwen2": Architecture(("qwen2",), STEMS, KEYS, extra=_square),
    "qwen3": Architecture(("qwen3",), STEMS, KEYS),
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


def architecture(name: Any) -> Architecture:
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        hint = nearest(str(name), ARCHITECTURES)
        raise ValueError(f"general.architecture is {name!r}{hint}; known are {known}")
    return ARCHITECTURES[name]


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
    """The Hugging Face name of a GGUF file's tensor."""
    body, _, suffix = name.rpartition(".")
    number = re.match(r"blk\.(\d+)\.", body)
    stem = a.stems.get(re.sub(r"^blk\.\d+\.", "blk.{layer}.", body))
    return stem and f"{stem.format(layer=number and number[1])}.{suffix}"


def place(a: Architecture, file: str, values: Values) -> Place | None:
    """Where the Hugging Face tensor `file` stands; None if the architecture has no such tensor."""
    body, _, suffix = file.rpartition(".")
    number = re.search(r"\.(\d+)\.", body)
    layer = number[1] if number else ""
    template = re.sub(r"\.\d+\.", ".{layer}.", body, count=1)
    stem = next((ours for ours, theirs in a.stems.items() if theirs == template), None)
    if stem is None:
        return None
    group = values["head_dim"] if stem in a.pairs else 1
    return Place(f"{stem.format(layer=layer)}.{suffix}", stem, a, group)


# -------------------------------------------------------------------------------------------------------------- config


def shortest(x: Any) -> Any:
    """A number as people wrote it: the file's float32 1e-5 is 9.999999747378752e-06 as a Python float."""
    return float(str(np.float32(x))) if isinstance(x, float) else x


def config(fields: Fields, shapes: Mapping[str, tuple[int, ...]], factors: np.ndarray | None) -> Values:
    """What config.json would say. `shapes` of the file's tensors; `factors`: its `rope_freqs.weight`, if any."""
    name = str(fields.get("general.architecture"))
    a = architecture(name)
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
            values[theirs] = shortest(found)
    if fields.get(f"{name}.expert_count"):
        raise ValueError(f"{name}.expert_count: a mixture of experts in a GGUF file is not read")
    if "token_embd.weight" not in shapes:
        raise ValueError("token_embd.weight is missing")
    values["vocab_size"] = shapes["token_embd.weight"][0]
    values["tie_word_embeddings"] = "output.weight" not in shapes
    if a.keys is KEYS:
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        values["rope_parameters"] = _rope(fields, name, values, factors)
        width = fields.get(f"{name}.attention.value_length", values["head_dim"])
        turned = fields.get(f"{name}.rope.dimension_count", values["head_dim"])
        if width != values["head_dim"] or turned != values["head_dim"]:
            raise ValueError(f"{name}: heads whose keys, values and rotated parts differ in width are not read")
    values["tensors"] = shapes.keys()
    values |= a.more({k: shortest(v) for k, v in fields.items()}, values)
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
    if a.keys is KEYS:
        fields |= {"rope.dimension_count": values["head_dim"], "attention.value_length": values["head_dim"]}
        rope = values["rope_parameters"]
        more, factors = _rope_fields(rope.get("full_attention", rope), values["head_dim"])
        fields |= more
    fields |= {"vocab_size": values["vocab_size"]} | a.extra(values)
    return {f"{name}.{key}": value for key, value in fields.items()}, factors


# ------------------------------------------------------------------------------------------------------------ rotation


def _rope(fields: Fields, name: str, values: Values, factors: np.ndarray | None) -> Values:
    told = {k: shortest(v) for k, v in fields.items() if k.startswith(f"{name}.rope.")}
    out: Values = {"rope_type": "default", "rope_theta": told.get(f"{name}.rope.freq_base", 10000.0)}
    scaling = f"{name}.rope.scaling."
    kind = told.get(scaling + "type", "none")
    known = {"type", "factor", "original_context_length", "finetuned"}
    known |= {"yarn_beta_fast", "yarn_beta_slow"} if kind == "yarn" else set()
    odd = {k for k in told if k.startswith(scaling)} - {scaling + k for k in known}
    odd = {k for k in odd if not (k.endswith("attn_factor") and told[k] == 1)}
    if odd or kind not in ("none", "linear", "yarn") or (kind != "none" and factors is not None):
        raise ValueError(f"{scaling}type {kind!r}{' with ' + ', '.join(sorted(odd)) if odd else ''} is not read")
    if factors is not None:
        return out | _fit_llama3(factors, out["rope_theta"], told.get(scaling + "original_context_length", 8192))
    if kind != "none":
        out |= {"rope_type": kind, "factor": told[scaling + "factor"]}
    if kind == "yarn":
        out["original_max_position_embeddings"] = told[scaling + "original_context_length"]
        out |= {k: told[scaling + "yarn_" + k] for k in ("beta_fast", "beta_slow") if scaling + "yarn_" + k in told}
    return out


def _plain(theta: float, width: int) -> np.ndarray:
    return theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def _llama3(plain: np.ndarray, p: Mapping[str, Any]) -> np.ndarray:
    """Divisors of the plain frequencies."""
    turns = p["original_max_position_embeddings"] * plain / (2 * np.pi)
    keep = (turns - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])
    keep = np.clip(keep, 0, 1)
    return 1 / ((1 - keep) / p["factor"] + keep)


def _fit_llama3(factors: np.ndarray, theta: float, trained: int) -> Values:
    """What gave these divisors; `trained` is a guess.

    Only trained / low and trained / high count, so low is 1, as in every published model.
    """
    factors = factors.astype(np.float64).reshape(-1)
    plain, most = _plain(theta, 2 * len(factors)), float(factors.max())
    usual = {
        "factor": most,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": trained,
    }
    tried = [usual]
    between = (factors > 1 + 1e-4) & (factors < most * (1 - 1e-4))
    if between.sum() >= 2:
        keep = (1 / factors[between] - 1 / most) / (1 - 1 / most)
        slope, start = np.polyfit(plain[between], keep, 1)
        high = 1 - 1 / start
        trained = round(slope * 2 * np.pi * (high - 1))
        tried.append(usual | {"high_freq_factor": round(high, 3), "original_max_position_embeddings": trained})
    for p in tried:
        if np.allclose(_llama3(plain, p), factors, rtol=1e-4):
            return {"rope_type": "llama3"} | p
    raise ValueError("rope_freqs.weight: divisors of frequencies of another form than Llama 3's are not read")


def _rope_fields(p: Mapping[str, Any], width: int) -> tuple[dict[str, Any], np.ndarray | None]:
    fields: dict[str, Any] = {"rope.freq_base": float(p["rope_theta"])}
    kind = p.get("rope_type", "default")
    if kind == "llama3":
        fields["rope.scaling.original_context_length"] = p["original_max_position_embeddings"]
        return fields, _llama3(_plain(p["rope_theta"], width), p).astype(np.float32)
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(p["factor"])}
    if kind == "yarn":
        fields["rope.scaling.original_context_length"] = p["original_max_position_embeddings"]
        fields |= {f"rope.scaling.yarn_{k}": float(p[k]) for k in ("beta_fast", "beta_slow") if k in p}
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(f"gguf: rope_type {kind!r} has no form in the file")
    return fields, None
