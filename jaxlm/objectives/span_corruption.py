"""Span corruption as T5 was trained (Raffel et al. 2020, section 3.1.4): gaps in a text, and what stood in them."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm.core.ranges import BelowOne, Count, NonNegative, Positive, PositiveShare
from jaxlm.data.packing import Window
from jaxlm.models.model import Model
from jaxlm.objectives import causal, seq2seq
from jaxlm.objectives.objective import DeviceBatch, Example, Objective, RowShape, Sums, Tokenizer


@dataclass(frozen=True)
class Config:
    rate: PositiveShare = 0.15
    """Share of the tokens that are taken out."""
    span: Positive = 3.0
    """Mean length of the spans that are taken out."""
    sentinels: Count = 100
    """Marks of gaps: the tokenizer's <extra_id_0>, <extra_id_1> …; if it has none, rows of model.vocab behind its own,
    the last one first, which is where T5 has them."""
    target_len: Count | None = None
    """Tokens of a row's targets; None: what a row that is one long document needs. Short documents need more."""
    decoder_start: str = ""
    """The piece that targets begin after; empty: what the model says, else padding where the tokenizer has no BOS (T5),
    EOS where it has one (BART)."""
    label_smoothing: BelowOne = 0.0
    z_loss: NonNegative = 0.0
    """Weight of log²Z, which keeps logits from drifting (T5 used 1e-4)."""


def check(c: Config, tokenizer: Tokenizer) -> None:
    if not 0 < c.rate < 1:
        raise ValueError(f"objective.rate: {c.rate} must be above 0 and below 1")
    if c.span < 1:
        raise ValueError(f"objective.span: {c.span} must be at least 1 token")
    if c.sentinels < 1:
        raise ValueError(f"objective.sentinels: {c.sentinels} must be at least 1")
    sentinels(c, tokenizer)
    seq2seq.start_id(c.decoder_start, tokenizer)


def sentinels(c: Config, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the ids of the marks, in the order of their use."""
    if tokenizer.id_of("<extra_id_0>") is None:
        return tokenizer.vocab_size + np.arange(c.sentinels)[::-1]
    ids = [tokenizer.id_of(f"<extra_id_{i}>") for i in range(c.sentinels)]
    if None in ids:
        has = ids.index(None)
        raise ValueError(f"objective.sentinels: data.tokenizer has {has}, not {c.sentinels}; set it to {has}")
    return np.array(ids)


def vocab_size(c: Config, tokenizer: Tokenizer) -> int:
    """Returns how many rows of the vocabulary are in use, with the sentinels that the tokenizer lacks."""
    return max(tokenizer.vocab_size, int(sentinels(c, tokenizer).max()) + 1)


def counts(c: Config, n: int) -> tuple[int, int]:
    """Returns how many of n > 1 tokens are taken out and in how many spans; at least one stays before each span."""
    taken = min(max(round(n * c.rate), 1), n - 1)
    return taken, min(max(round(taken / c.span), 1), n - taken)


@functools.lru_cache
def window(c: Config, seq_len: int) -> int:
    """Returns how many tokens of text have a corrupted form that, with its EOS, just fits a source of `seq_len`."""
    n = 2
    while n + 1 - np.subtract(*counts(c, n + 1)) + 1 <= seq_len:
        n += 1
        if counts(c, n)[1] > c.sentinels:
            raise ValueError(
                f"objective.sentinels: {c.sentinels} are too few for the gaps of train.seq_len {seq_len}; lower "
                "train.seq_len or raise objective.span"
            )
    if n - np.subtract(*counts(c, n)) + 1 > seq_len:
        raise ValueError(f"train.seq_len: {seq_len} is too short for span corruption; make it at least 3")
    return n


def target_positions(c: Config, seq_len: int) -> int:
    """Returns how many positions a row's targets have, rounded up so that a context mesh axis divides them."""
    needed = sum(counts(c, window(c, seq_len))) + 1
    if c.target_len is not None and c.target_len < needed:
        raise ValueError(f"objective.target_len: {c.target_len} is below {needed}, which train.seq_len {seq_len} needs")
    return -(-needed // 8) * 8 if c.target_len is None else c.target_len


def example(c: Config, record: Window, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    """Makes a row of sources and targets, each ended by EOS, of a window of `window(c, seq_len)` + 1 tokens.

    Every document of the window is corrupted by itself. Where sources or targets don't all fit, as with many short
    documents, some drawn at random are left out; without `data.document_mask` the window is one text, as in T5.
    """
    tokens, segments = record["tokens"][:-1], record["segments"][:-1]
    rooms = room, target_room = row.seq_len, target_positions(c, row.seq_len)
    is_text = (segments > 0) & ~np.isin(tokens, [tokenizer.bos_id, tokenizer.eos_id])
    marks, eos = sentinels(c, tokenizer), tokenizer.eos_id
    sources: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    origin = np.zeros(rooms[1], np.int32)
    for segment in rng.permutation(np.unique(segments[is_text])):
        text = tokens[is_text & (segments == segment)]
        if len(text) < 2:
            continue
        taken, spans = counts(c, len(text))
        size, target_size = len(text) - taken + spans + 1, taken + spans + 1
        if size <= room and target_size <= target_room:
            room, target_room = room - size, target_room - target_size
            source, target = corrupt(c, text, marks, rng)
            at = sum(len(t) for t in targets)
            origin[at : at + len(target) + 1] = segment
            sources.append(np.append(source, eos))
            targets.append(np.append(target, eos))
    start = seq2seq.start_id(c.decoder_start, tokenizer, row.decoder_start)
    out = seq2seq.encoder_decoder_row(sources, targets, rooms, start, tokenizer.pad_id or 0)
    return out | Example(origin=origin)


def prompt(c: Config, text: str, row: RowShape, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns where targets start, and the text with a gap at its end: the model writes the mark and what follows."""
    start = seq2seq.start_id(c.decoder_start, tokenizer, row.decoder_start)
    return [start], [*tokenizer.encode(text), int(sentinels(c, tokenizer)[0]), tokenizer.eos_id]


def corrupt(c: Config, text: np.ndarray, marks: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns the text with a mark for each span taken out, and each mark followed by its span.

    Stretches that stay and spans that go alternate, and all ways to share the tokens out are equally likely.
    """
    taken, spans = counts(c, len(text))
    stay, go = _shares(len(text) - taken, spans, rng), _shares(taken, spans, rng)
    pieces = np.split(text, np.cumsum(np.stack([stay, go], 1))[:-1])
    source = [x for i in range(spans) for x in (pieces[2 * i], marks[i : i + 1])]
    target = [x for i in range(spans) for x in (marks[i : i + 1], pieces[2 * i + 1])]
    return np.concatenate(source), np.concatenate(target)


def _shares(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Draws k positive numbers whose sum is n, every such sum equally likely."""
    cuts = np.sort(rng.choice(n - 1, k - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [n]]))


def totals(batch: DeviceBatch) -> dict[str, jax.Array]:
    return {"spans": batch["weights"].sum()}


def loss(c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> Sums:
    """Computes the causal loss, not under the name `tokens`: bits per byte of spans say nothing of the whole text."""
    return {"spans": causal.loss(c, model, params, batch, key)["tokens"]}


objective = Objective(
    Config, "packed", ("encoder_decoder",), example=example, totals=totals, loss=loss, check=check, window=window,
    target_positions=target_positions, vocab_size=vocab_size, prompt=prompt, outputs=causal.outputs,
)  # fmt: skip
