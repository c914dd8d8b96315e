"""Tokenizers of several kinds share one interface: SentencePiece, Hugging Face's `tokenizer.json`, or plain bytes.

`encode` never adds special tokens and never reads one out of the user's text: "</s>" in a document is four characters.
"""

from pathlib import Path

from jaxlm.data.tokenizer.continuation import (
    UNFINISHED,
    carries_space,
    context,
    decode_after,
    encode_after,
)
from jaxlm.data.tokenizer.hugging_face import HuggingFace, configured_tokens, post_processor, read_tokenizer_json
from jaxlm.data.tokenizer.interface import KINDS, Part, SpecialIds, SpelledSpecial, Tokenizer, write_atomically
from jaxlm.data.tokenizer.raw_bytes import Bytes
from jaxlm.data.tokenizer.sentence_piece import SPACE, SentencePiece

__all__ = [
    "KINDS",
    "SPACE",
    "UNFINISHED",
    "Bytes",
    "HuggingFace",
    "Part",
    "SentencePiece",
    "SpecialIds",
    "SpelledSpecial",
    "Tokenizer",
    "carries_space",
    "context",
    "decode_after",
    "encode_after",
    "load",
    "post_processor",
    "write_atomically",
]


def load(spec: str | Path) -> Tokenizer:
    """Reads a tokenizer: `bytes`, `x.model`, `x/tokenizer.json`, or a folder that holds one of these or `save` wrote.

    Raises ValueError, which names the path and the remedy, if there is none or it is damaged.
    """
    path = Path(spec).expanduser()
    if str(spec) == "bytes":
        return Bytes()
    if path.is_dir():
        candidates = [
            path / "tokenizer.json",
            path / "tokenizer.model",
            path / "tokenizer.bytes",
            *sorted(path.glob("*.model")),
        ]
        path = next((file for file in candidates if file.is_file()), path)
        if path.is_dir():
            raise ValueError(f"tokenizer {spec}: the folder holds neither tokenizer.json nor a .model file")
    if not path.is_file():
        remedy = (
            "give 'bytes', a .model file, a tokenizer.json or a folder with one, or make one: jaxlm tokenizer train"
        )
        raise ValueError(f"tokenizer {str(spec)!r} does not exist: {remedy}")
    if path.name == "tokenizer.bytes":
        return Bytes()
    try:
        if path.suffix == ".model":
            return _sentence_piece(path)
        if path.suffix == ".json":
            return read_tokenizer_json(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"tokenizer {path}: {error}") from error
    raise ValueError(f"tokenizer {path} is of an unknown kind: give 'bytes', a .model file or a tokenizer.json")


def _sentence_piece(path: Path) -> SentencePiece:
    """Reads a .model file. ValueError: the files beside it add tokens, or say of some what a .model can't hold."""
    tokenizer = SentencePiece(path.read_bytes())
    for id, entry in configured_tokens(path.parent / "tokenizer_config.json").items():
        if id >= tokenizer.vocab_size or tokenizer.piece(id) != entry["content"]:
            what = f"adds the token {entry['content']}"
        elif taken := [flag for flag in ("lstrip", "rstrip", "single_word") if entry[flag]]:
            what = f"sets {', '.join(taken)} of {entry['content']}"
        else:
            continue
        raise ValueError(
            f"tokenizer_config.json {what}, which only a tokenizer.json can hold; make one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return tokenizer
