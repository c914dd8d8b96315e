"""Reads and writes Hugging Face's `tokenizer.json`, and tokenizes as it says."""

import functools
import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxlm.data.tokenizer.interface import KINDS, Part, SpecialIds, trim_spans, write_atomically
from jaxlm.data.tokenizer.sentence_piece import SPACE

# GPT-2's alphabet of bytes: printable characters of Latin-1 are themselves, the other bytes follow from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_NOT_PRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_NOT_PRINTABLE)}


class HuggingFace(SpecialIds):
    """A tokenizer that wraps a `tokenizer.json`, given as its text.

    `special` maps bos, eos, pad, unk, mask, cls and sep to pieces, as `tokenizer_config.json` does. What it leaves out
    is looked for under the names in `NAMES`.
    """

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
        """Returns how pieces spell bytes: bytelevel (GPT-2's alphabet), metaspace ("▁" is a space) or wordpiece."""
        spec = json.loads(self.json)
        if spec["model"].get("type") == "WordPiece":
            return "wordpiece"
        parts = json.dumps([spec.get(name) for name in ("pre_tokenizer", "decoder")])
        return "bytelevel" if '"ByteLevel"' in parts else "metaspace"

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        """Returns int32 [vocab]: how many UTF-8 bytes each token stands for, 0 for special tokens."""
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
        sizes[self._special_ids()] = 0
        return sizes

    @functools.cached_property
    def starts_word(self) -> np.ndarray:
        """Returns bool [vocab]: whether a token begins a word."""
        starts = np.zeros(self.vocab_size, bool)
        first = {"bytelevel": ("\u0120", "\u010a", "\u0109"), "metaspace": (SPACE, "\n", "\t", "<0x0A>", "<0x09>")}
        for piece, id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            starts[id] = (
                not piece.startswith("##") if self._style == "wordpiece" else piece.startswith(first[self._style])
            )
        starts[self._special_ids()] = False
        return starts

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """Returns the bytes that each token stands for in the middle of a text; special tokens have their names."""
        added, out = self._tokenizer.get_added_tokens_decoder(), [b""] * self.vocab_size
        for piece, id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if id in added:
                out[id] = piece.encode()
            elif self._style == "bytelevel":
                out[id] = bytes(_BYTE_OF[c] for c in piece) if all(c in _BYTE_OF for c in piece) else piece.encode()
            elif self._style == "wordpiece":
                out[id] = piece[2:].encode() if piece.startswith("##") else f" {piece}".encode()
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                out[id] = bytes([int(piece[1:-1], 16)])
            else:
                out[id] = piece.replace(SPACE, " ").encode()
        return out

    @functools.cached_property
    def boundary_ids(self) -> tuple[list[int], list[int]]:
        """Returns the ids that stand (before, after) a text on its own."""
        # Any text will do, but one that a vocabulary leaves out altogether would be nowhere between them.
        pieces = (self.decode([id]) for id in range(self.vocab_size))
        ids, whole = next(
            (ids, self._tokenizer.encode(text).ids) for text in ["a", *pieces] if (ids := self.encode(text))
        )
        at = next(i for i in range(len(whole)) if whole[i : i + len(ids)] == ids)
        return whole[:at], whole[at + len(ids) :]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of a text, and the characters (start, end) that each stands for."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return encoded.ids, trim_spans(text, encoded.offsets)

    @functools.cached_property
    def _special_tokenizer(self) -> Any:
        import tokenizers

        # Unlike `_tokenizer` it reads special tokens out of the text.
        result = tokenizers.Tokenizer.from_str(self.json)
        result.no_padding()
        result.no_truncation()
        return result

    def encode_special(self, text: str) -> list[int]:
        """Returns the ids of a text, in which special pieces become special tokens."""
        return self._special_tokenizer.encode(text, add_special_tokens=False).ids

    def encode_special_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids as `encode_special` does, and the characters (start, end) that each stands for."""
        encoded = self._special_tokenizer.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    @functools.cached_property
    def special_pieces(self) -> list[str]:
        """Returns the special tokens, as they are spelt."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]

    @functools.cached_property
    def _renamed(self) -> tuple[Any, re.Pattern[str], dict[str, str], dict[Any, Any]]:
        """Returns a tokenizer whose special tokens have names that nobody knows, a pattern of the true names, the new
        ones by them, and the true ids by the ids of the new names."""
        import tokenizers

        spec, secret = json.loads(self.json), secrets.token_hex(12)
        names: dict[str, str] = {}
        for i, entry in enumerate(spec.get("added_tokens") or []):
            if entry["special"]:
                names[entry["content"]] = entry["content"] = f"{secret}{i:06d}"
        made = tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
        made.no_padding()
        made.no_truncation()
        ids = {made.token_to_id(new): self._tokenizer.token_to_id(old) for old, new in names.items()}
        ordered = sorted(names, key=len, reverse=True)
        return made, re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)"), names, ids

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Returns the ids of a text in parts, of which some may hold special tokens.

        In those parts special tokens are renamed, so that the library finds no others.
        """
        made, spelled, names, ids = self._renamed
        text = "".join(spelled.sub(lambda m: names[m[0]], t) if special else t for t, special in parts)
        return [ids.get(id, id) for id in made.encode(text, add_special_tokens=False).ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        return [encoded.ids for encoded in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; special tokens, and ids beyond the vocabulary, are left out."""
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)

    def piece(self, id: int) -> str:
        """Returns the piece of an id, as the vocabulary spells it."""
        piece = self._tokenizer.id_to_token(int(id))
        return f"<unused {id}>" if piece is None else piece

    def id_of(self, piece: str) -> int | None:
        """Returns the id of a piece, or None if the vocabulary lacks it."""
        return self._tokenizer.token_to_id(piece)

    def save(self, folder: str | Path) -> Path:
        """Writes `tokenizer.json` and `tokenizer_config.json` into a folder and returns the path of the first."""
        config = {f"{kind}_token": piece for kind, piece in sorted(self.special.items())}
        write_atomically(
            Path(folder) / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False).encode()
        )
        return write_atomically(Path(folder) / "tokenizer.json", self.json.encode())


def _special_names(folder: Path) -> dict[str, str]:
    """Returns which piece is bos, eos …, as the files beside a tokenizer.json say."""
    names: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if file.is_file():
            values = json.loads(file.read_text("utf-8"))
            for kind in KINDS:
                entry = values.get(f"{kind}_token")
                piece = entry.get("content") if isinstance(entry, dict) else entry
                if isinstance(piece, str):
                    names[kind] = piece
    return names


def post_processor(before: Mapping[str, int | None], after: Mapping[str, int | None]) -> dict[str, Any]:
    """Returns the post-processor of a tokenizer.json that adds special pieces, given with their ids, around a text.

    A pair of texts has those of `after` between them too.
    """

    def special(pieces: Iterable[str]) -> list[dict]:
        return [{"SpecialToken": {"id": piece, "type_id": 0}} for piece in pieces]

    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    single = [*special(before), a, *special(after)]
    ids = {piece: {"id": piece, "ids": [id], "tokens": [piece]} for piece, id in {**before, **after}.items()}
    pair = [*single, b, *special(after)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": ids}


def read_tokenizer_json(path: Path) -> HuggingFace:
    """Reads a tokenizer.json and the names of special pieces beside it."""
    try:
        source = _with_configured_tokens(path.read_text("utf-8"), path.parent / "tokenizer_config.json")
    except json.JSONDecodeError as error:
        raise ValueError(f"not a Hugging Face tokenizer.json: {error}") from error
    return HuggingFace(_with_configured_bos(source, path), _special_names(path.parent))


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def configured_tokens(sidecar: Path) -> dict[int, dict[str, Any]]:
    """Returns the added tokens that a `tokenizer_config.json` describes, by id, as a tokenizer.json would.

    A token is normalised unless it is special, where the file doesn't say. ValueError: an entry is damaged.
    """
    values = json.loads(sidecar.read_text("utf-8")) if sidecar.is_file() else {}
    out: dict[int, dict[str, Any]] = {}
    for id, entry in (values.get("added_tokens_decoder") or {}).items():
        flags = {f: entry.get(f, False) for f in FLAGS} if isinstance(entry, dict) else {"": None}
        fits = isinstance(entry, dict) and isinstance(entry.get("content"), str) and entry["content"]
        if not (fits and id.isdecimal() and all(isinstance(flag, bool) for flag in flags.values())):
            raise ValueError(
                f"{sidecar}: added_tokens_decoder[{id}] is {entry!r}, not a content and true or false flags"
            )
        flags["normalized"] = entry.get("normalized", not flags["special"])
        out[int(id)] = {"id": int(id), "content": entry["content"]} | flags
    return dict(sorted(out.items()))


def _with_configured_tokens(source: str, sidecar: Path) -> str:
    """Returns a tokenizer.json with the added tokens that the file beside it describes: as in transformers, what that
    one says of spaces and words around a token stands before what the tokenizer.json says."""
    stated = configured_tokens(sidecar)
    if not stated:
        return source
    values = json.loads(source)
    added = {entry["id"]: entry for entry in values.get("added_tokens") or []}
    if all(id in added and {k: added[id].get(k) for k in entry} == entry for id, entry in stated.items()):
        return source
    pieces = dict(values["model"]["vocab"]) if isinstance(values["model"]["vocab"], dict) else {}
    pieces |= {entry["content"]: id for id, entry in added.items()}
    for id, entry in stated.items():
        if pieces.get(entry["content"], id) != id:
            at = pieces[entry["content"]]
            raise ValueError(f"{sidecar}: {entry['content']} has id {id}, and {at} in tokenizer.json; correct one")
    values["added_tokens"] = [entry for _, entry in sorted((added | stated).items())]
    return json.dumps(values, ensure_ascii=False)


def _with_configured_bos(source: str, path: Path) -> str:
    """Returns a tokenizer.json, to which the begin-of-text token is added if only `tokenizer_config.json` asks for it.

    transformers' Llama and Gemma tokenizers put it before a text whatever the file says; DeepSeek relies on that.
    """
    sidecar = path.parent / "tokenizer_config.json"
    settings = json.loads(sidecar.read_text("utf-8")) if sidecar.is_file() else {}
    if not settings.get("add_bos_token") or not str(settings.get("tokenizer_class")).startswith(("Llama", "Gemma")):
        return source
    names = _special_names(path.parent)
    unchanged = HuggingFace(source, names)
    if "bos" not in names or unchanged.boundary_ids[0]:
        return source
    values, piece = json.loads(source), names["bos"]
    added = post_processor({piece: unchanged.id_of(piece)}, {})
    existing = values.get("post_processor")
    values["post_processor"] = {"type": "Sequence", "processors": [existing, added]} if existing else added
    return json.dumps(values, ensure_ascii=False)
