"""Reads and writes SentencePiece models, and tokenizes by them."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxlm.data.tokenizer.interface import (
    Part,
    SpecialIds,
    encode_parts,
    split_special,
    trim_spans,
    write_atomically,
)

SPACE = "\u2581"  # SentencePiece writes a space so; in a user's text it must not become one


class SentencePiece(SpecialIds):
    """A tokenizer that wraps a SentencePiece model, given as its serialised bytes."""

    NAMES: ClassVar[dict[str, tuple[str, ...]]] = {
        "mask": ("<mask>", "[MASK]"),
        "cls": ("<cls>", "[CLS]"),
        "sep": ("<sep>", "[SEP]"),
    }

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"not a SentencePiece model: {str(error).strip() or 'it can not be parsed'}") from error
        self.vocab_size = self._processor.vocab_size()
        if not self.vocab_size:
            raise ValueError("not a SentencePiece model: it holds no pieces")
        declared = {kind: getattr(self._processor, f"{kind}_id")() for kind in ("bos", "eos", "pad", "unk")}
        named = {
            kind: next((i for n in names if (i := self.id_of(n)) is not None), None)
            for kind, names in self.NAMES.items()
        }
        self._assign({kind: id for kind, id in (declared | named).items() if id is not None and id >= 0})
        self._space_bytes = [self.id_of(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        # A model that adds a dummy prefix would add one before each part of a split text, so it can't keep SPACE itself
        # apart from a space.
        self._keeps_space = None not in self._space_bytes and self._processor.encode("a", out_type=str)[0][:1] != SPACE

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePiece, (self.model,)

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        """Returns int32 [vocab]: how many UTF-8 bytes each token stands for, 0 for special tokens."""
        sp = self._processor
        no_text = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(self.vocab_size)]
        sizes = [
            0 if no_text[i] else 1 if sp.is_byte(i) else len(self._text(i).encode()) for i in range(self.vocab_size)
        ]
        return np.array(sizes, np.int32)

    @functools.cached_property
    def starts_word(self) -> np.ndarray:
        """Returns bool [vocab]: a piece that begins with white space begins a word."""
        return np.array(
            [self._text(i)[:1].isspace() or self.piece(i) in ("<0x0A>", "<0x09>") for i in range(self.vocab_size)]
        )

    def _text(self, id: int) -> str:
        return self.piece(id).replace(SPACE, " ")

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """Returns the bytes that each token stands for in the middle of a text; special tokens have their names."""
        sp = self._processor
        return [
            bytes([int(self.piece(i)[1:-1], 16)]) if sp.is_byte(i) else self._text(i).encode()
            for i in range(self.vocab_size)
        ]

    @functools.cached_property
    def _controls(self) -> dict[str, int]:
        return {self.piece(i): i for i in range(self.vocab_size) if self._processor.is_control(i)}

    @property
    def boundary_ids(self) -> tuple[list[int], list[int]]:
        """Returns the ids that stand (before, after) a text on its own."""
        bos = self._processor.bos_id()
        return ([bos] if bos >= 0 else []), []

    def encode_special(self, text: str) -> list[int]:
        """Returns the ids of a text, in which special pieces become special tokens."""
        return self.encode_special_offsets(text)[0]

    def encode_special_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids as `encode_special` does, and the characters (start, end) that each stands for."""
        return split_special(text, self._controls, self.encode_offsets)

    @property
    def special_pieces(self) -> list[str]:
        """Returns the special tokens, as they are spelt."""
        return list(self._controls)

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Returns the ids of a text in parts, of which some may hold special tokens."""
        return encode_parts(parts, self._controls, self.encode)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens."""
        if SPACE in text and self._keeps_space:
            ids: list[int] = []
            for i, part in enumerate(text.split(SPACE)):
                ids += (self._space_bytes if i else []) + self._processor.encode(part)
            return ids
        return self._processor.encode(text)

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of a text, and the characters (start, end) that each stands for."""
        parts = text.split(SPACE) if SPACE in text and self._keeps_space else [text]
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for i, part in enumerate(parts):
            if i:
                ids += self._space_bytes  # type: ignore[arg-type]
                spans += [(at, at + 1)] * len(self._space_bytes)
                at += 1
            encoded = self._processor.encode(part, return_type="offset_mapping")
            ids += encoded["ids"]
            spans += [(at + start, at + end) for start, end in encoded["offsets"]]
            at += len(part)
        for i in reversed(range(len(spans) - 1)):  # the library gives only the last of a character's bytes its span
            if spans[i][0] == spans[i][1] == spans[i + 1][0]:
                spans[i] = spans[i + 1]
        return ids, trim_spans(text, spans)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; special tokens, and ids beyond the vocabulary, are left out."""
        return self._processor.decode([int(id) for id in ids if id < self.vocab_size])

    def piece(self, id: int) -> str:
        """Returns the piece of an id, as the vocabulary spells it."""
        return self._processor.id_to_piece(int(id))

    def id_of(self, piece: str) -> int | None:
        """Returns the id of a piece, or None if the vocabulary lacks it."""
        id = self._processor.piece_to_id(piece)
        return id if self._processor.id_to_piece(id) == piece else None

    def save(self, folder: str | Path) -> Path:
        """Writes `tokenizer.model` into a folder and returns its path."""
        return write_atomically(Path(folder) / "tokenizer.model", self.model)
