"""Tagging of words: entities, parts of speech. A word's tag is learned, and read, at its first token.

B rows, T positions, D model width, L labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.spec import Spec, bias, normal
from jaxlm.data.labelled import check_labels, conll
from jaxlm.models.model import Model
from jaxlm.nn.layers import Output, dropout
from jaxlm.objectives.objective import (
    DeviceBatch,
    Example,
    ExampleReader,
    Kind,
    Objective,
    Prediction,
    Record,
    RowShape,
    Sums,
    Tokenizer,
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    labels: tuple[str, ...] = ()
    """In the order of the head's rows; empty: those of the training data, O first, then by name."""
    word: int = 0
    """Column of the words in CoNLL files."""
    tag: int = -1
    """Column of the tags."""
    dropout: float = 0.1
    """Before the head."""
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    """How much each label counts, in the order of `labels`; empty: all the same."""


class Sentence(Record):
    ids: list[int]
    firsts: list[int]
    """Position of the first token of each word; -1 for a word without tokens."""
    tags: list[int]
    """Number of each word's label."""


def infer_from_data(c: Config, sources: Sequence[str]) -> Config:
    """Takes the labels of the training data where none are set."""
    if c.labels:
        return c
    examples = [example for source in sources for example in conll.read(source, c.word, c.tag).examples]
    labels = {tag for example in examples for tag in example.tags}
    return replace(c, labels=(*(["O"] if "O" in labels else []), *sorted(labels - {"O"})))


def specs(c: Config, width: int) -> dict[str, Spec]:
    n = len(c.labels)
    return dict(tag=Spec((width, n), ("embed", None), normal(0.02)), tag_bias=bias(n))


def check(c: Config, tokenizer: Tokenizer) -> None:
    if c.class_weights and len(c.class_weights) != len(c.labels):
        raise ValueError(f"objective.class_weights: {len(c.class_weights)} weights for {len(c.labels)} labels")
    if len(set(c.labels)) != len(c.labels):
        raise ValueError("objective.labels: a label stands twice in the list")


def read(c: Config, source: str, row: RowShape, tokenizer: Tokenizer) -> tuple[list[Sentence], list[str]]:
    """Returns sentences as tokens with the first token of each word, and what a user should know of them."""
    examples = conll.read(source, c.word, c.tag).examples
    check_labels(((e.where, tag) for e in examples for tag in e.tags), c.labels, "objective.labels")
    number = {label: i for i, label in enumerate(c.labels)}
    first, last = _boundaries(tokenizer, row.kind)
    room = row.seq_len - len(first) - len(last)
    records, cut = [], 0
    words = [word if i == 0 else f" {word}" for e in examples for i, word in enumerate(e.words)]
    encoded = iter(tokenizer.encode_batch(words))
    for e in examples:
        ids: list[int] = []
        firsts: list[int] = []
        whole = True
        for new in [next(encoded) for _ in e.words]:
            whole = whole and len(ids) + len(new) <= room
            firsts.append(len(first) + len(ids) if new and whole else -1)
            ids += new if whole else []
        cut += not whole
        tags = [number[tag] for tag in e.tags]
        records.append(Sentence(ids=[*first, *ids, *last], firsts=firsts, tags=tags, where=e.where))
    note = (
        f"{source}: {cut:,} of {len(records):,} sentences lose their end, which counts as untagged; raise train.seq_len"
    )
    return records, [note] if cut else []


def _boundaries(tokenizer: Tokenizer, kind: Kind) -> tuple[list[int], list[int]]:
    """Returns the ids that stand before and after a sentence."""
    if kind == "encoder":
        first = tokenizer.bos_id if tokenizer.cls_id is None else tokenizer.cls_id
        last = tokenizer.eos_id if tokenizer.sep_id is None else tokenizer.sep_id
        return [first], [last]
    return [tokenizer.bos_id], []


def example(c: Config, record: Sentence, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    n, rest = len(record["ids"]), row.seq_len - len(record["ids"])
    targets, weights = np.zeros(row.seq_len, np.int32), np.zeros(row.seq_len, np.float32)
    for at, tag in zip(record["firsts"], record["tags"], strict=True):
        if at >= 0:
            targets[at] = tag
            weights[at] = c.class_weights[tag] if c.class_weights else 1.0
    return Example(
        tokens=np.array([*record["ids"], *[tokenizer.pad_id or 0] * rest], np.int32),
        targets=targets,
        segments=(np.arange(row.seq_len) < n).astype(np.int32),
        positions=np.array([*range(n), *[0] * rest], np.int32),
        weights=weights,
    )


def totals(batch: DeviceBatch) -> dict[str, jax.Array]:
    return {"tags": batch["weights"].sum()}


def logits(c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> tuple[jax.Array, Output]:
    """Computes the head's outputs `[B, T, L]` in float32, and the model's."""
    body, head = (None, None) if key is None else jax.random.split(key)
    out = model.forward(params, batch, key=body)
    x_BTD = dropout(out.x_BTD, c.dropout, head)
    w_DL = model.shard(params["tag"].astype(x_BTD.dtype), None, None)
    z_BTL = model.shard.einsum("btd,dl->btl", x_BTD, w_DL, "batch", "seq", None)
    return z_BTL.astype(jnp.float32) + params["tag_bias"][None, None], out


def loss(c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> Sums:
    z_BTL, out = logits(c, model, params, batch, key)
    log_BTL = jax.nn.log_softmax(z_BTL, -1)
    hit_BTL = jnp.arange(len(c.labels))[None, None] == batch["targets"][..., None]
    nll_BT = -jnp.where(hit_BTL, log_BTL, 0.0).sum(-1)
    w_BT = batch["weights"]
    smooth_BT = (1 - c.label_smoothing) * nll_BT - c.label_smoothing * log_BTL.mean(-1)
    correct_BT = z_BTL.argmax(-1) == batch["targets"]
    values = dict(loss=(smooth_BT * w_BT).sum(), nll=(nll_BT * w_BT).sum(), accuracy=(correct_BT * w_BT).sum())
    if out.aux_B is not None:
        values["aux"] = (out.aux_B * w_BT.sum(-1)).sum()
        values["loss"] += values["aux"]
    return {"tags": values}


def predict(c: Config, model: Model, params: Any, batch: DeviceBatch) -> jax.Array:
    """Returns the likeliest label of each token, `[B, T]`."""
    return logits(c, model, params, batch, None)[0].argmax(-1)


def answers(
    c: Config, records: Sequence[Sentence], predictions: Sequence[np.ndarray]
) -> tuple[list[list[str]], list[list[str]]]:
    """Returns true and predicted tags of each sentence's words; words without tokens are untagged."""
    untagged = "O" if "O" in c.labels else c.labels[0]
    true = [[c.labels[tag] for tag in record["tags"]] for record in records]
    predicted = [[c.labels[labels[at]] if at >= 0 else untagged for at in record["firsts"]]
                 for record, labels in zip(records, predictions, strict=True)]  # fmt: skip
    return true, predicted


objective = Objective(
    Config, ExampleReader(read), ("encoder", "decoder"), example=example, totals=totals, loss=loss, specs=specs,
    check=check, infer_from_data=infer_from_data, padding="pack", prediction=Prediction(predict, answers, "tags"),
)  # fmt: skip
