"""A target text from a source text: translation, summaries; for an encoder-decoder or, in one row, for a decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.data import sources
from jaxlm.objectives import causal

records = "texts"
models = ("encoder_decoder", "decoder")
weights, loss = causal.weights, causal.loss


@dataclass(frozen=True)
class Config:
    source: str = "source"
    """Field of the text to read, in JSONL, Parquet and TFDS records; or the ending of a file with a text a line."""
    target: str = "target"
    """Field, or the ending, of the text to write."""
    target_len: int | None = None
    """Encoder-decoder: tokens of a row's targets; None: as many as train.seq_len, which the sources have."""
    pack: bool = True
    """Fill rows with as many pairs as fit, none of which sees another; else one pair a row."""
    separator: str = ""
    """Decoder: the tokenizer's piece between source and target; empty: its separator, else EOS."""
    decoder_start: str = ""
    """Encoder-decoder: the piece that targets begin after; empty: what the model says, else what the tokenizer's kind
    is trained with: padding where it has no BOS (T5), EOS where it has one (BART)."""
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    """Weight of log²Z, which keeps logits from drifting."""


def specs(c: Config, width: int) -> dict[str, Any]:
    return {}


def check(c: Config, tokenizer: Any) -> None:
    if not c.source or not c.target or c.source == c.target:
        raise ValueError(f"objective.source: {c.source!r} and objective.target {c.target!r} must be two field names")
    separator(c, tokenizer)
    start_id(c.decoder_start, tokenizer)


def fields(c: Config) -> tuple[str, str]:
    """The two texts of a pair."""
    return c.source, c.target


def places(c: Config, seq_len: int) -> int:
    """Target positions of an encoder-decoder's row."""
    size = seq_len if c.target_len is None else c.target_len
    if size < 2:
        raise ValueError(f"objective.target_len: {size} leaves no room for a token and EOS; make it at least 2")
    return size


def fit(c: Config, kind: str, seq_len: int, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Tokens of each pair [n, 2] → what is kept of its two texts, what that takes of a row's two rooms, and the rooms.

    A text that is too long loses its end, never its EOS. In a decoder's row, which both texts share, each may have at
    least half.
    """
    if kind == "encoder_decoder":
        rooms = seq_len, places(c, seq_len)
        kept = np.minimum(lengths, np.array(rooms) - 1)
        return kept, kept + 1, rooms
    if c.target_len is not None:
        raise ValueError("objective.target_len: a decoder's row holds both texts; leave it None")
    room = seq_len + 1 - 3  # BOS, separator, EOS
    if room < 2:
        raise ValueError(f"train.seq_len: {seq_len} leaves no room for a pair of texts; make it at least 4")
    source = np.minimum(lengths[:, 0], room - np.minimum(lengths[:, 1], room // 2))
    kept = np.stack([source, np.minimum(lengths[:, 1], room - source)], 1)
    return kept, np.stack([kept.sum(1) + 3, np.zeros_like(kept[:, 0])], 1), (seq_len + 1, 1)


def separator(c: Config, tokenizer: Any) -> int:
    """Id of the token between source and target in a decoder's row."""
    if not c.separator:
        return tokenizer.eos_id if tokenizer.sep_id is None else tokenizer.sep_id
    return _named("separator", c.separator, tokenizer)


def start_id(name: str, tokenizer: Any, of_model: int | None = None) -> int:
    """Id of the token that an encoder-decoder's targets begin after."""
    if name:
        return _named("decoder_start", name, tokenizer)
    if of_model is not None:
        return of_model
    own_bos = tokenizer.bos_id != tokenizer.eos_id  # a tokenizer without BOS lets EOS stand in for it
    return tokenizer.eos_id if own_bos or tokenizer.pad_id is None else tokenizer.pad_id


def _named(field: str, piece: str, tokenizer: Any) -> int:
    found = tokenizer.id_of(piece)
    if found is None:
        raise ValueError(f"objective.{field}: data.tokenizer has no piece {piece!r}; name one that it has")
    return found


def prompt(c: Config, tokenizer: Any, text: str, row: dict) -> tuple[list[int], list[int] | None]:
    """What comes before a target: a decoder's tokens up to the separator; or the start, and what the encoder reads."""
    ids = tokenizer.encode(text)
    if row["kind"] == "decoder":
        return [tokenizer.bos_id, *ids, separator(c, tokenizer)], None
    return [start_id(c.decoder_start, tokenizer, row["decoder_start"])], [*ids, tokenizer.eos_id]


def asked(
    c: Config, source: str, tokenizer: Any, row: dict, prompts: Callable[[Sequence[str]], Any]
) -> tuple[list[list[int]], list[list[int]] | None, list[str], list[str]]:
    """(what a model reads of each pair as `prompts` gives it, the true texts, what a user should know of them).
    `row["new"]`: tokens that it may write."""
    texts, true = zip(*(pair.texts for pair in sources.documents(source, field=fields(c))), strict=True)
    read, source_ids = prompts(texts)
    room = row["seq_len"] if source_ids is not None else row["seq_len"] - row["new"]
    if room < 3:
        raise ValueError(
            f"--tokens: {row['new']} leave nothing of train.seq_len {row['seq_len']} to read; ask for fewer"
        )
    whole = read if source_ids is None else source_ids
    kept = [ids if len(ids) <= room else [*ids[: room - 1], ids[-1]] for ids in whole]
    cut = sum(len(ids) > room for ids in whole)
    notes = (
        [f"{source}: {cut:,} of {len(true):,} sources lose their end; raise train.seq_len to keep it"] if cut else []
    )
    return (kept, None, list(true), notes) if source_ids is None else (read, kept, list(true), notes)


def example(c: Config, record: dict, tokenizer: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A row of the record's pairs: `tokens` are documents `[bos] source [eos] target [eos]` of `lengths` [pairs, 2]."""
    lengths, seq_len = record["lengths"], record["seq_len"]
    kept, _, rooms = fit(c, record["kind"], seq_len, lengths)
    begins = np.cumsum(lengths.sum(1) + 3) - lengths.sum(1) - 2  # of each source, after its BOS
    tokens, pairs = record["tokens"], []
    for begin, (whole, _), (a, b) in zip(begins, lengths, kept, strict=True):
        pairs.append((tokens[begin : begin + a], tokens[begin + whole + 1 : begin + whole + 1 + b]))
    eos = [tokenizer.eos_id]
    if record["kind"] == "encoder_decoder":
        start = start_id(c.decoder_start, tokenizer, record["decoder_start"])
        sources, targets = ([np.append(pair[side], eos) for pair in pairs] for side in (0, 1))
        return rows(sources, targets, rooms, start, tokenizer.pad_id or 0)
    bos, middle = [tokenizer.bos_id], [separator(c, tokenizer)]
    texts = [np.concatenate([bos, source, middle, target, eos]) for source, target in pairs]
    row = line_up(texts, rooms[0], tokenizer.pad_id or 0)
    learned = line_up([np.arange(len(x)) > len(x) - len(t) - 2 for x, (_, t) in zip(texts, pairs, strict=True)],
                      rooms[0], 0)["tokens"]  # fmt: skip
    out = causal.example(causal.Config(), row, tokenizer, rng)
    return out | dict(weights=out["weights"] * learned[1:].astype(np.float32))


def rows(
    sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], rooms: tuple[int, int], start: int, pad: int
) -> dict[str, np.ndarray]:
    """An encoder-decoder's row: target i, EOS at its end, is predicted from source i and from `start` and itself."""
    source = line_up(sources, rooms[0], pad)
    target = line_up(targets, rooms[1], pad)
    inputs = line_up([np.append(start, t[:-1]) for t in targets], rooms[1], pad)
    return dict(
        source=source["tokens"],
        source_segments=source["segments"],
        source_positions=source["positions"],
        tokens=inputs["tokens"],
        targets=target["tokens"],
        weights=(target["segments"] > 0).astype(np.float32),
        segments=target["segments"],
        positions=target["positions"],
    )


def line_up(texts: Sequence[np.ndarray], room: int, pad: int) -> dict[str, np.ndarray]:
    """Texts behind one another in `room` tokens, each a segment of its own with positions from 0."""
    lengths = [len(text) for text in texts]
    n = sum(lengths)
    assert n <= room, f"{n} tokens for {room} places"
    fill = lambda parts, value: np.concatenate([*parts, np.full(room - n, value)]).astype(np.int32)  # noqa: E731
    return dict(
        tokens=fill(texts, pad),
        segments=fill([np.full(k, i) for i, k in enumerate(lengths, 1)], 0),
        positions=fill([np.arange(k) for k in lengths], 0),
    )
