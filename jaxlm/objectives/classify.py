"""Classification gives a text or a pair of texts one label, several at once, or a number.

An encoder is read at its first token or at the mean of all (through its pooler or task layer where it has one), a
decoder at its last token. B rows, T positions, D model width, L labels.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.ranges import BelowOne, NonNegative
from jaxlm.core.spec import Spec, bias, normal
from jaxlm.data.labelled import check_labels, make_split, tables
from jaxlm.models.model import Model
from jaxlm.nn.family import Outputs
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
    TaskHead,
    Tokenizer,
    Use,
    no_tokens,
)  # fmt: skip
from jaxlm.objectives.outputs import Predicted


@dataclass(frozen=True)
class Config:
    kind: Literal["single", "multi", "regression"] = "single"
    """One label of each text; any number of them (cells with commas between, or lists); a number."""
    labels: tuple[str, ...] = ()
    """In the order of the head's rows; empty: those of the training data, by name."""
    text: str = "text"
    """Column of CSV, TSV, JSON and TFDS tables."""
    text2: str = ""
    """Column of the second text of a pair; empty: single texts."""
    label: str = "label"
    columns: tuple[str, ...] = ()
    """Names of the columns of a CSV or TSV file whose first line is no header."""
    dropout: BelowOne = 0.1
    """Before the head."""
    bias: bool | None = None
    """The head has a bias; None: as published heads of the model's family, or yes where there are none."""
    bos: bool = False
    """A decoder reads BOS before every text, also where its tokenizer puts none there, as earlier runs do."""
    label_smoothing: BelowOne = 0.0
    class_weights: tuple[NonNegative, ...] = ()
    """How much each label counts, in the order of `labels`; empty: all the same."""


class Text(Record):
    """A record is a text, or a pair of texts, as tokens."""

    ids: list[int]
    types: list[int]
    """Number of the text that each token belongs to."""
    target: np.ndarray
    """float32 [L], 1 at its labels, or [1], the number."""


def infer_from_data(c: Config, sources: Sequence[str]) -> Config:
    """Takes the labels of the training data where none are set."""
    if c.labels or c.kind == "regression":
        return c
    labels = {label for source in sources for line in tables.read(source, c.columns) for label in _labels(c, line)}
    return replace(c, labels=tuple(sorted(labels)))


def _labels(c: Config, line: tables.Row) -> tuple[str, ...]:
    if c.kind == "single":
        return (line.label(c.label, "objective.label"),)
    if isinstance(line.cells.get(c.label), list):
        return line.words(c.label, "objective.label")
    return tuple(part.strip() for part in line.label(c.label, "objective.label").split(",") if part.strip())


def outputs(c: Config) -> int:
    """Returns how many numbers the head gives for a text."""
    return 1 if c.kind == "regression" else len(c.labels)


def specs(c: Config, width: int) -> dict[str, Spec]:
    n = outputs(c)
    head = dict(classify=Spec((width, n), ("embed", None), normal(0.02)))
    return head if c.bias is False else head | dict(classify_bias=bias(n))


def check(c: Config, tokenizer: Tokenizer) -> None:
    if c.class_weights and (c.kind == "regression" or len(c.class_weights) != len(c.labels)):
        raise ValueError(f"objective.class_weights: {len(c.class_weights)} weights for {len(c.labels)} labels")
    if c.label_smoothing and c.kind != "single":
        raise ValueError("objective.label_smoothing: is for kind=single; set it to 0")
    if c.kind == "single" and len(c.labels) < 2:
        raise ValueError(f"objective.labels: {len(c.labels)} labels leave nothing to tell apart")


def read(c: Config, source: str, row: RowShape, tokenizer: Tokenizer) -> tuple[list[Text], list[str]]:
    """Returns texts as tokens with their targets, and what a user should know of them."""
    lines = make_split(source, tables.read(source, c.columns)).examples
    if c.kind != "regression":
        labels = ((line.where, label) for line in lines for label in _labels(c, line))
        check_labels(labels, c.labels, "objective.labels")
    records, cut = _records(c, lines, [_target(c, line) for line in lines], row, tokenizer)
    note = f"{source}: {cut:,} of {len(records):,} texts lose their end; raise train.seq_len to keep it"
    return records, [note] if cut else []


def _records(
    c: Config, lines: Sequence[tables.Row], targets: Sequence[np.ndarray], row: RowShape, tokenizer: Tokenizer
) -> tuple[list[Text], int]:
    """Returns texts as tokens, and how many of them lose their end."""
    texts = [[line.text(name, f"objective.{field}") for line in lines]
             for name, field in ((c.text, "text"), (c.text2, "text2")) if name]  # fmt: skip
    encoded = [tokenizer.encode_batch(several) for several in texts]
    records, cut = [], 0
    for line, target, *parts in zip(lines, targets, *encoded, strict=True):
        ids, types, whole = joined([list(part) for part in parts], row, marks(tokenizer, row.kind, c.bos))
        cut += not whole
        if not ids:
            raise ValueError(f"{line.where}: a text without tokens; remove it")
        records.append(Text(ids=ids, types=types, target=target, where=line.where))
    return records, cut


def _target(c: Config, line: tables.Row) -> np.ndarray:
    if c.kind == "regression":
        text = line.label(c.label, "objective.label")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{line.where}: {c.label} is {text!r}, where a number is due")
        return np.array([number], np.float32)
    return np.isin(c.labels, _labels(c, line)).astype(np.float32)


def marks(tokenizer: Tokenizer, kind: Kind, bos: bool = True) -> tuple[list[int], list[int], list[int]]:
    """Returns the ids that stand before a text, between two texts, and at the end. A decoder's are BOS with `bos`, else
    what its tokenizer puts there."""
    if kind == "encoder":
        first = tokenizer.bos_id if tokenizer.cls_id is None else tokenizer.cls_id
        sep = tokenizer.eos_id if tokenizer.sep_id is None else tokenizer.sep_id
        twice = tokenizer.piece(first) == "<s>"  # RoBERTa separates two texts by two of them
        return [first], [sep] * (2 if twice else 1), [sep]
    if bos:
        return [tokenizer.bos_id], [tokenizer.eos_id], []
    before, after = tokenizer.boundary_ids
    return before, [tokenizer.eos_id], after


def joined(
    parts: list[list[int]], row: RowShape, marks: tuple[list[int], list[int], list[int]]
) -> tuple[list[int], list[int], bool]:
    """Returns ids with their `marks`, the number of the text each belongs to, and whether all fits. A pair's longer
    text loses its end."""
    first, between, last = marks
    room = row.seq_len - len(first) - len(last) - (len(between) if len(parts) > 1 else 0)
    whole = sum(map(len, parts)) <= room
    while sum(map(len, parts)) > room:
        max(parts, key=len).pop()
    ids, types = [*first, *parts[0]], [0] * (len(first) + len(parts[0]))
    if len(parts) > 1:
        ids, types = [*ids, *between, *parts[1]], [*types, *[0] * len(between), *[1] * len(parts[1])]
    return [*ids, *last], [*types, *[types[-1] if len(parts) > 1 else 0] * len(last)], whole


def example(c: Config, record: Text, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    weight = record["target"] @ np.array(c.class_weights, np.float32) if c.class_weights and c.kind == "single" else 1.0
    at = 0 if row.kind == "encoder" else len(record["ids"]) - 1
    out = padded(record["ids"], record["types"], row, tokenizer)
    return out | Example(at=np.array(at, np.int32), target=record["target"], rows=np.array(weight, np.float32))


def padded(ids: list[int], types: list[int], row: RowShape, tokenizer: Tokenizer) -> Example:
    """Makes a row that holds one text and padding."""
    n, rest = len(ids), row.seq_len - len(ids)
    return Example(
        tokens=np.array([*ids, *[tokenizer.pad_id or 0] * rest], np.int32),
        types=np.array([*types, *[0] * rest], np.int32),
        segments=(np.arange(row.seq_len) < n).astype(np.int32),
        positions=np.array([*range(n), *[0] * rest], np.int32),
    )


def totals(batch: DeviceBatch) -> dict[str, jax.Array]:
    return {"texts": batch["rows"].sum()}


# B rows, K texts that share a row (1 where each row is one text), N = B · K texts of a batch.


def logits(c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> tuple[jax.Array, Output]:
    """Computes the head's outputs of each text `[N, L]` in float32, and the model's."""
    body, head = (None, None) if key is None else jax.random.split(key)
    out = states(model, params, batch, body)
    x_BKD = summary(model, params, batch, out)
    z_NL = linear(model, params["classify"], dropout(by_text(model, x_BKD), c.dropout, head))
    return z_NL if c.bias is False else z_NL + params["classify_bias"][None], out


def by_text(model: Model, x: jax.Array) -> jax.Array:
    """Returns `[N, …]`, one for each text, of `[B, K, …]`."""
    return model.shard(x.reshape(-1, *x.shape[2:]), "batch", *[None] * (x.ndim - 2))


def by_row(model: Model, x: jax.Array, batch: DeviceBatch) -> jax.Array:
    """Returns `[B, K, …]`, the texts of each row, of `[N, …]`."""
    rows = batch["rows"]
    places = 1 if rows.ndim == 1 else rows.shape[1]
    if places == 1:
        return x[:, None]
    # unsharded first: a dimension that is sharded can't be split in two
    x = model.shard(x, *[None] * x.ndim).reshape(-1, places, *x.shape[1:])
    return model.shard(x, "batch", *[None] * (x.ndim - 1))


def weights_by_row(batch: DeviceBatch) -> jax.Array:
    """Returns the weights of texts, `[B, K]`."""
    return batch["rows"].reshape(len(batch["rows"]), -1)


def states(model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> Output:
    """Runs the model, which reads the text a token belongs to if it has such types."""
    inputs = batch if model.config.types > 1 else {k: v for k, v in batch.items() if k != "types"}
    return model.forward(params, inputs, key=key)


def summary(model: Model, params: Any, batch: DeviceBatch, out: Output) -> jax.Array:
    """Returns `[B, K, D]`, the state where each text is read, or the mean of its states, as heads read it."""
    at_BK = batch["at"].reshape(len(batch["at"]), -1)
    if not model.config.mean_pooling:
        return model.task_states(params, states_at(model, out.x_BTD, at_BK))
    x_BTD, segments_BT = model.shard(out.x_BTD, "batch", None, None), model.shard(batch["segments"], "batch", None)
    w_BKT = (segments_BT[:, None] == 1 + jnp.arange(at_BK.shape[1])[None, :, None]).astype(jnp.float32)
    sum_BKD = jnp.einsum("bkt,btd->bkd", w_BKT, x_BTD.astype(jnp.float32), precision="highest")
    return model.task_states(params, (sum_BKD / jnp.maximum(w_BKT.sum(2), 1)[..., None]).astype(x_BTD.dtype))


def token_states(model: Model, params: Any, out: Output) -> jax.Array:
    """Returns `[B, T, D]`, the states of all tokens as heads read them."""
    layer = model.config.task_layer
    return model.task_states(params, out.x_BTD, "seq") if layer is not None and layer.each else out.x_BTD


def states_at(model: Model, x_BTD: jax.Array, at_BN: jax.Array) -> jax.Array:
    """Returns `[B, N, D]`, the states at N positions of each row."""
    x_BTD, at_BN = model.shard(x_BTD, "batch", None, None), model.shard(at_BN, "batch", None)
    return jnp.take_along_axis(x_BTD, at_BN[..., None], axis=1)


def linear(model: Model, w_DL: jax.Array, x: jax.Array) -> jax.Array:
    """Multiplies states `[B, D]` or `[B, T, D]` with a head's weights, in float32: two texts that differ little would
    get the same of the few numbers that bfloat16 has."""
    w_DL, x = model.shard(w_DL.astype(jnp.float32), None, None), x.astype(jnp.float32)
    if x.ndim == 2:
        return model.shard.einsum("bd,dl->bl", x, w_DL, "batch", None)
    return model.shard.einsum("btd,dl->btl", x, w_DL, "batch", "seq", None)


def loss(c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> Sums:
    z_NL, out = logits(c, model, params, batch, key)
    y_NL, right_N = batch["target"].reshape(z_NL.shape), None
    if c.kind == "single":
        loss_N, right_N = single(z_NL, y_NL, c.label_smoothing)
    elif c.kind == "multi":
        each_NL = -y_NL * jax.nn.log_sigmoid(z_NL) - (1 - y_NL) * jax.nn.log_sigmoid(-z_NL)
        scale_L = jnp.asarray(c.class_weights or (1.0,) * len(c.labels), jnp.float32)
        loss_N = (each_NL * scale_L[None]).mean(-1)
        right_N = ((z_NL > 0) == (y_NL > 0)).all(-1)
    else:
        loss_N = jnp.square(z_NL - y_NL).mean(-1)
    return {"texts": sums(batch["rows"], out.aux_B, loss_N, right_N)}


def single(z_NL: jax.Array, y_NL: jax.Array, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Computes the cross-entropy of each text, and whether the likeliest label is right; `y_NL` is one at its label."""
    log_NL = jax.nn.log_softmax(z_NL, -1)
    loss_N = -(1 - smoothing) * (y_NL * log_NL).sum(-1) - smoothing * log_NL.mean(-1)
    return loss_N, z_NL.argmax(-1) == y_NL.argmax(-1)


def sums(
    rows: jax.Array, aux_B: jax.Array | None, loss_N: jax.Array, right_N: jax.Array | None
) -> dict[str, jax.Array]:
    """Sums over texts, by their weights `[B]` or `[B, K]`. `aux_B`: what the model adds to the loss of each row's."""
    rows_N = rows.reshape(-1)
    values = dict(loss=(loss_N * rows_N).sum())
    if right_N is not None:
        values["accuracy"] = (right_N * rows_N).sum()
    if aux_B is not None:
        values["aux"] = (aux_B * rows.reshape(len(aux_B), -1).sum(1)).sum()
        values["loss"] += values["aux"]
    return values


def all_outputs(c: Config, model: Model, params: Any, batch: DeviceBatch) -> Predicted:
    """Returns the head's outputs, one place a text."""
    kinds: dict[str, Literal["softmax", "sigmoid", "value"]] = {
        "single": "softmax", "multi": "sigmoid", "regression": "value"
    }  # fmt: skip
    return Predicted(predict(c, model, params, batch), weights_by_row(batch), kinds[c.kind])


def predict(c: Config, model: Model, params: Any, batch: DeviceBatch) -> jax.Array:
    """Returns the head's outputs `[B, K, L]`."""
    return by_row(model, logits(c, model, params, batch, None)[0], batch)


def answers(c: Config, records: Sequence[Text], predictions: Sequence[np.ndarray]) -> tuple[list[Any], list[Any]]:
    """Returns true and predicted labels, lists of labels, or numbers."""
    targets = [record["target"] for record in records]
    if c.kind == "regression":
        return [float(y[0]) for y in targets], [float(z[0]) for z in predictions]
    if c.kind == "single":
        return [c.labels[int(np.argmax(y))] for y in targets], [c.labels[int(np.argmax(z))] for z in predictions]

    def labels(values: np.ndarray) -> list[str]:
        return [label for label, is_on in zip(c.labels, values > 0, strict=True) if is_on]

    return [labels(y) for y in targets], [labels(z) for z in predictions]


def unlabelled(c: Config, lines: Sequence[tables.Row], row: RowShape, tokenizer: Tokenizer) -> list[Text]:
    """Returns texts as tokens without a label."""
    return _records(c, lines, [np.zeros(outputs(c), np.float32)] * len(lines), row, tokenizer)[0]


def told(c: Config, records: Sequence[Text], predictions: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Returns `label` or `labels` with the `probabilities` of all, or the `value` of a regression."""
    if c.kind == "regression":
        return [{"value": float(z[0])} for z in predictions]
    _, found = answers(c, records, predictions)
    if c.kind == "multi":
        each = [1 / (1 + np.exp(-z.astype(np.float64))) for z in predictions]
        return [{"labels": a, "probabilities": named(c.labels, p)} for a, p in zip(found, each, strict=True)]
    return [{"label": a, "probabilities": named(c.labels, softmax(z))} for a, z in zip(found, predictions, strict=True)]


def softmax(z: np.ndarray) -> np.ndarray:
    """Returns the probabilities of log odds `[L]`."""
    p = np.exp(z.astype(np.float64) - z.max())
    return p / p.sum()


def named(labels: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Returns values by their labels."""
    return dict(zip(labels, map(float, values), strict=True))


def rows(c: Any, source: str) -> Iterable[tables.Row]:
    """Yields the rows of a table."""
    return tables.read(source, c.columns)


PROBLEMS = dict(single="single_label_classification", multi="multi_label_classification", regression="regression")


def fit(c: Config, lines: Sequence[tables.Row]) -> Config:
    """Returns the settings that read pairs where the inputs have a `text2`."""
    return replace(c, text2="text2") if any("text2" in line.cells for line in lines) else c


def read_outputs(out: Outputs) -> Config:
    """Returns the settings of a published head. As transformers has it, one output is a regression if config.json names
    no other problem."""
    usual = "regression" if len(out.labels) == 1 else PROBLEMS["single"]
    kind = next((ours for ours, theirs in PROBLEMS.items() if theirs == (out.problem_type or usual)), None)
    if kind is None:
        raise ValueError(f"problem_type {out.problem_type!r} is unknown; known: {', '.join(PROBLEMS.values())}")
    if kind == "regression":
        if len(out.labels) > 1:
            raise ValueError(f"a regression with {len(out.labels)} outputs is not read, only one number")
        return Config(kind="regression")
    return Config(kind=kind, labels=out.labels)  # type: ignore[arg-type]


use = Use[Config](rows, lambda c: "" if c.text2 else c.text, unlabelled, told, fit)
head = TaskHead[Config](
    "SequenceClassification", "classify", lambda c, model, params, batch: logits(c, model, params, batch, None)[0],
    read_outputs, lambda c: Outputs(("LABEL_0",) if c.kind == "regression" else c.labels, PROBLEMS[c.kind]),
    lambda c, bias: replace(c, bias=bias) if c.bias is None else c, lambda c, labels: replace(c, labels=labels),
)  # fmt: skip
objective = Objective(
    Config, ExampleReader(read), ("encoder", "decoder"), example=example, totals=totals, loss=loss, specs=specs,
    check=check, infer_from_data=infer_from_data, target_positions=no_tokens, padding="pack",
    prediction=Prediction(predict, answers, "classes", use, of="text"), head=head, outputs=all_outputs,
)  # fmt: skip
