"""An encoder-decoder, or a decoder in one row, learns to write a target text from a source text: translation,
summaries; for an encoder-decoder or, in one row, for a decoder."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.core.ranges import BelowOne, Count, NonNegative
from jaxlm.data import sources
from jaxlm.data.packing import TextRow, concatenated
from jaxlm.objectives import causal
from jaxlm.objectives.objective import (
    Asked,
    Example,
    Kind,
    MakePrompts,
    Objective,
    OwnTexts,
    PromptSet,
    RowShape,
    TextPairs,
    Tokenizer,
    Written,
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    source: str = "source"
    """Field of the text to read, in JSONL, Parquet and TFDS records; or the ending of a file with a text a line."""
    target: str = "target"
    """Field, or the ending, of the text to write."""
    target_len: Count | None = None
    """Encoder-decoder: tokens of a row's targets; None: as many as train.seq_len, which the sources have."""
    pack: bool = True
    """Fill rows with as many pairs as fit, none of which sees another; else one pair a row."""
    source_language: str = ""
    """Encoder-decoder of many languages: the tokenizer's piece for the sources' language, such as en_XX; empty: the one
    that the tokenizer puts around a text."""
    target_language: str = ""
    """The piece for the targets' language."""
    separator: str = ""
    """Decoder: the tokenizer's piece between source and target; empty: its separator, else EOS."""
    decoder_start: str = ""
    """Encoder-decoder: the piece that targets begin after; empty: what the model says, else what the tokenizer's kind
    is trained with: padding where it has no BOS (T5), EOS where it has one (BART)."""
    label_smoothing: BelowOne = 0.0
    z_loss: NonNegative = 0.0
    """Weight of log²Z, which keeps logits from drifting."""


def check(c: Config, tokenizer: Tokenizer) -> None:
    if not c.source or not c.target or c.source == c.target:
        raise ValueError(f"objective.source: {c.source!r} and objective.target {c.target!r} must be two field names")
    separator(c, tokenizer)
    start_id(c.decoder_start, tokenizer)
    boundaries(c, tokenizer)


def fields(c: Config) -> tuple[str, str]:
    """Returns the names of the two texts of a pair."""
    return c.source, c.target


def target_positions(c: Config, seq_len: int) -> int:
    """Returns how many positions the targets of an encoder-decoder's row have."""
    size = seq_len if c.target_len is None else c.target_len
    if size < 2:
        raise ValueError(f"objective.target_len: {size} leaves no room for a token and EOS; make it at least 2")
    return size


def boundaries(c: Config, tokenizer: Tokenizer) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]:
    """Returns the ids (before, after) an encoder-decoder's source, and those of its target.

    They are what the vocabulary's makers put around a text, as BART's `<s>` and `</s>` and mBART's languages; EOS alone
    if they put nothing behind it.
    """
    before, after = tokenizer.boundary_ids
    if not after:
        before, after = [], [tokenizer.eos_id]
    usual = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.cls_id, tokenizer.sep_id}
    sides = []
    for field, piece in (("source_language", c.source_language), ("target_language", c.target_language)):
        if piece and usual >= {*before, *after}:
            raise ValueError(f"objective.{field}: data.tokenizer puts no language around a text; leave it empty")
        id = _named(field, piece, tokenizer) if piece else None
        made = [[i if id is None or i in usual else id for i in ids] for ids in (before, after)]
        sides.append((made[0], made[1]))
    return sides[0], sides[1]


def target_start(c: Config, tokenizer: Tokenizer, of_model: int | None) -> int:
    """Returns the id of the token that targets begin after: a language that ends them, as mBART's, else `start_id`."""
    last = boundaries(c, tokenizer)[1][1][-1]
    ends_in_language = last not in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.cls_id, tokenizer.sep_id)
    return last if ends_in_language and not c.decoder_start else start_id(c.decoder_start, tokenizer, of_model)


def fit(
    c: Config, kind: Kind, seq_len: int, tokenizer: Tokenizer, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Returns how many of each pair's tokens [n, 2] stay, what they take of a row's two rooms, and the rooms.

    A text that is too long loses its end, never its EOS. In a decoder's row, which both texts share, each may have at
    least half.
    """
    if kind == "encoder_decoder":
        rooms = seq_len, target_positions(c, seq_len)
        around = np.array([len(before) + len(after) for before, after in boundaries(c, tokenizer)])
        for field, room, n in zip(("train.seq_len", "objective.target_len"), rooms, around.tolist(), strict=True):
            if room <= n:
                raise ValueError(f"{field}: {room} leaves no room beside the {n} tokens around a text; raise it")
        fitting = np.minimum(lengths, np.array(rooms) - around)
        return fitting, fitting + around, rooms
    if c.target_len is not None:
        raise ValueError("objective.target_len: a decoder's row holds both texts; leave it None")
    room = seq_len + 1 - 3  # BOS, separator, EOS
    if room < 2:
        raise ValueError(f"train.seq_len: {seq_len} leaves no room for a pair of texts; make it at least 4")
    source = np.minimum(lengths[:, 0], room - np.minimum(lengths[:, 1], room // 2))
    fitting = np.stack([source, np.minimum(lengths[:, 1], room - source)], 1)
    return fitting, np.stack([fitting.sum(1) + 3, np.zeros_like(fitting[:, 0])], 1), (seq_len + 1, 1)


def separator(c: Config, tokenizer: Tokenizer) -> int:
    """Returns the id of the token between source and target in a decoder's row."""
    if not c.separator:
        return tokenizer.eos_id if tokenizer.sep_id is None else tokenizer.sep_id
    return _named("separator", c.separator, tokenizer)


def start_id(name: str, tokenizer: Tokenizer, of_model: int | None = None) -> int:
    """Returns the id of the token that an encoder-decoder's targets begin after."""
    if name:
        return _named("decoder_start", name, tokenizer)
    if of_model is not None:
        return of_model
    has_bos = tokenizer.bos_id != tokenizer.eos_id  # a tokenizer without BOS lets EOS stand in for it
    return tokenizer.eos_id if has_bos or tokenizer.pad_id is None else tokenizer.pad_id


def _named(field: str, piece: str, tokenizer: Tokenizer) -> int:
    id = tokenizer.id_of(piece)
    if id is None:
        raise ValueError(f"objective.{field}: data.tokenizer has no piece {piece!r}; name one that it has")
    return id


def prompt(c: Config, text: str, row: RowShape, tokenizer: Tokenizer) -> tuple[list[int], list[int] | None]:
    """Returns what comes before a target: a decoder's tokens up to the separator, or the start and what the encoder
    reads."""
    return prompt_of(c, tokenizer.encode(text), row, tokenizer)


def prompt_of(c: Config, ids: Sequence[int], row: RowShape, tokenizer: Tokenizer) -> tuple[list[int], list[int] | None]:
    """Returns what comes before the target of a source of these token ids; see `prompt`."""
    if row.kind == "decoder":
        return [tokenizer.bos_id, *ids, separator(c, tokenizer)], None
    (before, after), (begin, _) = boundaries(c, tokenizer)
    return [target_start(c, tokenizer, row.decoder_start), *begin], [*before, *ids, *after]


def read_prompts(
    c: Config, source: str, row: RowShape, tokenizer: Tokenizer, new_tokens: int,
    make_prompts: MakePrompts,
) -> PromptSet:  # fmt: skip
    """Returns what a model reads of each pair as `make_prompts` gives it, and the true texts. A source that is too long
    loses its end, never what the tokenizer puts behind it."""
    left_out: list[str] = []
    found = [pair.texts for pair in sources.documents(source, field=fields(c), left_out=left_out)]
    if not found:
        raise ValueError(f"data source {source!r} is empty: it holds no pair of which both texts say something")
    texts, true = zip(*found, strict=True)
    prompts, encoder_inputs = make_prompts(texts)
    room = row.seq_len if encoder_inputs is not None else row.seq_len - new_tokens
    if room < 3:
        raise ValueError(f"tokens: {new_tokens} leave nothing of train.seq_len {row.seq_len} to read; ask for fewer")
    whole = prompts if encoder_inputs is None else encoder_inputs
    n = 1 if encoder_inputs is None else len(boundaries(c, tokenizer)[0][1])
    fitting = [ids if len(ids) <= room else [*ids[: room - n], *ids[-n:]] for ids in whole]
    cut = sum(len(ids) > room for ids in whole)
    note = f"{source}: {cut:,} of {len(true):,} sources lose their end; raise train.seq_len to keep it"
    notes = [note] if cut else []
    if left_out:
        notes.append(f"{source}: {len(left_out):,} pairs are left out, for one of their texts is empty "
                     f"(first: {left_out[0]})")  # fmt: skip
    if encoder_inputs is None:
        return PromptSet(fitting, None, list(true), notes)
    return PromptSet(prompts, fitting, list(true), notes)


def example(c: Config, record: TextRow, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    """Makes a row of the record's pairs, of an encoder-decoder or, with both texts in one sequence, of a decoder."""
    lengths = record["lengths"]
    fitting, _, rooms = fit(c, row.kind, row.seq_len, tokenizer, lengths)
    begins = np.cumsum(lengths.sum(1) + 3) - lengths.sum(1) - 2  # of each source, after its BOS
    tokens, pairs = record["tokens"], []
    for begin, (whole, _), (a, b) in zip(begins, lengths, fitting, strict=True):
        pairs.append((tokens[begin : begin + a], tokens[begin + whole + 1 : begin + whole + 1 + b]))
    eos = [tokenizer.eos_id]
    if row.kind == "encoder_decoder":
        start = target_start(c, tokenizer, row.decoder_start)
        sources, targets = ([np.concatenate([before, pair[side], after]) for pair in pairs]
                            for side, (before, after) in enumerate(boundaries(c, tokenizer)))  # fmt: skip
        return encoder_decoder_row(sources, targets, rooms, start, tokenizer.pad_id or 0)
    bos, middle = [tokenizer.bos_id], [separator(c, tokenizer)]
    texts = [np.concatenate([bos, source, middle, target, eos]) for source, target in pairs]
    out = causal.shifted(concatenated(texts, rooms[0], tokenizer.pad_id or 0))
    is_target = [np.arange(len(x)) > len(x) - len(t) - 2 for x, (_, t) in zip(texts, pairs, strict=True)]
    learned = concatenated(is_target, rooms[0], 0)["tokens"]
    return out | Example(weights=out["weights"] * learned[1:].astype(np.float32))


def encoder_decoder_row(
    sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], rooms: tuple[int, int], start: int, pad: int
) -> Example:
    """Makes an encoder-decoder's row: target i, its end included, is predicted from source i, `start` and itself."""
    source = concatenated(sources, rooms[0], pad)
    target = concatenated(targets, rooms[1], pad)
    inputs = concatenated([np.append(start, t[:-1]) for t in targets], rooms[1], pad)
    return Example(
        source=source["tokens"],
        source_segments=source["segments"],
        source_positions=source["positions"],
        tokens=inputs["tokens"],
        targets=target["tokens"],
        weights=(target["segments"] > 0).astype(np.float32),
        segments=target["segments"],
        positions=target["positions"],
    )


def asked(c: Config, record: TextRow, row: RowShape, tokenizer: Tokenizer) -> list[Asked]:
    """Returns what a model reads of each source of a record, which leaves at least half of a decoder's row."""
    out, begin = [], 0
    for source, target in record["lengths"].tolist():
        lengths = np.array([[source, row.seq_len + 1]])
        kept = int(fit(c, row.kind, row.seq_len, tokenizer, lengths)[0][0, 0])
        ids = record["tokens"][begin + 1 : begin + 1 + kept].tolist()
        out.append(Asked(*prompt_of(c, ids, row, tokenizer), (tokenizer.eos_id,)))
        begin += source + target + 3
    return out


def answered(c: Config, texts: Sequence[Written], row: RowShape, tokenizer: Tokenizer) -> TextRow:
    """Returns the record of pairs whose targets a model wrote."""
    tokens, lengths, eos = [], [], tokenizer.eos_id
    for (prompt, inputs, _), answer in texts:
        if inputs is None:
            source = prompt[1:-1]
        else:
            before, after = boundaries(c, tokenizer)[0]
            source = inputs[len(before) : len(inputs) - len(after)]
        target = answer[:-1] if answer[-1:] == [eos] else answer
        tokens += [tokenizer.bos_id, *source, eos, *target, eos]
        lengths.append((len(source), len(target)))
    return TextRow(tokens=np.array(tokens, np.int32), lengths=np.array(lengths, np.int32))


objective = Objective(
    Config, TextPairs(fields, fit, packs=lambda c: c.pack), ("encoder_decoder", "decoder"), example=example,
    totals=causal.totals, loss=causal.loss, check=check, target_positions=target_positions, prompt=prompt,
    read_prompts=read_prompts, outputs=causal.outputs,
    own_texts=OwnTexts(asked, answered, lambda c, kind: c.pack and kind == "decoder"),
)  # fmt: skip
