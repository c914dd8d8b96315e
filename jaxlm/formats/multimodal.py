"""Multimodal models' files hold a text model: its part of `config.json` and its tensors are found here, and what else
the files hold is left out.

A kind of wrapper is read if its logits of a text without images are those of its text model. All of these multiply the
last states with the head and leave `final_logit_softcapping` unread; their rotation in sections (m-rope) turns every
section by the same position where there are no images.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxlm.core.published_config import PublishedConfig
from jaxlm.formats.safetensors import Files

_LLAMA = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    rms_norm_eps=1e-6, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
_QWEN = _LLAMA | dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
    sliding_window=4096, max_window_layers=28,
)  # fmt: skip
_QWEN_VL = _QWEN | dict(
    vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, rms_norm_eps=1e-5, max_window_layers=80, rope_theta=1e6,
)  # fmt: skip
_GEMMA = dict(
    vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, rms_norm_eps=1e-6, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A Text describes a kind of text model, whose `text_config` leaves out the defaults of transformers' class."""

    model_type: str
    """What the text model alone is called."""
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Values that hold whatever `text_config` says, because transformers' class leaves its own unread."""


TEXTS = {
    "llama": Text("llama", _LLAMA),
    "mistral": Text("mistral", _LLAMA | dict(
        intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)),
    "qwen2": Text("qwen2", _QWEN),
    "qwen3": Text("qwen3", _QWEN | dict(head_dim=128)),
    "qwen2_vl_text": Text("qwen2", _QWEN_VL),
    "qwen2_5_vl_text": Text("qwen2", _QWEN_VL),
    "qwen3_vl_text": Text("qwen3", _QWEN | dict(
        head_dim=128, max_position_embeddings=128000, rope_theta=5e5), dict(use_sliding_window=False)),
    "gemma": Text("gemma", _GEMMA | dict(
        hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=16)),
    "gemma2": Text("gemma2", _GEMMA),
    "gemma3_text": Text("gemma3_text", _GEMMA | dict(vocab_size=262208, max_position_embeddings=131072)),
}  # fmt: skip


@dataclass(frozen=True)
class Wrapper:
    """A Wrapper describes a kind of multimodal model."""

    text: str
    """Its kind of text model where `text_config` names none."""
    tied: bool = False
    """Whether the head is the embedding where config.json doesn't say it."""
    fixed: bool = False
    """Whether the text model is of that kind whatever `text_config` calls it."""
    flat: bool = False
    """Early files have the text model's values beside those of the whole."""


WRAPPERS = {
    "gemma3": Wrapper("gemma3_text", tied=True, fixed=True),
    "idefics3": Wrapper("llama"),
    "internvl": Wrapper("qwen2", tied=True),
    "llava": Wrapper("llama"),
    "llava_next": Wrapper("llama"),
    "llava_next_video": Wrapper("llama"),
    "llava_onevision": Wrapper("qwen2"),
    "mistral3": Wrapper("mistral", tied=True),
    "qwen2_vl": Wrapper("qwen2_vl_text", fixed=True, flat=True),
    "qwen2_5_vl": Wrapper("qwen2_5_vl_text", fixed=True, flat=True),
    "qwen3_vl": Wrapper("qwen3_vl_text", fixed=True),
    "smolvlm": Wrapper("llama"),
    "vipllava": Wrapper("llama"),
}
# Where the text model's tensors stand that are `model.…` in files of its own; the first that fits holds.
BODIES = ("model.language_model.", "language_model.model.", "model.text_model.", "model.")
HEADS = ("lm_head.weight", "language_model.lm_head.weight")


def is_wrapper(values: Mapping[str, Any]) -> bool:
    """Returns whether a config.json is of a multimodal model whose text model is read."""
    kind = values.get("model_type")
    return isinstance(kind, str) and kind in WRAPPERS


def text_config(values: PublishedConfig, tensors: Files | None) -> PublishedConfig:
    """Returns the config.json that the text model of a multimodal one would have. ValueError: it is of a kind that
    isn't read.

    `tensors`: those of the text model, `text_tensors`; None: the files aren't here. Where config.json doesn't say
    whether the head is the embedding they decide.
    """
    whole = values["model_type"]
    wrapper = WRAPPERS[whole]
    given = values.get("text_config")
    if given is None and not wrapper.flat:
        raise ValueError(f"{values.where}: lacks text_config, which {whole} needs")
    inner = PublishedConfig(dict(given or values), values.where if given is None else f"{values.where}: text_config")
    kind = wrapper.text if wrapper.fixed else inner.get("model_type", wrapper.text)
    if kind not in TEXTS:
        raise ValueError(
            f"{inner.where}: model_type {kind!r} inside a {whole} is not read here; known: {', '.join(sorted(TEXTS))}"
        )
    text = TEXTS[kind]
    tied = values.get("tie_word_embeddings", inner.get("tie_word_embeddings") if wrapper.flat else None)
    if tied is None:
        tied = wrapper.tied and (tensors is None or HEADS[0] not in tensors.entries)
    for name in ("rope_scaling", "rope_parameters"):
        if inner.get(name):
            inner[name] = _without_sections(inner[name])
    fixed = {**text.fixed, "model_type": text.model_type, "tie_word_embeddings": tied, "final_logit_softcapping": None}
    return PublishedConfig({**text.defaults, **inner, **fixed}, inner.where)


def _without_sections(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a rotation's parameters without those of m-rope."""
    out = {k: v for k, v in rope.items() if k not in ("mrope_section", "mrope_interleaved")}
    return {k: "default" if k in ("type", "rope_type") and v == "mrope" else v for k, v in out.items()}


def text_tensors(files: Files) -> Files:
    """Returns the text model's tensors by the names that they have in files of its own, without all others."""
    body = next((b for b in BODIES if f"{b}embed_tokens.weight" in files.entries), BODIES[0])
    entries = {}
    for name, entry in files.entries.items():
        if name in HEADS:
            entries[HEADS[0]] = entry
        elif name.startswith(body):
            entries[f"model.{name.removeprefix(body)}"] = entry
    return Files(files.directory, entries)


def text_name(name: str) -> str:
    """Returns a tensor's name in files of the text model alone, where it is a name that multimodal ones have."""
    body = next((b for b in BODIES[:-1] if name.startswith(b)), BODIES[-1])
    name = f"{BODIES[-1]}{name.removeprefix(body)}" if name.startswith(body) else name
    return name.removeprefix("language_model.") if name.startswith("language_model.lm_head.") else name


def left_out(directory: Any, whole: str, c: Any) -> str:
    """Returns a line on what of a multimodal model's files isn't read."""
    return f"{directory}: a multimodal {whole}; its text model ({c.model_type}) is read, all else is left out"
