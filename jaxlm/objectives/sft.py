"""Supervised fine-tuning on conversations: what the assistant says is learned, the rest is read."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.data import conversations, packing, render_chat
from jaxlm.objectives import causal
from jaxlm.objectives.seq2seq import line_up

records = "examples"
models = ("decoder",)
weights, loss = causal.weights, causal.loss


@dataclass(frozen=True)
class Config:
    template: str = ""
    """Chat template in Jinja; empty: the model's own, or plain texts if it has none."""
    pack: bool = True
    """Fill rows with as many conversations as fit, none of which sees another; else one a row."""
    everything: bool = False
    """Learn what the user and the system say too."""
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    """Weight of log²Z, which keeps logits from drifting."""


def specs(c: Config, width: int) -> dict[str, Any]:
    return {}


def check(c: Config, tokenizer: Any) -> None:
    pass


def read(c: Config, source: str, tokenizer: Any, row: dict) -> tuple[list[dict], list[str]]:
    """(rows of conversations, what a user should know of them). `row["template"]`: the model's own template or None."""
    found = conversations.read(source)
    texts = render_chat.learnable(found, tokenizer, c.template or row["template"])
    room = row["seq_len"] + 1
    notes = []
    if long := [t for t in texts if len(t.ids) > room]:
        notes.append(
            f"{source}: {len(long):,} of {len(texts):,} conversations lose their end; raise train.seq_len to keep it"
        )
    texts = [conversations.Tokens(t.ids[:room], t.learned[:room]) for t in texts]
    kept = [t for t in texts if any(t.learned[1:])]
    if len(kept) < len(texts):
        notes.append(
            f"{source}: {len(texts) - len(kept):,} conversations left out: their answers begin too late to fit"
        )
    if not kept:
        raise ValueError(f"train.seq_len: {row['seq_len']} is too short for any answer in {source}; raise it")
    lengths = [len(t.ids) for t in kept]
    members = packing.first_fit(lengths, room) if c.pack else [[i] for i in range(len(kept))]
    return [{"texts": [kept[i] for i in some]} for some in members], notes


def asked(
    c: Config, source: str, tokenizer: Any, row: dict, prompts: Any
) -> tuple[list[list[int]], None, list[str], list[str]]:
    """(conversations up to their last answer, these answers, what a user should know). `row["new"]`: tokens of new
    answers; what doesn't fit beside them is cut off at the beginning."""
    ids, true = render_chat.asked(conversations.read(source), tokenizer, c.template or row["template"])
    room = row["seq_len"] - row["new"]
    if room < 1:
        raise ValueError(
            f"--tokens: {row['new']} leave nothing of train.seq_len {row['seq_len']} to read; ask for fewer"
        )
    cut = sum(len(text) > room for text in ids)
    note = f"{source}: {cut:,} of {len(ids):,} conversations lose their beginning; raise train.seq_len to keep it"
    return [text[-room:] for text in ids], None, true, [note] if cut else []


def example(c: Config, record: dict, tokenizer: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    room, texts = record["seq_len"] + 1, record["texts"]
    row = line_up([np.array(t.ids) for t in texts], room, tokenizer.pad_id or 0)
    out = causal.example(causal.Config(), row, tokenizer, rng)
    if c.everything:
        return out
    learned = line_up([np.array(t.learned) for t in texts], room, 0)["tokens"]
    return out | dict(weights=out["weights"] * learned[1:].astype(np.float32))
