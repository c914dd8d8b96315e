"""Supervised fine-tuning on conversations: what the assistant says is learned, the rest is read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.core.ranges import BelowOne, NonNegative
from jaxlm.data import conversations, packing, render_chat
from jaxlm.objectives import causal
from jaxlm.objectives.objective import (
    Asked,
    Example,
    ExampleReader,
    MakePrompts,
    Objective,
    OwnTexts,
    PromptSet,
    Record,
    RowShape,
    Tokenizer,
    Written,
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    template: str = ""
    """Chat template in Jinja; empty: the model's own, or plain texts if it has none."""
    pack: bool = True
    """Fill rows with as many conversations as fit, none of which sees another; else one a row."""
    everything: bool = False
    """Learn what the user and the system say too."""
    label_smoothing: BelowOne = 0.0
    z_loss: NonNegative = 0.0
    """Weight of log²Z, which keeps logits from drifting."""


class Conversations(Record):
    """A record holds the conversations that share a row."""

    texts: list[render_chat.Tokens]


def read(c: Config, source: str, row: RowShape, tokenizer: Tokenizer) -> tuple[list[Conversations], list[str]]:
    """Returns rows of conversations, and what a user should know of them."""
    every = conversations.read(source)
    texts = render_chat.encode_for_training(every, tokenizer, c.template or row.template)
    room = row.seq_len + 1
    notes = conversations.unread_fields(source, every)
    if joined := sum(t.joined for t in texts):
        notes.append(f"{source}: in {joined:,} of {len(texts):,} conversations an answer begins within a token, so "
                     "prompts end otherwise than in training; end the template's prompt without a blank")  # fmt: skip
    if long := [t for t in texts if len(t.ids) > room]:
        notes.append(
            f"{source}: {len(long):,} of {len(texts):,} conversations lose their end; raise train.seq_len to keep it"
        )
    texts = [render_chat.Tokens(t.ids[:room], t.learned[:room]) for t in texts]
    usable = [t for t in texts if any(t.learned[1:])]
    if len(usable) < len(texts):
        notes.append(
            f"{source}: {len(texts) - len(usable):,} conversations left out: their answers begin too late to fit"
        )
    if not usable:
        raise ValueError(f"train.seq_len: {row.seq_len} is too short for any answer in {source}; raise it")
    lengths = [len(t.ids) for t in usable]
    members = packing.first_fit(lengths, room) if c.pack else [[i] for i in range(len(usable))]
    return [Conversations(where="", texts=[usable[i] for i in some]) for some in members], notes


def token_ids(record: Conversations) -> list[Sequence[int]]:
    """Returns the token ids of each conversation of a row."""
    return [text.ids for text in record["texts"]]


def read_prompts(
    c: Config, source: str, row: RowShape, tokenizer: Tokenizer, new_tokens: int,
    make_prompts: MakePrompts,
) -> PromptSet:  # fmt: skip
    """Returns conversations up to their last answer, and these answers. What does not fit a row together with
    `new_tokens` of answer is cut off at the beginning."""
    ids, true = render_chat.prompts_and_answers(conversations.read(source), tokenizer, c.template or row.template)
    room = row.seq_len - new_tokens
    if room < 1:
        raise ValueError(f"tokens: {new_tokens} leave nothing of train.seq_len {row.seq_len} to read; ask for fewer")
    cut = sum(len(text) > room for text in ids)
    note = f"{source}: {cut:,} of {len(ids):,} conversations lose their beginning; raise train.seq_len to keep it"
    return PromptSet([text[-room:] for text in ids], None, true, [note] if cut else [])


def example(c: Config, record: Conversations, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    """Makes a causal row of the conversations, with weights on what is learned of them."""
    room, texts = row.seq_len + 1, record["texts"]
    window = packing.concatenated([np.array(t.ids) for t in texts], room, tokenizer.pad_id or 0)
    out = causal.shifted(window)
    if c.everything:
        return out
    learned = packing.concatenated([np.array(t.learned) for t in texts], room, 0)["tokens"]
    return out | Example(weights=out["weights"] * learned[1:].astype(np.float32))


def asked(c: Config, record: Conversations, row: RowShape, tokenizer: Tokenizer) -> list[Asked]:
    """Returns each conversation up to its last answer, with the tokens that stand after such an answer."""
    template = c.template or row.template
    ends = (tokenizer.eos_id, *(render_chat.turn_ends(tokenizer, template) if template else ()))
    out = []
    for text in record["texts"]:
        first = last = max(i for i, is_learned in enumerate(text.learned) if is_learned)
        while first and text.learned[first - 1]:
            first -= 1
        at = next((i for i in range(last, first - 1, -1) if text.ids[i] in ends), None)
        end = ends[-1:] if at is None else tuple(text.ids[at : last + 1])  # None: its end was cut off
        if first:
            out.append(Asked(text.ids[:first], None, end))
    return out


def answered(c: Config, texts: Sequence[Written], row: RowShape, tokenizer: Tokenizer) -> Conversations:
    """Returns the record of conversations whose last answer a model wrote, which alone is learned."""
    return Conversations(where="", texts=[
        render_chat.Tokens([*text.asked.prompt, *text.answer],
                           [False] * len(text.asked.prompt) + [True] * len(text.answer)) for text in texts
    ])  # fmt: skip


objective = Objective(
    Config, ExampleReader(read, token_ids, shares_rows=True), ("decoder",), example=example, totals=causal.totals,
    loss=causal.loss, read_prompts=read_prompts, chat_template=lambda c: c.template, outputs=causal.outputs,
    own_texts=OwnTexts(asked, answered, lambda c, kind: c.pack),
)  # fmt: skip
