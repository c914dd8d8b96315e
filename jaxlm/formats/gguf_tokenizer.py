"""GGUF metadata hold tokenizers: byte-level BPE (`gpt2`) and SentencePiece (`llama`: BPE, `t5`: unigram)."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlm.core.errors import misspelt
from jaxlm.data.tokenizer import HuggingFace, SentencePiece, Tokenizer
from jaxlm.formats.gguf_metadata import Metadata

# Kinds of tokens, in GGUF as in SentencePiece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
    "sep": "seperator_token_id",  # spelled so in the format
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}

# Tokens that end an answer besides eos: stated, or known to llama.cpp by their names.
ENDS = ("eot_token_id", "eom_token_id")
END_NAMES = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<|eot|>",
    "[EOT]",
    "< EOT >",
    "_< EOT >",
)
# Spaces, digits, scripts, compositions and code: what tokenizers that are made alike read differently.
HARD_TEXTS = (
    "Hello world",
    " two  spaces   and more",
    "don't can't I'LL",
    "3.14159 12345678",
    "naïve Zürich 世界 🎉🏽",
    "\n\n\tdef f(x):\n        return x**2\r\n",
    "ﬁ ½ e\u0301 \u00a0 \u200b",
    "привет мир",
    "مرحبا",
    "a",
    " ",
    "ALLCAPS camelCase snake_case",
    "!!!??? ...",
    "http://x.org/?a=b&c",
)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

# How text is cut into words before merges, by the names of `tokenizer.ggml.pre`; one expression after another.
WORDS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),  # each digit on its own
    "llama-bpe": (_CASED % r"\p{N}{1,3}",),
    "dbrx": (_CASED % r"\p{N}{1,3}",),
    "qwen2": (_CASED % r"\p{N}",),
    "deepseek-r1-qwen": (_CASED % r"\p{N}",),
    "tekken": (_WORDS % ("", "") + r"\p{N}" + _REST,),
    "gpt-4o": (_WORDS % (_ENDING, _ENDING) + r"\p{N}{1,3}" + _REST,),
}
# Other names of the same ways to cut.
ALIASES = {
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "jina-es", "jina-de", "roberta-bpe", "granite-docling"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("smaug-bpe",), "dbrx"),
    **dict.fromkeys(("stablelm2", "megrez", "hunyuan"), "deepseek-r1-qwen"),
}
ADDS_BOS = {"llama-bpe", "tekken"}  # where the file doesn't say
WHOLE_WORDS = {"llama-bpe", "tekken"}  # a word of the vocabulary is taken without merging
NFC = {"qwen2"}  # published with Unicode normal form C, which the file doesn't state


def read(fields: Mapping[str, Any]) -> Tokenizer:
    """Reads the tokenizer that the metadata (`tokenizer.ggml.*`) describe.

    Raises a ValueError that names the key where one is missing, damaged or not known.
    """
    fields = Metadata(fields)
    kind = str(fields.get("tokenizer.ggml.model"))
    readers: dict[str, Callable[..., Tokenizer]] = {"gpt2": _read_bytes, "llama": _read_pieces, "t5": _read_pieces}
    if kind not in readers:
        raise ValueError(f"tokenizer.ggml.model is {kind!r}, not one of {', '.join(readers)}")
    tokens = fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError("tokenizer.ggml.tokens is missing or empty")
    for name in ("scores", "token_type"):
        entries = fields.get(f"tokenizer.ggml.{name}")
        if entries is not None and len(entries) != len(tokens):
            raise ValueError(f"tokenizer.ggml.{name} has {len(entries)} entries for {len(tokens)} tokens")
    return readers[kind](fields, tokens)


def end_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the tokens that end an answer besides eos; raises a ValueError where one is no token."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type")
    ids = []
    for name in ENDS:
        if (id := fields.get(f"tokenizer.ggml.{name}")) is not None:
            if not isinstance(id, int) or not 0 <= id < len(tokens):
                raise ValueError(f"tokenizer.ggml.{name} is {id!r}, but there are {len(tokens)} tokens")
            ids.append(id)
    ids += [i for i, piece in enumerate(tokens) if piece in END_NAMES and (types is None or types[i] == CONTROL)]
    return tuple(sorted({*ids} - {fields.get("tokenizer.ggml.eos_token_id")}))


def different_text(a: Tokenizer, b: Tokenizer) -> str | None:
    """Returns the first of some hard texts that two tokenizers read differently; None: there is none."""
    return next((text for text in HARD_TEXTS if a.encode(text) != b.encode(text)), None)


def lost_settings(tokenizer: Tokenizer) -> list[str]:
    """Returns what a file can't say of added tokens, as people read it: that they take spaces, stand for words, or are
    found in normalised text."""
    values = json.loads(tokenizer.json) if isinstance(tokenizer, HuggingFace) else {}
    flags = ["lstrip", "rstrip", "single_word", *(["normalized"] if values.get("normalizer") else [])]
    kept = [(t["content"], [f for f in flags if t.get(f)]) for t in values.get("added_tokens") or []]
    return [f"{piece} ({', '.join(names)})" for piece, names in kept if names]


def adds_bos(fields: Mapping[str, Any]) -> bool:
    """Says whether texts begin with the bos token."""
    stated = fields.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    return fields["tokenizer.ggml.model"] == "llama" or _cutting(fields) in ADDS_BOS


def _cutting(fields: Mapping[str, Any]) -> str | None:
    name = fields.get("tokenizer.ggml.pre")
    return ALIASES.get(name, name) if isinstance(name, str) else None


def special_pieces(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    """Returns the special pieces by what they are for: `bos`, `eos`, …"""
    out = {}
    for kind, name in SPECIAL.items():
        id = fields.get(f"tokenizer.ggml.{name}")
        if id is None:
            continue
        if not 0 <= id < len(tokens):
            raise ValueError(f"tokenizer.ggml.{name} is {id}, but there are {len(tokens)} tokens")
        out[kind] = tokens[id]
    return out


# ------------------------------------------------------------------------------------------------------ byte-level BPE


def _read_bytes(fields: Mapping[str, Any], tokens: list[str]) -> HuggingFace:
    pre = _cutting(fields)
    if pre not in WORDS:
        named = fields.get("tokenizer.ggml.pre")
        known = [*WORDS, *ALIASES]
        hint = misspelt(str(named), known)
        raise ValueError(f"tokenizer.ggml.pre is {named!r}{hint}; known are {', '.join(known)}")
    special = special_pieces(fields, tokens)
    types = fields.get("tokenizer.ggml.token_type") or [
        CONTROL if piece in special.values() else NORMAL for piece in tokens
    ]
    added = [
        dict(id=i, content=piece, single_word=False, lstrip=False, rstrip=False, normalized=False, special=t == CONTROL)
        for i, (piece, t) in enumerate(zip(tokens, types, strict=True))
        if t in (CONTROL, USER_DEFINED)
    ]
    merges = [merge.split(" ") for merge in fields.get("tokenizer.ggml.merges") or []]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError("tokenizer.ggml.merges has an entry that is not two pieces with a space between")
    bos = special.get("bos") if adds_bos(fields) else None
    source = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=added,
        normalizer={"type": "NFC"} if pre in NFC else None,
        pre_tokenizer=_pre_tokenizer(WORDS[pre]),
        post_processor=_post_processor(bos, tokens.index(bos)) if bos is not None else None,
        decoder=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False),
        model=dict(
            type="BPE",
            dropout=None,
            unk_token=None,
            continuing_subword_prefix=None,
            end_of_word_suffix=None,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=pre in WHOLE_WORDS,
            vocab={piece: i for i, piece in enumerate(tokens)},
            merges=merges,
        ),
    )
    return HuggingFace(json.dumps(source, ensure_ascii=False), special)


def _pre_tokenizer(patterns: tuple[str, ...]) -> dict[str, Any]:
    """Returns the `pre_tokenizer` of a tokenizer.json."""
    cuts = [dict(type="Split", pattern={"Regex": p}, behavior="Isolated", invert=False) for p in patterns]
    letters = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    return dict(type="Sequence", pretokenizers=[*cuts, letters])


def _post_processor(bos: str, id: int) -> dict[str, Any]:
    """Returns the `post_processor` that puts bos before a text: unused here, but expected by other readers."""
    first, a, b = {"SpecialToken": dict(id=bos, type_id=0)}, *({"Sequence": dict(id=s, type_id=0)} for s in "AB")
    tokens = {bos: dict(id=bos, ids=[id], tokens=[bos])}
    return dict(type="TemplateProcessing", single=[first, a], pair=[first, a, first, b], special_tokens=tokens)


def _patterns(pre: Any) -> tuple[str, ...] | None:
    """Returns the expressions of a `pre_tokenizer`, or None where it does anything else."""
    out: list[str] = []
    for part in pre["pretokenizers"] if (pre or {}).get("type") == "Sequence" else [pre]:
        match part:
            case {"type": "ByteLevel", "add_prefix_space": False, **rest}:
                out += [GPT2] if rest.get("use_regex", True) else []
            case {"type": "Digits", "individual_digits": True}:
                out.append(r"\p{N}")
            case {
                "type": "Split",
                "pattern": {"Regex": p},
                "behavior": "Isolated" | "Removed" as behavior,
                "invert": invert,
            }:
                # The same is written in two ways: what matches is a word, or what doesn't match is thrown away.
                if (behavior == "Removed") != invert:
                    return None
                out.append(p)
            case _:
                return None
    return tuple(out)


def _write_bytes(tokenizer: HuggingFace) -> dict[str, Any]:
    source = json.loads(tokenizer.json)
    model, patterns = source["model"], _patterns(source.get("pre_tokenizer"))
    if model.get("type") != "BPE" or model.get("byte_fallback") or patterns is None:
        raise ValueError(
            f"gguf: a tokenizer.json with a {model.get('type')} model that isn't byte-level has no GGUF form here; "
            "byte-level BPE and SentencePiece .model files have"
        )
    settings = (bool(model.get("ignore_merges")), (source.get("normalizer") or {}).get("type"))
    names = [
        name
        for name, known in WORDS.items()
        if known == patterns and settings == (name in WHOLE_WORDS, "NFC" if name in NFC else None)
    ]
    if not names:
        known_names = ", ".join(WORDS)
        raise ValueError(f"gguf: the tokenizer cuts words by {patterns}, which is none of llama.cpp's {known_names}")
    added = {t["id"]: t for t in source.get("added_tokens", [])}
    pieces = {id: piece for piece, id in model["vocab"].items()} | {id: t["content"] for id, t in added.items()}
    tokens, types = [], []
    for id in range(tokenizer.vocab_size):
        tokens.append(pieces.get(id, f"[PAD{id}]"))
        kind = UNUSED if id not in pieces else NORMAL
        types.append((CONTROL if added[id]["special"] else USER_DEFINED) if id in added else kind)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {"model": "gpt2", "pre": names[0], "tokens": tokens, "token_type": types, "merges": merges}


# ------------------------------------------------------------------------------------------------------- SentencePiece


def _proto() -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]


def _read_pieces(fields: Mapping[str, Any], tokens: list[str]) -> SentencePiece:
    scores = fields.get("tokenizer.ggml.scores")
    if scores is None:
        raise ValueError("tokenizer.ggml.scores is missing, which SentencePiece needs")
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    proto = _proto()
    for piece, score, kind in zip(tokens, scores, types, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = 2 if fields["tokenizer.ggml.model"] == "llama" else 1
    trainer.vocab_size, trainer.byte_fallback = len(tokens), BYTE in types
    for kind in ("bos", "eos", "unk", "pad"):
        setattr(trainer, f"{kind}_id", -1)
    for kind, piece in special_pieces(fields, tokens).items():
        if kind in ("bos", "eos", "unk", "pad"):
            setattr(trainer, f"{kind}_piece", piece)
            setattr(trainer, f"{kind}_id", fields[f"tokenizer.ggml.{SPECIAL[kind]}"])
    normalizer.add_dummy_prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    normalizer.remove_extra_whitespaces = bool(fields.get("tokenizer.ggml.remove_extra_whitespaces", False))
    normalizer.escape_whitespaces = True
    normalizer.precompiled_charsmap = bytes(fields.get("tokenizer.ggml.precompiled_charsmap") or b"")
    normalizer.name = "identity" if not normalizer.precompiled_charsmap else "user_defined"
    return SentencePiece(proto.SerializeToString())


def _write_pieces(tokenizer: SentencePiece) -> dict[str, Any]:
    proto = _proto()
    proto.ParseFromString(tokenizer.model)
    kinds, normalizer = {1: "t5", 2: "llama"}, proto.normalizer_spec
    if proto.trainer_spec.model_type not in kinds:
        raise ValueError("gguf: only BPE and unigram models of SentencePiece have a GGUF form")
    out: dict[str, Any] = {
        "model": kinds[proto.trainer_spec.model_type],
        "pre": "default",
        "tokens": [p.piece for p in proto.pieces],
        "scores": [p.score for p in proto.pieces],
        "token_type": [p.type for p in proto.pieces],
        "add_space_prefix": normalizer.add_dummy_prefix,
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
    }
    if normalizer.precompiled_charsmap:
        if out["model"] == "llama":
            raise ValueError(f"gguf: llama.cpp does not normalise text as this tokenizer does ({normalizer.name})")
        out["precompiled_charsmap"] = normalizer.precompiled_charsmap
    return out


def write(tokenizer: Tokenizer, rows: int, add_bos: bool, ends: Sequence[int] = ()) -> dict[str, Any]:
    """Returns the fields after `tokenizer.ggml.`, for a model whose embedding has `rows` rows. `ends` are the tokens
    that end an answer.

    Raises a ValueError where the tokenizer has no GGUF form, or more tokens than the embedding has rows, or where more
    tokens end an answer than a file can say.
    """
    if isinstance(tokenizer, HuggingFace):
        out = _write_bytes(tokenizer)
    elif isinstance(tokenizer, SentencePiece):
        out = _write_pieces(tokenizer)
    else:
        raise ValueError(f"gguf: a tokenizer of kind {type(tokenizer).__name__} has no GGUF form")
    missing = rows - len(out["tokens"])
    if missing < 0:
        raise ValueError(f"gguf: the tokenizer has {len(out['tokens'])} tokens, the model's embedding {rows} rows")
    out["tokens"] += [f"[PAD{rows - missing + i}]" for i in range(missing)]
    out["token_type"] += [UNUSED] * missing
    if "scores" in out:
        out["scores"] += [-1000.0] * missing
    for kind, name in SPECIAL.items():
        if (id := getattr(tokenizer, f"{kind}_id")) is not None:
            out[name] = id
    others = [id for id in ends if id != out.get("eos_token_id")]
    unnamed = [id for id in others if out["tokens"][id] not in END_NAMES or out["token_type"][id] != CONTROL]
    if len(unnamed) > len(ENDS):
        raise ValueError(f"gguf: tokens {unnamed} all end an answer, and a file names {len(ENDS)} besides eos")
    stated = dict(zip(ENDS, [*unnamed, *(id for id in others if id not in unnamed)], strict=False))
    return out | stated | {"add_bos_token": add_bos}
