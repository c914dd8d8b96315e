"""Text to token ids and back: SentencePiece, Hugging Face `tokenizer.json`, or plain bytes, behind one set of names.

`encode` never adds special tokens and never reads one out of the user's text: "</s>" in a document is four characters.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

KINDS = ("bos", "eos", "pad", "unk", "mask", "cls", "sep")


class SpecialIds:
    """The ids of the seven special tokens, None where the vocabulary lacks one.

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

    def _assign(self, found: Mapping[str, int | None]) -> None:
        def first(*kinds: str) -> int | None:
            return next((id for kind in kinds if (id := found.get(kind)) is not None), None)

        self.bos_id = first("bos", "cls", "eos")
        self.eos_id = first("eos", "sep", "bos", "cls")
        self.pad_id, self.unk_id, self.mask_id = found.get("pad"), found.get("unk"), found.get("mask")
        self.cls_id, self.sep_id = found.get("cls"), found.get("sep")

    def _special(self) -> list[int]:
        return sorted({id for kind in KINDS if (id := getattr(self, f"{kind}_id")) is not None})


class Tokenizer(Protocol):
    """What the three classes below have in common, beside the ids of `SpecialIds`; all can be pickled."""

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
        """int32 [vocab]: UTF-8 bytes each token stands for, special tokens 0.

        Sums to `len(text.encode())` for `Bytes`, byte-level BPE and models of `vocabulary`; a foreign model
        that normalises text (lower case, NFKC, a dummy prefix) can't be exact: count the raw text instead.
        """

    @property
    def starts_word(self) -> np.ndarray:
        """bool [vocab]: whether a token begins a word, for whole-word masking."""

    @property
    def token_bytes(self) -> list[bytes]:
        """What each token stands for in the middle of a text; special tokens: their name."""

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """Ids that stand before and after a text on its own, as the vocabulary's makers have it."""

    def encode(self, text: str) -> list[int]: ...
    def encode_special(self, text: str) -> list[int]:
        """As `encode`, but special tokens that the text spells out become themselves: for chat templates."""

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and the stretch of characters each token stands for, without the white space around it.

        Tokens that share a character all have it; a token of nothing but white space has an empty stretch.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str:
        """The text; special tokens, and ids beyond the vocabulary, are left out."""

    def piece(self, id: int) -> str: ...
    def id_of(self, piece: str) -> int | None: ...
    def save(self, folder: str | Path) -> Path: ...


def write(path: Path, data: bytes) -> Path:
    """Write whole or not at all: several processes may save the same run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(data)
    partial.replace(path)
    return path


def _between(text: str, special: Mapping[str, int], encode: Callable[[str], list[int]]) -> list[int]:
    """Ids of the special pieces where the text spells them, and of what is between them by `encode`."""
    names = sorted(filter(None, special), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return [id for part in parts if part for id in ([special[part]] if part in special else encode(part))]


def _trimmed(text: str, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without white space at either end: tokenizers differ in whether a word's token covers the space before it."""
    out = []
    for start, end in spans:
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        out.append((start, end))
    return out


# --------------------------------------------------------------------------------------------------------------- bytes


class Bytes(SpecialIds):
    """Ids 0..255 are bytes, then seven special tokens and one spare, so that 264 divides evenly over devices."""

    SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<mask>", "<cls>", "<sep>", "<spare>")
    vocab_size = 256 + len(SPECIAL)
    fingerprint = hashlib.sha256(f"bytes {SPECIAL}".encode()).hexdigest()

    def __init__(self) -> None:
        self._assign({k: 256 + i for i, k in enumerate(("pad", "unk", "bos", "eos", "mask", "cls", "sep"))})

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    @functools.cached_property
    def starts_word(self) -> np.ndarray:
        """White space begins a word, as "▁" does elsewhere."""
        return np.isin(np.arange(self.vocab_size), list(b" \t\n\r"))

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        return [bytes([id]) if id < 256 else self.piece(id).encode() for id in range(self.vocab_size)]

    @property
    def around(self) -> tuple[list[int], list[int]]:
        return ([] if self.bos_id is None else [self.bos_id]), []

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        spans = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode("utf-8")]
        return self.encode(text), _trimmed(text, spans)

    def encode_special(self, text: str) -> list[int]:
        return _between(text, {piece: 256 + i for i, piece in enumerate(self.SPECIAL)}, self.encode)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(id) for id in ids if id < 256).decode("utf-8", "replace")

    def piece(self, id: int) -> str:
        return self.SPECIAL[id - 256] if id >= 256 else chr(id) if 32 <= id < 127 else f"<0x{id:02X}>"

    def id_of(self, piece: str) -> int | None:
        return next((id for id in range(self.vocab_size) if self.piece(id) == piece), None)

    def save(self, folder: str | Path) -> Path:
        return write(Path(folder) / "tokenizer.bytes", b"UTF-8 bytes\n")


# ------------------------------------------------------------------------------------------------------- SentencePiece

SPACE = "\u2581"  # SentencePiece writes a space so; in a user's text it must not become one


class SentencePiece(SpecialIds):
    """A SentencePiece model, held as its serialised bytes."""

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
        own = {kind: getattr(self._processor, f"{kind}_id")() for kind in ("bos", "eos", "pad", "unk")}
        named = {
            kind: next((i for n in names if (i := self.id_of(n)) is not None), None)
            for kind, names in self.NAMES.items()
        }
        self._assign({kind: id for kind, id in (own | named).items() if id is not None and id >= 0})
        self._bytes = [self.id_of(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        # A dummy prefix would come back before each stretch; such models can't keep the character apart from a space.
        self._keeps_space = (
            None not in self._bytes and self._processor.encode(SPACE[:0] + "a", out_type=str)[0][:1] != SPACE
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePiece, (self.model,)

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        sp = self._processor
        silent = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(self.vocab_size)]
        sizes = [
            0 if silent[i] else 1 if sp.is_byte(i) else len(self._plain(i).encode()) for i in range(self.vocab_size)
        ]
        return np.array(sizes, np.int32)

    @functools.cached_property
    def starts_word(self) -> np.ndarray:
        """A piece that begins with white space begins a word."""
        return np.array(
            [self._plain(i)[:1].isspace() or self.piece(i) in ("<0x0A>", "<0x09>") for i in range(self.vocab_size)]
        )

    def _plain(self, id: int) -> str:
        return self.piece(id).replace(SPACE, " ")

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        sp = self._processor
        return [
            bytes([int(self.piece(i)[1:-1], 16)]) if sp.is_byte(i) else self._plain(i).encode()
            for i in range(self.vocab_size)
        ]

    @functools.cached_property
    def _controls(self) -> dict[str, int]:
        return {self.piece(i): i for i in range(self.vocab_size) if self._processor.is_control(i)}

    @property
    def around(self) -> tuple[list[int], list[int]]:
        bos = self._processor.bos_id()
        return ([bos] if bos >= 0 else []), []

    def encode_special(self, text: str) -> list[int]:
        return _between(text, self._controls, self.encode)

    def encode(self, text: str) -> list[int]:
        if SPACE in text and self._keeps_space:
            ids: list[int] = []
            for i, stretch in enumerate(text.split(SPACE)):
                ids += (self._bytes if i else []) + self._processor.encode(stretch)
            return ids
        return self._processor.encode(text)

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        apart = SPACE in text and self._keeps_space
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for i, stretch in enumerate(text.split(SPACE) if apart else [text]):
            if i:
                ids += self._bytes  # type: ignore[arg-type]
                spans += [(at, at + 1)] * len(self._bytes)
                at += 1
            found = self._processor.encode(stretch, return_type="offset_mapping")
            ids += found["ids"]
            spans += [(at + start, at + end) for start, end in found["offsets"]]
            at += len(stretch)
        for i in reversed(range(len(spans) - 1)):  # of a character's bytes only the last is given its place
            if spans[i][0] == spans[i][1] == spans[i + 1][0]:
                spans[i] = spans[i + 1]
        return ids, _trimmed(text, spans)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(id) for id in ids if id < self.vocab_size])

    def piece(self, id: int) -> str:
        return self._processor.id_to_piece(int(id))

    def id_of(self, piece: str) -> int | None:
        id = self._processor.piece_to_id(piece)
        return id if self._processor.id_to_piece(id) == piece else None

    def save(self, folder: str | Path) -> Path:
        return write(Path(folder) / "tokenizer.model", self.model)


# -------------------------------------------------------------------------------------------------------- Hugging Face


# GPT-2's alphabet: printable characters of Latin-1 are themselves, the other bytes follow from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_REST = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_REST)}


class HuggingFace(SpecialIds):
    """A `tokenizer.json`; `special` says which piece plays which part, as `tokenizer_config.json` does."""

    NAMES: ClassVar[dict[str, tuple[str, ...]]] = {
        "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|begin▁of▁sentence|>"),
        "eos": ("</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>", "<|end▁of▁sentence|>"),
        "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|▁pad▁|>"),
        "unk": ("<unk>", "[UNK]"),
        "mask": ("<mask>", "[MASK]", "<|mask|>"),
        "cls": ("[CLS]", "<cls>"),
        "sep": ("[SEP]", "<sep>"),
    }

    def __init__(self, source: str, special: dict[str, str] | None = None) -> None:
        import tokenizers

        self.json, self.special = source, dict(special or {})
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a Hugging Face tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Without this, a user who writes "</s>" writes the control token.
        self._tokenizer.encode_special_tokens = True
        self.fingerprint = hashlib.sha256(f"{source}\0{sorted(self.special.items())}".encode()).hexdigest()
        # Ids may have holes, so the count of pieces isn't the size of the table.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        names = {kind: ((self.special[kind],) if kind in self.special else usual) for kind, usual in self.NAMES.items()}
        self._assign(
            {kind: next((i for n in ns if (i := self.id_of(n)) is not None), None) for kind, ns in names.items()}
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFace, (self.json, self.special)

    @functools.cached_property
    def _style(self) -> str:
        """How pieces spell bytes: byte-level alphabet, "▁" for a space, or WordPiece."""
        spec = json.loads(self.json)
        if spec["model"].get("type") == "WordPiece":
            return "wordpiece"
        parts = json.dumps([spec.get(name) for name in ("pre_tokenizer", "decoder")])
        return "bytelevel" if '"ByteLevel"' in parts else "metaspace"

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        added = self._tokenizer.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int32)
        for piece, id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if id in added:
                sizes[id] = 0 if added[id].special else len(piece.encode())
            elif self._style == "bytelevel":
                sizes[id] = len(piece)  # its alphabet writes each byte as one character
            elif self._style == "wordpiece":
                sizes[id] = len(piece.removeprefix("##").encode())
            else:
                byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
                sizes[id] = 1 if byte else len(piece.replace(SPACE, " ").encode())
        sizes[self._special()] = 0
        return sizes

    @functools.cached_property
    def starts_word(self) -> np.ndarray:
        starts = np.zeros(self.vocab_size, bool)
        first = {"bytelevel": ("\u0120", "\u010a", "\u0109"), "metaspace": (SPACE, "\n", "\t", "<0x0A>", "<0x09>")}
        for piece, id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            starts[id] = (
                not piece.startswith("##") if self._style == "wordpiece" else piece.startswith(first[self._style])
            )
        starts[self._special()] = False
        return starts

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        added, out = self._tokenizer.get_added_tokens_decoder(), [b""] * self.vocab_size
        for piece, id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if id in added:
                out[id] = piece.encode()
            elif self._style == "bytelevel":
                out[id] = bytes(BYTE_OF[c] for c in piece) if all(c in BYTE_OF for c in piece) else piece.encode()
            elif self._style == "wordpiece":
                out[id] = piece[2:].encode() if piece.startswith("##") else f" {piece}".encode()
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                out[id] = bytes([int(piece[1:-1], 16)])
            else:
                out[id] = piece.replace(SPACE, " ").encode()
        return out

    @functools.cached_property
    def around(self) -> tuple[list[int], list[int]]:
        ids, whole = self.encode("a"), self._tokenizer.encode("a").ids
        at = next(i for i in range(len(whole)) if whole[i : i + len(ids)] == ids)
        return whole[:at], whole[at + len(ids) :]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return found.ids, _trimmed(text, found.offsets)

    @functools.cached_property
    def _reads_special(self) -> Any:
        import tokenizers

        made = tokenizers.Tokenizer.from_str(self.json)
        made.no_padding()
        made.no_truncation()
        return made

    def encode_special(self, text: str) -> list[int]:
        return self._reads_special.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)

    def piece(self, id: int) -> str:
        piece = self._tokenizer.id_to_token(int(id))
        return f"<unused {id}>" if piece is None else piece

    def id_of(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)

    def save(self, folder: str | Path) -> Path:
        config = {f"{kind}_token": piece for kind, piece in sorted(self.special.items())}
        write(Path(folder) / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False).encode())
        return write(Path(folder) / "tokenizer.json", self.json.encode())


def _special_names(folder: Path) -> dict[str, str]:
    """Which piece is bos, eos …, as the files beside a tokenizer.json say."""
    names: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if file.is_file():
            found = json.loads(file.read_text("utf-8"))
            for kind in KINDS:
                entry = found.get(f"{kind}_token")
                piece = entry.get("content") if isinstance(entry, dict) else entry
                if isinstance(piece, str):
                    names[kind] = piece
    return names


def post_processor(before: Mapping[str, int | None], after: Mapping[str, int | None]) -> dict[str, Any]:
    """Of a tokenizer.json: special pieces (and their ids) before and after a text; between and after two of them."""

    def special(pieces: Iterable[str]) -> list[dict]:
        return [{"SpecialToken": {"id": piece, "type_id": 0}} for piece in pieces]

    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    single = [*special(before), a, *special(after)]
    ids = {piece: {"id": piece, "ids": [id], "tokens": [piece]} for piece, id in {**before, **after}.items()}
    pair = [*single, b, *special(after)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": ids}


def _with_told_bos(path: Path) -> str:
    """A tokenizer.json, with the begin-of-text token that `tokenizer_config.json` asks for and the file itself lacks.

    transformers' Llama and Gemma tokenizers put it before a text whatever the file says; DeepSeek relies on that.
    """
    source, beside = path.read_text("utf-8"), path.parent / "tokenizer_config.json"
    told = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
    if not told.get("add_bos_token") or not str(told.get("tokenizer_class")).startswith(("Llama", "Gemma")):
        return source
    names = _special_names(path.parent)
    found = HuggingFace(source, names)
    if "bos" not in names or found.around[0]:
        return source
    values, piece = json.loads(source), names["bos"]
    made = post_processor({piece: found.id_of(piece)}, {})
    before = values.get("post_processor")
    values["post_processor"] = {"type": "Sequence", "processors": [before, made]} if before else made
    return json.dumps(values, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------------------- opening


def load(spec: str | Path) -> Tokenizer:
    """`bytes`, `x.model`, `x/tokenizer.json`, or a folder that holds one of these or was written by `save`."""
    path = Path(spec).expanduser()
    if str(spec) == "bytes":
        return Bytes()
    if path.is_dir():
        held = [
            path / "tokenizer.json",
            path / "tokenizer.model",
            path / "tokenizer.bytes",
            *sorted(path.glob("*.model")),
        ]
        path = next((file for file in held if file.is_file()), path)
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
            return SentencePiece(path.read_bytes())
        if path.suffix == ".json":
            return HuggingFace(_with_told_bos(path), _special_names(path.parent))
    except (ValueError, OSError) as error:
        raise ValueError(f"tokenizer {path}: {error}") from error
    raise ValueError(f"tokenizer {path} is of an unknown kind: give 'bytes', a .model file or a tokenizer.json")
