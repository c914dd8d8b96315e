"""A Hugging Face directory has sidecars of the weights: generation settings, chat template, tokenizer."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.data import tokenizer as tokenizers
from jaxlm.formats import tokenizer_json
from jaxlm.formats.safetensors import read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
EMBEDDING_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")

# ------------------------------------------------------------------------------------------------- generation settings


@dataclass(frozen=True)
class Generation:
    """These are the settings of a `generation_config.json`; None where it says nothing."""

    eos: tuple[int, ...] = ()
    """Any of these tokens ends a text."""
    bos: int | None = None
    pad: int | None = None
    start: int | None = None
    """It is the first token of an encoder-decoder's answer."""
    sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram: int | None = None
    beams: int | None = None
    length_penalty: float | None = None
    early_stopping: str | None = None
    """When beam search ends a prompt: `no`, `yes` or `never`."""
    new_tokens: int | None = None
    min_new_tokens: int | None = None
    length: int | None = None
    """The most tokens of a prompt and its answer together; of an encoder-decoder's answer with its start token."""
    min_length: int | None = None
    """The least tokens of the same."""
    forced_bos: int | None = None
    """An encoder-decoder's answer begins with it."""
    forced_eos: int | None = None
    """An answer that becomes as long as it may ends with it."""
    banned: tuple[int, ...] = ()
    """These tokens are never chosen."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer."""
    others: tuple[str, ...] = ()
    """These settings of the file are set to something and have no field here: whoever generates must say so."""


# Hugging Face's name of a setting → (our field, type).
SETTINGS: dict[str, tuple[str, type]] = {
    "eos_token_id": ("eos", int),
    "bos_token_id": ("bos", int),
    "pad_token_id": ("pad", int),
    "decoder_start_token_id": ("start", int),
    "do_sample": ("sample", bool),
    "temperature": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "no_repeat_ngram_size": ("no_repeat_ngram", int),
    "num_beams": ("beams", int),
    "length_penalty": ("length_penalty", float),
    "early_stopping": ("early_stopping", str),
    "max_new_tokens": ("new_tokens", int),
    "min_new_tokens": ("min_new_tokens", int),
    "max_length": ("length", int),
    "min_length": ("min_length", int),
    "forced_bos_token_id": ("forced_bos", int),
    "forced_eos_token_id": ("forced_eos", int),
    "suppress_tokens": ("banned", int),
    "stop_strings": ("stop", str),
}
SEVERAL = ("eos", "banned", "stop")  # these may be lists
EARLY_STOPPING: dict[Any, str] = {True: "yes", False: "no", "never": "never"}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")  # config.json has these too
# These settings change how fast text comes or what else is returned, never the text.
IGNORED = (
    "transformers_version", "_from_model_config", "use_cache", "cache_implementation", "cache_config", "max_cache_len",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "compile_config", "disable_compile", "continuous_batching_config", "low_memory",
    "prefill_chunk_size", "use_mtp", "speculation_type", "remove_invalid_values", "renormalize_logits",
)  # fmt: skip
# These values say nothing, as false, 0 and empty ones do. (Renormalising after each filter changes no draw.)
NEUTRAL = dict(
    typical_p=1.0, encoder_repetition_penalty=1.0, guidance_scale=1, num_beam_groups=1, num_return_sequences=1
)


def read_generation(directory: str | Path) -> Generation:
    """Reads `generation_config.json`; token ids that it lacks come from `config.json`.

    Raises a ValueError that names the setting where a value is of another type.
    """
    path, main = Path(directory) / "generation_config.json", Path(directory) / "config.json"
    values = {k: v for k, v in (read_json(main) if main.is_file() else {}).items() if k in IDS}
    values |= {k: v for k, v in (read_json(path) if path.is_file() else {}).items() if v is not None}
    if "early_stopping" in values:
        stated = values["early_stopping"]
        if stated not in (True, False, "never"):
            raise ValueError(f"{path}: early_stopping is {stated!r}, and may be true, false or 'never'")
        values["early_stopping"] = EARLY_STOPPING[stated]
    forced = values.get("forced_eos_token_id")
    if isinstance(forced, list) and len(forced) == 1:
        values["forced_eos_token_id"] = forced[0]
    several_ends = ["forced_eos_token_id of several"] if isinstance(forced, list) and len(forced) > 1 else []
    settings: dict[str, Any] = {}
    for name, (field, kind) in SETTINGS.items():
        if (value := values.get(name)) is not None and not (field == "forced_eos" and several_ends):
            entries = value if field in SEVERAL and isinstance(value, list) else [value]
            if not all(_has_type(v, kind) for v in entries):
                raise ValueError(f"{path}: {name} is {value!r}, which is not of type {kind.__name__}")
            settings[field] = tuple(entries) if field in SEVERAL else kind(value)
    settings["banned"], longer = _banned(path, values, settings)
    unknown = {k: v for k, v in values.items() if k not in (*SETTINGS, *IGNORED, "bad_words_ids")}
    others = sorted(k for k, v in unknown.items() if v not in (False, [], {}, NEUTRAL.get(k)))
    return Generation(**settings, others=(*others, *longer, *several_ends))


def _banned(path: Path, values: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[tuple[int, ...], list[str]]:
    """Returns the tokens that are never chosen, and what is said of longer bad words. As in transformers a bad word
    that is an end token counts for nothing."""
    words = values.get("bad_words_ids") or []
    if not isinstance(words, list) or not all(isinstance(w, list) and w and all(map(_is_id, w)) for w in words):
        raise ValueError(f"{path}: bad_words_ids is {words!r}, which is not a list of lists of token ids")
    single = [w[0] for w in words if len(w) == 1 and w[0] not in settings.get("eos", ())]
    longer = [f"bad_words_ids of several tokens ({n})"] if (n := sum(len(w) > 1 for w in words)) else []
    return tuple(dict.fromkeys([*settings.get("banned", ()), *single])), longer


def _is_id(value: Any) -> bool:
    return _has_type(value, int) and value >= 0


def _has_type(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def token_ids(g: Generation) -> dict[str, Any]:
    """Returns the token ids that stand in `config.json` too, by their names there."""
    eos = g.eos[0] if len(g.eos) == 1 else list(g.eos) or None
    ids = dict(bos_token_id=g.bos, eos_token_id=eos, pad_token_id=g.pad, decoder_start_token_id=g.start)
    return {name: id for name, id in ids.items() if id is not None}


def known_settings(source: str | Path | None) -> Generation | None:
    """Reads the settings of a Hugging Face directory, or the ids of a run's tokenizer; None without a source."""
    if source is None:
        return None
    if (Path(source) / "config.json").is_file():
        return read_generation(source)
    tokens = tokenizers.load(source)
    return Generation(eos=() if tokens.eos_id is None else (tokens.eos_id,), bos=tokens.bos_id, pad=tokens.pad_id)


def keep_generation(folder: Path, g: Generation, source: Path) -> list[str]:
    """Writes `generation_config.json`: all that the one beside the model `source` says, with the token ids of `g`;
    returns a line on that."""
    path, theirs = folder / "generation_config.json", source / "generation_config.json"
    if not theirs.is_file():
        return write_generation(folder, g, None)
    values = read_json(theirs)
    values |= token_ids(g)  # a run's answers may end in more tokens
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    return [f"{path.name}: carried along"]


def keep_embedding(folder: Path, source: Path) -> list[str]:
    """Copies the files that say how sentence-transformers makes vectors with a model; returns a line on them."""
    if not (source / "modules.json").is_file():
        return []
    names = [name for name in EMBEDDING_FILES if (source / name).is_file()]
    names += sorted(str(path.relative_to(source)) for path in source.glob("[0-9]_*/*.json"))
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return [f"{', '.join(names)}: carried along"]


def set_embedding_width(folder: Path, width: int) -> None:
    """Writes the width of vectors into the files that say how sentence-transformers makes them, if there are any: for a
    model whose width isn't that of the one they came from."""
    for path in sorted(folder.glob("[0-9]_*/config.json")):
        values = json.loads(path.read_text("utf-8"))
        stated = {"word_embedding_dimension", "embedding_dimension"} & values.keys()
        path.write_text(json.dumps(values | dict.fromkeys(stated, width), indent=2) + "\n", "utf-8")


def write_generation(folder: Path, g: Generation, source: str | Path | None) -> list[str]:
    """Writes `generation_config.json`, the source's byte for byte where it has one; returns a line on that."""
    path = folder / "generation_config.json"
    if source is not None and (Path(source) / path.name).is_file():
        shutil.copyfile(Path(source) / path.name, path)
        return [f"{path.name}: carried along"]
    values = {name: getattr(g, field) for name, (field, _) in SETTINGS.items() if field != "eos"} | token_ids(g)
    values["suppress_tokens"], values["stop_strings"] = list(g.banned) or None, list(g.stop) or None
    values["early_stopping"] = {ours: theirs for theirs, ours in EARLY_STOPPING.items()}.get(g.early_stopping or "")
    text = json.dumps({name: value for name, value in values.items() if value is not None}, indent=2)
    path.write_text(text + "\n", "utf-8")
    return [f"{path.name}: written"]


# --------------------------------------------------------------------------------------------------------------- chat


def chat_templates(directory: str | Path) -> dict[str, str]:
    """Reads Jinja texts by name, the usual one as `default`; empty where there is none. Nothing is rendered here."""
    folder = Path(directory)
    templates: dict[str, str] = {}
    for file in ("chat_template.json", "tokenizer_config.json"):  # the former is of processors of older releases
        value = read_json(folder / file).get("chat_template") if (folder / file).is_file() else None
        if isinstance(value, str):
            templates["default"] = value
        elif isinstance(value, list):
            if not all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in value):
                raise ValueError(f"{folder / file}: chat_template is neither a text nor a list of name and template")
            templates |= {str(t["name"]): str(t["template"]) for t in value}
        elif value is not None:
            raise ValueError(f"{folder / file}: chat_template is {type(value).__name__}, not a text or a list")
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    files |= {"default": folder / "chat_template.jinja"} if (folder / "chat_template.jinja").is_file() else {}
    return templates | {name: path.read_text("utf-8") for name, path in files.items()}


# ------------------------------------------------------------------------------------------------------------- writing


def text_files(folder: Path) -> list[str]:
    """Returns the names of a model's files that say how its text is read."""
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return names + [str(path.relative_to(folder)) for path in sorted(folder.glob("additional_chat_templates/*.jinja"))]


def copy_tokenizer(folder: Path, source: str | Path | None, kind: str = "decoder") -> list[str]:
    """Copies the tokenizer for a model of a `kind` into `folder`; returns lines on what was copied.

    `source` is a Hugging Face directory, whose files come byte for byte, or a tokenizer folder of a run.
    """
    if source is None:
        return []
    origin = Path(source)
    if not origin.is_dir():
        raise ValueError(f"{origin}: not a directory with a tokenizer")
    files = text_files(origin)
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(origin / name, folder / name)
    notes = [f"{', '.join(files)}: carried along"] if files else []
    return (
        notes
        if (origin / "config.json").is_file()
        else notes + _write_run_tokenizer(folder, tokenizers.load(origin), kind)
    )


def _write_run_tokenizer(folder: Path, tokens: tokenizers.Tokenizer, kind: str) -> list[str]:
    """Writes what transformers needs to open a run's tokenizer as it is."""
    path = folder / "tokenizer_config.json"
    if isinstance(tokens, tokenizers.HuggingFace):
        # Without a class transformers takes the architecture's own, which may put its own rules over the file's.
        values = {"tokenizer_class": "PreTrainedTokenizerFast"} | (read_json(path) if path.is_file() else {})
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return []
    source, why = tokenizer_json.convert(tokens, kind)
    if source is None:
        return [f"tokenizer.json: not written, it would not be exact ({why}); use tokenizer.model with sentencepiece"]
    (folder / "tokenizer.json").write_text(source, "utf-8")
    text = json.dumps(tokenizer_json.settings(tokens), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")
    return ["tokenizer.json, tokenizer_config.json: made from the run's tokenizer, checked to read text the same"]
