"""Learns a SentencePiece vocabulary from text."""

import hashlib
import heapq
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxlm.data.tokenizer import SentencePiece, write_atomically

CHUNK = 4000  # characters of text that the trainer gets at a time, line breaks included

# Bytes per token on held-out Python source, vocabulary 8192: line by line with "\n" as a symbol of its own 3.26
# (unigram) and 3.37 (BPE); whole chunks, so that line breaks join pieces, 3.48 and 3.62; BPE that may also cross
# scripts (letters, brackets, underscores) 4.25; and that may cross spaces too 4.83. The last is left out: a small model
# needed as many tokens to reach the same bits per byte, and a prompt that ends inside such a piece reads differently.
TRAINER: dict[str, Any] = {
    "model_type": "bpe",
    "split_by_unicode_script": False,
    "split_by_whitespace": True,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "user_defined_symbols": ["\t"],  # the trainer keeps tabs out of pieces for its own use
    "max_sentence_length": 4 * CHUNK + 1,
    "num_threads": 1,
    "minloglevel": 2,
    "pad_id": 0,
    "unk_id": 1,
    "bos_id": 2,
    "eos_id": 3,
    "pad_piece": "<pad>",
    "control_symbols": ["<mask>", "<cls>", "<sep>"],
}


def train_sentencepiece(
    texts: Iterable[str], path: str | Path, *, vocab_size: int = 8192, seed: int = 0, max_bytes: int = 8 << 20,
    name: str = "",
) -> SentencePiece:  # fmt: skip
    """Learns a lossless vocabulary from a sample of at most `max_bytes` of the texts and writes it to `path` (.model).

    Raises ValueError if the texts are empty or too short for `vocab_size` pieces; `name` says whose they are.
    """
    import sentencepiece

    path = Path(path)
    if path.suffix != ".model":
        raise ValueError(f"tokenizer path {path} must end in .model, so that `load` knows its kind")
    sample = _sample(texts, seed, max_bytes)
    if not sample:
        raise ValueError(f"{name or 'texts'}: the corpus is empty: no text to train a tokenizer on; name one with text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample), model_writer=model, vocab_size=vocab_size, **TRAINER
        )
    except (RuntimeError, ValueError, OSError) as error:
        size = sum(len(chunk.encode()) for chunk in sample)
        reason = str(error).rpartition("] ")[2].strip()  # without the library's own file and line
        raise ValueError(
            f"tokenizer: a vocabulary of {vocab_size} does not fit {size} bytes of text"
            f"{f' in {name}' if name else ''}: {reason}"
        ) from error
    write_atomically(path, model.getvalue())
    return SentencePiece(model.getvalue())


def _sample(texts: Iterable[str], seed: int, max_bytes: int) -> list[str]:
    """Returns the chunks with the smallest hashes, which don't depend on the order of texts; memory is bounded."""
    heap: list[tuple[int, bytes]] = []
    size, limit = 0, -1 << 64  # chunks ranked at or below `limit` never come back, or the order of texts would count
    seen: set[int] = set()
    for chunk in _chunks(texts):
        data = chunk.encode("utf-8")
        rank = -int.from_bytes(hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest(), "big")
        if rank in seen or rank <= limit:
            continue
        heapq.heappush(heap, (rank, data))
        seen.add(rank)
        size += len(data)
        while size > max_bytes and len(heap) > 1:
            limit, data = heapq.heappop(heap)
            seen.discard(limit)
            size -= len(data)
    return [data.decode("utf-8") for _, data in sorted(heap, reverse=True)]


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))
