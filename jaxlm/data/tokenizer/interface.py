"""A tokenizer turns text into token ids and back; what all kinds of tokenizers have in common is here."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

KINDS = ("bos", "eos", "pad", "unk", "mask", "cls", "sep")


class Part(NamedTuple):
    """A part of a text says whether special tokens that it spells out become themselves."""

    text: str
    special: bool


class SpecialIds:
    """Every tokenizer has the ids of the seven special tokens, None for those that its vocabulary lacks.

    But `bos_id` falls back to cls, then eos, and `eos_id` to sep, then bos, then cls: every vocabulary with any
    boundary token can mark where documents begin and end.
    """

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    mask_id: int | None
    cls_id: int | None
    sep_id: int | None

    def _assign(self, ids: Mapping[str, int | None]) -> None:
        def first(*kinds: str) -> int | None:
            return next((id for kind in kinds if (id := ids.get(kind)) is not None), None)

        self.bos_id = first("bos", "cls", "eos")
        self.eos_id = first("eos", "sep", "bos", "cls")
        self.pad_id, self.unk_id, self.mask_id = ids.get("pad"), ids.get("unk"), ids.get("mask")
        self.cls_id, self.sep_id = ids.get("cls"), ids.get("sep")

    def _special_ids(self) -> list[int]:
        return sorted({id for kind in KINDS if (id := getattr(self, f"{kind}_id")) is not None})


class Tokenizer(Protocol):
    """A tokenizer maps text to ids and back; it has the ids of `SpecialIds` too, and can be pickled."""

    fingerprint: str  # sha256 of what defines the mapping
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    mask_id: int | None
    cls_id: int | None
    sep_id: int | None

    @property
    def bytes_per_token(self) -> np.ndarray:
        """Returns int32 [vocab]: how many UTF-8 bytes each token stands for, 0 for special tokens.

        They sum to `len(text.encode())` for `Bytes`, byte-level BPE and models of `train_tokenizer`; a foreign model
        that normalises text (lower case, NFKC, a dummy prefix) can't be exact: count the raw text instead.
        """

    @property
    def starts_word(self) -> np.ndarray:
        """Returns bool [vocab]: whether a token begins a word, for whole-word masking."""

    @property
    def token_bytes(self) -> list[bytes]:
        """Returns the bytes that each token stands for in the middle of a text; special tokens have their names."""

    @property
    def boundary_ids(self) -> tuple[list[int], list[int]]:
        """Returns the ids that the vocabulary's makers put (before, after) a text on its own."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens."""

    def encode_special(self, text: str) -> list[int]:
        """Encodes a text in which special tokens that are spelt out become themselves: for chat templates."""

    def encode_special_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids as `encode_special` does, and the characters (start, end) that each stands for."""

    @property
    def special_pieces(self) -> list[str]:
        """Returns the special tokens, as they are spelt, that `encode_special` reads out of a text."""

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Encodes the text that parts make together, as `encode_special` does, but for special tokens that aren't
        wholly in a part that says so: these stay text."""

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of a text, and the characters (start, end) that each stands for.

        White space at the ends of a token's characters is left out. Tokens that share a character all have it; a token
        of nothing but white space has an empty span.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; special tokens, and ids beyond the vocabulary, are left out."""

    def piece(self, id: int) -> str:
        """Returns the piece of an id, as the vocabulary spells it."""

    def id_of(self, piece: str) -> int | None:
        """Returns the id of a piece, or None if the vocabulary lacks it."""

    def save(self, folder: str | Path) -> Path:
        """Writes the tokenizer into a folder, from which `load` reads it; returns the path of its main file."""


class SpelledSpecial:
    """A tokenizer that differs from another one in this alone: special tokens that a text spells are read as such."""

    def __init__(self, tokens: Tokenizer) -> None:
        self._tokens = tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokens, name)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, in which special pieces become special tokens."""
        return self._tokens.encode_special(text)


def write_atomically(path: Path, data: bytes) -> Path:
    """Writes a file whole or not at all, for several processes may save the same run. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(data)
    partial.replace(path)
    return path


Offsets = tuple[list[int], list[tuple[int, int]]]


def split_special(text: str, special: Mapping[str, int], encode: Callable[[str], Offsets]) -> Offsets:
    """Returns the ids of a text and their characters.

    Pieces in `special` that it spells out have their ids there, and `encode` gives the rest with offsets.
    """
    names = sorted(filter(None, special), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    at = 0
    for part in filter(None, parts):
        new, places = ([special[part]], [(0, len(part))]) if part in special else encode(part)
        ids += new
        spans += [(at + a, at + z) for a, z in places]
        at += len(part)
    return ids, spans


def encode_parts(parts: Sequence[Part], special: Mapping[str, int], encode: Callable[[str], list[int]]) -> list[int]:
    """Returns the ids of the text that parts make together. Pieces in `special` that lie in a special part have their
    ids there, and `encode` gives the rest."""
    names = sorted(filter(None, special), key=len, reverse=True)
    spelled = re.compile("|".join(map(re.escape, names)) if names else r"(?!)")
    ids: list[int] = []
    plain = ""
    for text, is_special in parts:
        at = 0
        for found in spelled.finditer(text) if is_special else ():
            plain += text[at : found.start()]
            ids += [*(encode(plain) if plain else []), special[found[0]]]
            plain, at = "", found.end()
        plain += text[at:]
    return ids + (encode(plain) if plain else [])


def trim_spans(text: str, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns spans of characters without white space at either end.

    Tokenizers differ in whether a word's token covers the space before it.
    """
    out = []
    for start, end in spans:
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        out.append((start, end))
    return out
