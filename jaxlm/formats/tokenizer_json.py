"""Our own tokenizers are written as a Hugging Face `tokenizer.json` where that reads every text the same."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxlm.data.tokenizer import KINDS, SPACE, Bytes, SentencePiece, Tokenizer, post_processor

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = range(1, 5)  # SentencePiece's kinds of pieces
BPE = 2  # SentencePiece's kind of model; the library's unigram breaks ties otherwise than SentencePiece
# The special tokens before and after a text on its own, by kind of model: as they are trained here.
AROUND = {"decoder": ("bos", None), "encoder": ("cls", "sep"), "encoder_decoder": (None, "eos")}


def convert(tokenizer: Tokenizer, kind: str = "decoder") -> tuple[str | None, str]:
    """Returns (tokenizer.json, "") or (None, why it can't be made exactly), for a model of a `kind`.

    Two differences are the format's own: "</s>" in a text becomes the control token there, and "▁" a space.
    """
    if isinstance(tokenizer, Bytes):
        content = _bytes(tokenizer)
    elif isinstance(tokenizer, SentencePiece):
        result = _pieces(tokenizer)
        if isinstance(result, str):
            return None, result
        content = result
    else:
        return None, f"a tokenizer of kind {type(tokenizer).__name__} has a file of its own"
    ids = [None if part is None else getattr(tokenizer, f"{part}_id") for part in AROUND[kind]]
    content["post_processor"] = post_processor(*({} if id is None else {tokenizer.piece(id): id} for id in ids))
    text = json.dumps(content, ensure_ascii=False)
    differs = _difference(tokenizer, text)
    return (None, f"{differs!r} would be cut otherwise") if differs else (text, "")


def settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the content of `tokenizer_config.json`: which token is for what."""
    ids = {kind: getattr(tokenizer, f"{kind}_id") for kind in KINDS}
    parts = {f"{kind}_token": tokenizer.piece(id) for kind, id in ids.items() if id is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **parts}


def _file(model: dict, added: list[dict], pre: dict | None, normalizer: dict | None, decoder: dict) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _added(id: int, content: str, special: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, **plain, "special": special}


def _bpe(vocab: dict[str, int], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
    }
    defaults |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **defaults, **settings, "vocab": vocab, "merges": merges}


def _bytes(tokenizer: Bytes) -> dict[str, Any]:
    # In the byte-level alphabet printable Latin-1 stands for itself; the others follow from U+0100 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    added = [_added(256 + i, piece, True) for i, piece in enumerate(tokenizer.SPECIAL)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _file(_bpe(vocab, []), added, level, None, level)


def _pieces(tokenizer: SentencePiece) -> dict[str, Any] | str:
    """Returns the file's content, or what of the model it can't say."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    refused = {
        f"text is normalised ({normalizer.name})": bool(normalizer.precompiled_charsmap),
        "a space is put before every text": normalizer.add_dummy_prefix,
        "repeated spaces are removed": normalizer.remove_extra_whitespaces,
        "spaces are not escaped": not normalizer.escape_whitespaces,
        "spaces end a piece": trainer.treat_whitespace_as_suffix,
        "unknown characters have no bytes": not trainer.byte_fallback,
        "it is not BPE": trainer.model_type != BPE,
    }
    if why := [reason for reason, applies in refused.items() if applies]:
        return why[0]
    pieces = {p.piece: i for i, p in enumerate(proto.pieces)}
    unknown = next((p.piece for p in proto.pieces if p.type == UNKNOWN), None)
    added = [
        _added(i, p.piece, p.type != USER_DEFINED)
        for i, p in enumerate(proto.pieces)
        if p.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    scores = {p.piece: p.score for p in proto.pieces if p.type == NORMAL}
    model = _bpe(pieces, list(_merges(scores)), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoder = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    return _file(model, added, None, spaces, decoder)


def _merges(scores: dict[str, float]) -> Iterator[list[str]]:
    """Yields all pairs that make a piece, best score first: SentencePiece joins any two such neighbours."""
    for piece in sorted(scores, key=lambda p: -scores[p]):
        for i in range(1, len(piece)):
            if piece[:i] in scores and piece[i:] in scores:
                yield [piece[:i], piece[i:]]


def _difference(tokenizer: Tokenizer, source: str) -> str | None:
    """Returns a text that the file reads otherwise than the tokenizer, of many made from pieces and any characters."""
    from tokenizers import Tokenizer as Library

    theirs = Library.from_str(source)
    special = {getattr(tokenizer, f"{kind}_id") for kind in KINDS}
    plain = [i for i in range(tokenizer.vocab_size) if i not in special and tokenizer.bytes_per_token[i]]
    rng = np.random.default_rng(0)
    texts = [tokenizer.decode(rng.choice(plain, n).tolist()) for n in (2, 3, 5, 8, 20, 80, 200) for _ in range(60)]
    texts += ["".join(rng.choice(list(" \t\n\raab01._é漢😀\u200d\ufeff"), 40)) for _ in range(100)]
    texts += ["".join(map(chr, rng.integers(1, 0xD800, 30))) for _ in range(20)]
    texts += [" " * n for n in range(1, 40)] + ["\n" * n + "  x" for n in range(8)]
    for text in texts:
        text = text.replace(SPACE, "").replace("\ufffd", "")
        ids = tokenizer.encode(text)
        if theirs.encode(text, add_special_tokens=False).ids != ids or theirs.decode(ids) != tokenizer.decode(ids):
            return text
    return None
