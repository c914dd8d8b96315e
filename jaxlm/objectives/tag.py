"""Tagging gives each word a tag: entities, parts of speech. A word's tag is learned, and read, at its first token.

B rows, T positions, D model width, L labels.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.ranges import BelowOne, NonNegative
from jaxlm.core.spec import Spec, bias, normal
from jaxlm.data.labelled import Tagged, check_labels, conll, tables
from jaxlm.models.model import Model
from jaxlm.nn.family import Outputs
from jaxlm.nn.layers import Output, dropout
from jaxlm.objectives import classify
from jaxlm.objectives.objective import (
    DeviceBatch,
    Example,
    ExampleReader,
    Objective,
    Prediction,
    Record,
    RowShape,
    Sums,
    TaskHead,
    Tokenizer,
    Use,
    no_tokens,
)  # fmt: skip
from jaxlm.objectives.outputs import Predicted


@dataclass(frozen=True)
class Config:
    labels: tuple[str, ...] = ()
    """In the order of the head's rows; empty: those of the training data, O first, then by name."""
    word: int = 0
    """Column of the words in CoNLL files."""
    tag: int = -1
    """Column of the tags."""
    dropout: BelowOne = 0.1
    """Before the head."""
    bos: bool = False
    """A decoder reads BOS before every text, also where its tokenizer puts none there, as earlier runs do."""
    label_smoothing: BelowOne = 0.0
    class_weights: tuple[NonNegative, ...] = ()
    """How much each label counts, in the order of `labels`; empty: all the same."""


class Sentence(Record):
    ids: list[int]
    firsts: list[int]
    """Position of the first token of each word; -1 for a word without tokens."""
    tags: list[int]
    """Number of each word's label."""
    words: tuple[str, ...]


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
    records, cut = _records(c, examples, row, tokenizer)
    note = (
        f"{source}: {cut:,} of {len(records):,} sentences lose their end, which counts as untagged; raise train.seq_len"
    )
    return records, [note] if cut else []


def _records(c: Config, examples: Sequence[Tagged], row: RowShape, tokenizer: Tokenizer) -> tuple[list[Sentence], int]:
    """Returns sentences as tokens with the first token of each word, and how many lose their end."""
    number = {label: i for i, label in enumerate(c.labels)}
    first, _, last = classify.marks(tokenizer, row.kind, c.bos)
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
        records.append(Sentence(ids=[*first, *ids, *last], firsts=firsts, tags=tags, where=e.where, words=e.words))
    return records, cut


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
    x_BTD = classify.token_states(model, params, out)
    z_BTL = classify.linear(model, params["tag"], dropout(x_BTD, c.dropout, head))
    return z_BTL + params["tag_bias"][None, None], out


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


def outputs(c: Config, model: Model, params: Any, batch: DeviceBatch) -> Predicted:
    """Returns the head's outputs at each token."""
    return Predicted(logits(c, model, params, batch, None)[0], batch["weights"])


def predict(c: Config, model: Model, params: Any, batch: DeviceBatch) -> jax.Array:
    """Returns the likeliest label of each token and its probability, `[B, T, 2]`."""
    z_BTL = logits(c, model, params, batch, None)[0]
    return jnp.stack([z_BTL.argmax(-1).astype(jnp.float32), jax.nn.softmax(z_BTL).max(-1)], -1)


def answers(
    c: Config, records: Sequence[Sentence], predictions: Sequence[np.ndarray]
) -> tuple[list[list[str]], list[list[str]]]:
    """Returns true and predicted tags of each sentence's words; words without tokens are untagged."""
    untagged = "O" if "O" in c.labels else c.labels[0]
    true = [[c.labels[tag] for tag in record["tags"]] for record in records]
    predicted = [[c.labels[int(labels[at, 0])] if at >= 0 else untagged for at in record["firsts"]]
                 for record, labels in zip(records, predictions, strict=True)]  # fmt: skip
    return true, predicted


WORD = re.compile(r"\w+(?:[-'’.,:/@]\w+)*|[^\w\s]")
COLUMNS = (".conll", ".bio", ".iob", ".iob2")


def rows(c: Config, source: str) -> Iterable[tables.Row]:
    """Yields the sentences of CoNLL columns, or the rows of a table with a `text` or a list of `words`."""
    if not source.endswith(COLUMNS):
        return tables.read(source)
    return (tables.Row(e.where, {"words": list(e.words)}) for e in conll.read(source, c.word, None).examples)


def unlabelled(c: Config, lines: Sequence[tables.Row], row: RowShape, tokenizer: Tokenizer) -> list[Sentence]:
    """Returns sentences as tokens without tags. The words of a text are what stands between white space, with
    punctuation at their ends as words of their own."""
    words = [line.words("words", "words") if "words" in line.cells else WORD.findall(line.text("text", "text"))
             for line in lines]  # fmt: skip
    for line, several in zip(lines, words, strict=True):
        if not several:
            raise ValueError(f"{line.where}: a text without words; remove it")
    none = c.labels[0]
    sentences = [Tagged(line.where, tuple(several), (none,) * len(several))
                 for line, several in zip(lines, words, strict=True)]  # fmt: skip
    return _records(c, sentences, row, tokenizer)[0]


def told(c: Config, records: Sequence[Sentence], predictions: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Returns the `words` with their `tags`, and where tags mark spans the `entities`: `label`, `text`, `words` (the
    first, the one after the last) and `score`, the lowest probability of a tag of the span."""
    out = []
    is_spans = any(label.startswith("B-") for label in c.labels)
    for record, tags, z_T2 in zip(records, answers(c, records, predictions)[1], predictions, strict=True):
        told: dict[str, Any] = {"words": list(record["words"]), "tags": tags}
        if is_spans:
            sure = [float(z_T2[at, 1]) if at >= 0 else 0.0 for at in record["firsts"]]
            told["entities"] = [
                {"label": label, "text": " ".join(record["words"][a:z]), "words": [a, z], "score": min(sure[a:z])}
                for label, a, z in spans(tags)
            ]
        out.append(told)
    return out


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Returns (label, first word, the one after the last) of each span that tags mark, in any of the usual schemes."""
    found: list[tuple[str, int, int]] = []
    for i, tag in enumerate([*conll.to_iob2(tags), "O"]):
        if tag.startswith("I-") and found:
            found[-1] = (*found[-1][:2], i + 1)
        elif tag.startswith("B-"):
            found.append((tag[2:], i, i + 1))
    return found


use = Use[Config](rows, lambda c: "text", unlabelled, told)
head = TaskHead[Config](
    "TokenClassification", "tag", lambda c, model, params, batch: logits(c, model, params, batch, None)[0],
    lambda out: Config(labels=out.labels), lambda c: Outputs(c.labels),
    with_labels=lambda c, labels: replace(c, labels=labels),
)  # fmt: skip
objective = Objective(
    Config, ExampleReader(read), ("encoder", "decoder"), example=example, totals=totals, loss=loss, specs=specs,
    check=check, infer_from_data=infer_from_data, target_positions=no_tokens, padding="pack",
    prediction=Prediction(predict, answers, "tags", use, of="position"), head=head, outputs=outputs,
)  # fmt: skip
