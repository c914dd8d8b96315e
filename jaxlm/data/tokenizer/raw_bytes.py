"""Tokenizes text as its UTF-8 bytes, which needs no vocabulary."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxlm.data.tokenizer.interface import (
    Part,
    SpecialIds,
    encode_parts,
    split_special,
    trim_spans,
    write_atomically,
)


class Bytes(SpecialIds):
    """A tokenizer whose ids 0 to 255 are bytes; seven special tokens and a spare one follow.

    The spare one makes the size 264, which divides evenly over devices.
    """

    SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<mask>", "<cls>", "<sep>", "<spare>")
    vocab_size = 256 + len(SPECIAL)
    fingerprint = hashlib.sha256(f"bytes {SPECIAL}".encode()).hexdigest()

    def __init__(self) -> None:
        self._assign({k: 256 + i for i, k in enumerate(("pad", "unk", "bos", "eos", "mask", "cls", "sep"))})

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        """Returns int32 [vocab]: how many UTF-8 bytes each token stands for, 0 for special tokens."""
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    @functools.cached_property
    def starts_word(self) -> np.ndarray:
        """Returns bool [vocab]: white space begins a word, as "▁" does in SentencePiece."""
        return np.isin(np.arange(self.vocab_size), list(b" \t\n\r"))

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """Returns the bytes that each token stands for in the middle of a text; special tokens have their names."""
        return [bytes([id]) if id < 256 else self.piece(id).encode() for id in range(self.vocab_size)]

    @property
    def boundary_ids(self) -> tuple[list[int], list[int]]:
        """Returns the ids that stand (before, after) a text on its own."""
        return ([] if self.bos_id is None else [self.bos_id]), []

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens."""
        return list(text.encode("utf-8"))

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of a text, and the characters (start, end) that each stands for."""
        spans = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode("utf-8")]
        return self.encode(text), trim_spans(text, spans)

    def encode_special(self, text: str) -> list[int]:
        """Returns the ids of a text, in which special pieces become special tokens."""
        return self.encode_special_offsets(text)[0]

    def encode_special_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids as `encode_special` does, and the characters (start, end) that each stands for."""
        return split_special(text, self._special, self.encode_offsets)

    @property
    def special_pieces(self) -> list[str]:
        """Returns the special tokens, as they are spelt."""
        return list(self.SPECIAL)

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Returns the ids of a text in parts, of which some may hold special tokens."""
        return encode_parts(parts, self._special, self.encode)

    @property
    def _special(self) -> dict[str, int]:
        return {piece: 256 + i for i, piece in enumerate(self.SPECIAL)}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; special tokens, and ids beyond the vocabulary, are left out."""
        return bytes(int(id) for id in ids if id < 256).decode("utf-8", "replace")

    def piece(self, id: int) -> str:
        """Returns the piece of an id, as the vocabulary spells it."""
        return self.SPECIAL[id - 256] if id >= 256 else chr(id) if 32 <= id < 127 else f"<0x{id:02X}>"

    def id_of(self, piece: str) -> int | None:
        """Returns the id of a piece, or None if the vocabulary lacks it."""
        return next((id for id in range(self.vocab_size) if self.piece(id) == piece), None)

    def save(self, folder: str | Path) -> Path:
        """Writes `tokenizer.bytes`, which marks this tokenizer, into a folder and returns its path."""
        return write_atomically(Path(folder) / "tokenizer.bytes", b"UTF-8 bytes\n")
