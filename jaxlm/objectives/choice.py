"""Multiple choice: which of several ways to go on is right (commonsense, reading, exams).

Each choice is read behind its context, in a row of its own, and gets one number; the choices of a question share a
softmax (Radford et al. 2018). B questions, N choices, T positions, D model width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.ranges import BelowOne, Natural
from jaxlm.core.spec import Spec, bias, normal
from jaxlm.data.labelled import Choice, Split, choices, tables
from jaxlm.models.model import Model
from jaxlm.nn.family import Outputs
from jaxlm.nn.layers import dropout
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
    context: tuple[str, ...] = ("context",)
    """Columns of CSV, TSV, JSON and TFDS tables that a choice is read behind, one after another."""
    choices: tuple[str, ...] = ("choices",)
    """Column of the list of choices, or a column of each choice."""
    answer: str = "answer"
    """Column of the right choice: its number, its letter, or what the list calls it."""
    first: Natural = 0
    """Number of the first choice."""
    most: Natural = 0
    """Choices that a question may have; 0: as many as in the training data."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a CSV or TSV file whose first line is no header."""
    dropout: BelowOne = 0.1
    """Before the head."""
    bias: bool | None = None
    """The head has a bias, which no answer depends on; None: as published heads of the model's family, or no where
    there are none."""


def _choices(c: Config, source: str) -> Split:
    return choices.read(source, choices.Names(c.context, c.choices, c.answer), c.columns, c.first)


class Text(TypedDict):
    """A text is a choice behind its context, as tokens."""

    ids: list[int]
    types: list[int]
    """0 for the context, 1 for the choice."""


class Question(Record):
    texts: list[Text]
    """One of each choice."""
    answer: int
    """Number of the right choice, from 0."""


def infer_from_data(c: Config, sources: Sequence[str]) -> Config:
    """Takes the number of choices in the training data where none is set."""
    if c.most:
        return c
    return replace(c, most=max(len(e.choices) for source in sources for e in _choices(c, source).examples))


def specs(c: Config, width: int) -> dict[str, Spec]:
    head = dict(choice=Spec((width, 1), ("embed", None), normal(0.02)))
    return head | dict(choice_bias=bias(1)) if c.bias else head


def check(c: Config, tokenizer: Tokenizer) -> None:
    for name in ("context", "choices"):
        if not getattr(c, name):
            raise ValueError(f"objective.{name}: names no column; name at least one")


def read(c: Config, source: str, row: RowShape, tokenizer: Tokenizer) -> tuple[list[Question], list[str]]:
    """Returns questions as a text of tokens for each choice, and what a user should know of them."""
    records, cut = _records(c, _choices(c, source).examples, row, tokenizer)
    note = f"{source}: {cut:,} of {len(records):,} contexts lose their beginning; raise train.seq_len to keep it"
    return records, [note] if cut else []


def _records(c: Config, examples: Sequence[Choice], row: RowShape, tokenizer: Tokenizer) -> tuple[list[Question], int]:
    """Returns questions as tokens, and how many contexts lose their beginning."""
    if many := next((e for e in examples if len(e.choices) > c.most), None):
        raise ValueError(
            f"{many.where}: {len(many.choices)} choices; raise objective.most from {c.most} to have so many"
        )
    space = " " if row.kind == "decoder" else ""  # a decoder goes on with the same text
    contexts = tokenizer.encode_batch([e.context for e in examples])
    encoded = iter(tokenizer.encode_batch([space + text for e in examples for text in e.choices]))
    records, cut = [], 0
    for e, context in zip(examples, contexts, strict=True):
        texts = [_joined(context, next(encoded), row, tokenizer) for _ in e.choices]
        cut += not all(whole for *_, whole in texts)
        each = [Text(ids=i, types=t) for i, t, _ in texts]
        records.append(Question(texts=each, answer=e.answer, where=e.where))
    return records, cut


def token_ids(record: Question) -> list[Sequence[int]]:
    """Returns the token ids of all texts of a question, one after another: a question is one example."""
    return [[id for text in record["texts"] for id in text["ids"]]]


def _joined(
    context: list[int], choice: list[int], row: RowShape, tokenizer: Tokenizer
) -> tuple[list[int], list[int], bool]:
    """Returns ids, the number of the part each belongs to, and whether all fits. A context loses what is farthest from
    the choice."""
    first, between, last = classify.marks(tokenizer, row.kind)
    between = between if row.kind == "encoder" else []
    room = row.seq_len - len(first) - len(between) - len(last)
    after = choice[:room]
    before = context[max(0, len(context) + len(after) - room) :]
    ids, start = [*first, *before, *between, *after, *last], len(first) + len(before) + len(between)
    return ids, [0] * start + [1] * (len(ids) - start), len(before) + len(after) == len(context) + len(choice)


def example(c: Config, record: Question, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    texts = [classify.padded(text["ids"], text["types"], row, tokenizer) for text in record["texts"]]
    last = [0 if row.kind == "encoder" else len(text["ids"]) - 1 for text in record["texts"]]
    missing = c.most - len(texts)

    def stacked(leaves: Iterable[np.ndarray]) -> np.ndarray:
        return np.stack([*leaves, *np.zeros((missing, row.seq_len), np.int32)])

    return Example(
        tokens=stacked(text["tokens"] for text in texts), types=stacked(text["types"] for text in texts),
        segments=stacked(text["segments"] for text in texts), positions=stacked(text["positions"] for text in texts),
        at=np.array([*last, *[0] * missing], np.int32),
        choice_mask=(np.arange(c.most) < len(texts)).astype(np.int32),
        target=(np.arange(c.most) == record["answer"]).astype(np.float32), rows=np.array(1, np.float32),
    )  # fmt: skip


def totals(batch: DeviceBatch) -> dict[str, jax.Array]:
    return {"questions": batch["rows"].sum()}


def logits(
    c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Computes `[B, N]` in float32, very low where there is no choice, and what the model adds to the loss `[B]`."""
    body, head = (None, None) if key is None else jax.random.split(key)
    B, N, T = batch["tokens"].shape
    flat = DeviceBatch(
        tokens=batch["tokens"].reshape(B * N, T), types=batch["types"].reshape(B * N, T),
        segments=batch["segments"].reshape(B * N, T), positions=batch["positions"].reshape(B * N, T),
        at=batch["at"].reshape(B * N),
    )  # fmt: skip
    out = classify.states(model, params, flat, body)
    x_BD = dropout(classify.summary(model, params, flat, out)[:, 0], c.dropout, head)
    z_B1 = classify.linear(model, params["choice"], x_BD)
    z_BN = _split(model, (z_B1 + params["choice_bias"][None] if c.bias else z_B1)[:, 0], N)
    aux_B = None if out.aux_B is None else _split(model, out.aux_B, N).mean(-1)
    return jnp.where(batch["choice_mask"] > 0, z_BN, -1e9), aux_B


def _split(model: Model, x: jax.Array, N: int) -> jax.Array:
    """Reshapes `[B N]` to `[B, N]`, unsharded first: a dimension that is sharded can't be split in two."""
    return model.shard(model.shard(x, None).reshape(-1, N), "batch", None)


def loss(c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> Sums:
    z_BN, aux_B = logits(c, model, params, batch, key)
    return {"questions": classify.sums(batch["rows"], aux_B, *classify.single(z_BN, batch["target"]))}


def outputs(c: Config, model: Model, params: Any, batch: DeviceBatch) -> Predicted:
    """Returns one place a question, which chooses among its answers."""
    return Predicted(logits(c, model, params, batch, None)[0][:, None], batch["rows"][:, None])


def predict(c: Config, model: Model, params: Any, batch: DeviceBatch) -> jax.Array:
    """Returns the number that each choice gets, `[B, N]`."""
    return logits(c, model, params, batch, None)[0]


def answers(c: Config, records: Sequence[Question], predictions: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Returns true and predicted numbers of choices, from 0."""
    return [record["answer"] for record in records], [int(np.argmax(z)) for z in predictions]


def unlabelled(c: Config, lines: Sequence[tables.Row], row: RowShape, tokenizer: Tokenizer) -> list[Question]:
    """Returns questions as tokens without an answer."""
    names = choices.Names(c.context, c.choices, c.answer)
    return _records(c, [choices.choice(line, names, c.first, labelled=False) for line in lines], row, tokenizer)[0]


def told(c: Config, records: Sequence[Question], predictions: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Returns the `choice`, by its number as the data counts, and the `probabilities` of all in their order."""
    each = [classify.softmax(z[: len(r["texts"])]) for r, z in zip(records, predictions, strict=True)]
    return [{"choice": int(np.argmax(p)) + c.first, "probabilities": [float(x) for x in p]} for p in each]


def head_logits(c: Config, model: Model, params: Any, batch: DeviceBatch) -> jax.Array:
    """Computes the number that each plain row gets as the only choice of a question, `[B, 1]`."""
    rows: dict[str, Any] = {"types": jnp.zeros_like(batch["tokens"]), **batch}
    one = {name: x[:, None] for name, x in rows.items()} | {"choice_mask": jnp.ones_like(batch["tokens"][:, :1])}
    return logits(c, model, params, cast(DeviceBatch, one), None)[0]


def fit(c: Config, lines: Sequence[tables.Row]) -> Config:
    """Returns the settings for as many choices as the inputs have."""
    names = choices.Names(c.context, c.choices, c.answer)
    return replace(c, most=max(len(choices.choice(line, names, c.first, labelled=False).choices) for line in lines))


use = Use[Config](classify.rows, lambda c: "", unlabelled, told, fit)
head = TaskHead[Config](
    "MultipleChoice", "choice", head_logits, lambda out: Config(), lambda c: Outputs(("LABEL_0", "LABEL_1")),
    lambda c, bias: replace(c, bias=bias) if c.bias is None else c,
)  # fmt: skip
objective = Objective(
    Config, ExampleReader(read, token_ids), ("encoder", "decoder"), example=example, totals=totals, loss=loss,
    specs=specs, check=check, infer_from_data=infer_from_data, target_positions=no_tokens, padding="trim",
    prediction=Prediction(predict, answers, "choices", use), head=head, outputs=outputs,
)  # fmt: skip
