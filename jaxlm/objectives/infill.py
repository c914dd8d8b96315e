"""Filling in the middle (Bavarian et al. 2022): some documents are rearranged so that their middle comes last."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxlm.core.ranges import BelowOne, NonNegative, Share
from jaxlm.data.packing import Window
from jaxlm.objectives import causal
from jaxlm.objectives.objective import Example, Objective, RowShape, Tokenizer

# What published tokenizers call the pieces before the prefix, the suffix and the middle.
NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


@dataclass(frozen=True)
class Config:
    rate: Share = 0.5
    """Share of documents that are rearranged; the others are learned as they are."""
    spm: Share = 0.5
    """Share of rearranged documents whose suffix comes first (SPM); the others begin with the prefix (PSM)."""
    split: Literal["character", "token"] = "character"
    """Where the cuts fall. Between tokens is quicker, but such a model can't go on after half a word."""
    sentinels: tuple[str, ...] = ()
    """The tokenizer's pieces that announce prefix, suffix and middle; empty: the names that are usual for them."""
    label_smoothing: BelowOne = 0.0
    z_loss: NonNegative = 0.0
    """Weight of log²Z, which keeps logits from drifting."""


def check(c: Config, tokenizer: Tokenizer) -> None:
    for name in ("rate", "spm"):
        if not 0 <= getattr(c, name) <= 1:
            raise ValueError(f"objective.{name}: {getattr(c, name)} is no share; choose one from 0 to 1")
    marks(c, tokenizer)
    halves = ("re", "turn x"), ("a ", " b\n"), ("", "\n  c")
    if c.split == "character" and any(_joined(tokenizer, *pair) != "".join(pair) for pair in halves):
        raise ValueError(
            "objective.split: data.tokenizer adds or drops spaces where a text is cut (a SentencePiece model with a "
            "dummy prefix, or WordPiece); set objective.split to token"
        )


def _joined(tokenizer: Tokenizer, first: str, second: str) -> str:
    return tokenizer.decode([*tokenizer.encode(first), *tokenizer.encode(second)])


def marks(c: Config, tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Returns the ids of the pieces that announce prefix, suffix and middle."""
    for names in (c.sentinels,) if c.sentinels else NAMES:
        ids = [id for name in names if (id := tokenizer.id_of(name)) is not None]
        if len(ids) == len(set(ids)) == len(names) == 3:
            return ids[0], ids[1], ids[2]
    if c.sentinels:
        raise ValueError(f"objective.sentinels: {c.sentinels} are not three pieces of data.tokenizer; name three")
    raise ValueError(
        "objective.sentinels: data.tokenizer has no <fim_prefix>, <fim_suffix>, <fim_middle> or the like; name three "
        "pieces that text never holds, for example <cls> <sep> <mask>"
    )


def gap(c: Config, tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Returns a prompt that a model which was trained so continues with the middle, ended by EOS."""
    before, after, middle = marks(c, tokenizer)
    return [tokenizer.bos_id, before, *tokenizer.encode(prefix), after, *tokenizer.encode(suffix), middle]


def example(c: Config, record: Window, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    """Makes a causal row, all of it learned, with some of the window's documents rearranged, each within itself.

    Sentinels, and words that a cut tears, take room: what no longer fits is cut off the end of the row. A rearranged
    document there loses the end of its suffix, then the start of its prefix, never its middle or the EOS after it.
    """
    size = len(record["tokens"])
    tokens = np.full(size, tokenizer.pad_id or 0, np.int32)
    segments, positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
    at = 0
    for ids, segment, is_text in _stretches(record, tokenizer):
        ids = ids[: size - at]
        if is_text and len(ids) and rng.random() < c.rate:
            ids = rearrange(c, ids, size - at, tokenizer, rng)
        tokens[at : at + len(ids)] = ids
        segments[at : at + len(ids)] = segment
        at += len(ids)
    begins = np.flatnonzero(np.diff(segments[:at], prepend=-1))
    positions[:at] = np.arange(at) - np.repeat(begins, np.diff(begins, append=at))
    return causal.shifted(Window(tokens=tokens, segments=segments, positions=positions))


def _stretches(record: Window, tokenizer: Tokenizer) -> list[tuple[np.ndarray, int, bool]]:
    """Returns (tokens, segment, whether it is text) in order: texts with their EOS, and what is between them."""
    n = int((record["segments"] > 0).sum())
    tokens, segments = record["tokens"][:n], record["segments"][:n]
    is_text = ~np.isin(tokens, [tokenizer.bos_id, tokenizer.eos_id])
    ends = np.append(False, is_text[:-1] & (tokens[1:] == tokenizer.eos_id) & (segments[1:] == segments[:-1]))
    is_text = is_text | ends  # an EOS belongs to the text before it
    cuts = np.flatnonzero((np.diff(is_text) != 0) | (np.diff(segments) != 0) | ends[:-1]) + 1
    parts = np.split(np.arange(n), cuts) if n else []
    return [(tokens[part], int(segments[part[0]]), bool(is_text[part[0]])) for part in parts]


def rearrange(c: Config, ids: np.ndarray, room: int, tokenizer: Tokenizer, rng: np.random.Generator) -> np.ndarray:
    """Returns a text as prefix, suffix, middle and EOS, in at most `room` tokens; unchanged if its middle is too long.

    PSM: `<PRE> prefix <SUF> suffix <MID> middle EOS`; SPM: `<PRE> <SUF> suffix <MID> prefix middle EOS`.
    """
    text = ids[:-1] if ids[-1] == tokenizer.eos_id else ids
    cut = _between_characters if c.split == "character" else _between_tokens
    prefix, middle, suffix = cut(text, tokenizer, rng)
    suffix_first = rng.random() < c.spm
    excess = max(0, len(prefix) + len(middle) + len(suffix) + 4 - room)
    if excess > len(prefix) + len(suffix):
        return ids
    keep = max(0, len(suffix) - excess)
    prefix, suffix = prefix[max(0, excess - len(suffix)) :], suffix[:keep]
    before, after, last = ([mark] for mark in marks(c, tokenizer))
    end = [tokenizer.eos_id]  # even where the document goes on in another window: here the middle is whole
    parts = (before, after, suffix, last, prefix) if suffix_first else (before, prefix, after, suffix, last)
    return np.concatenate([*parts, middle, end]).astype(ids.dtype)


Parts = tuple[list[int], list[int], list[int]]


def _between_tokens(ids: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator) -> Parts:
    a, b = np.sort(rng.integers(0, len(ids) + 1, 2))
    return list(ids[:a]), list(ids[a:b]), list(ids[b:])


def _between_characters(ids: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator) -> Parts:
    """Cuts the decoded text twice and encodes the three parts, as a user's are encoded one by one.

    A window's edge may cut through a character of several tokens: its bytes stay as they are at the outer ends.
    """
    first, last = 0, len(ids)
    while first < min(3, last) and tokenizer.decode(ids[first:last].tolist())[:1] == "\ufffd":
        first += 1
    while last > max(first, len(ids) - 3) and tokenizer.decode(ids[first:last].tolist())[-1:] == "\ufffd":
        last -= 1
    text = tokenizer.decode(ids[first:last].tolist())
    a, b = np.sort(rng.integers(0, len(text) + 1, 2))
    prefix, middle, suffix = (tokenizer.encode(part) for part in (text[:a], text[a:b], text[b:]))
    return [*ids[:first], *prefix], middle, [*suffix, *ids[last:]]


objective = Objective(Config, "packed", ("decoder",), example=example, totals=causal.totals, loss=causal.loss,
                      check=check, outputs=causal.outputs)  # fmt: skip
