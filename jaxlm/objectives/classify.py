"""Classification of texts and of pairs of texts: one label, several at once, or a number.

An encoder is read at its first token (through its pooler where it has one), a decoder at its last. B rows, T positions,
D model width, L labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.spec import Spec, bias, normal
from jaxlm.data.labelled import check_labels, split, tables
from jaxlm.models.model import Model
from jaxlm.nn.layers import dropout

records = "examples"
models = ("encoder", "decoder")
trims = True
scores = "classes"


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
    dropout: float = 0.1
    """Before the head."""
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    """How much each label counts, in the order of `labels`; empty: all the same."""


def settle(c: Config, sources: Sequence[str]) -> Config:
    """With the labels of the training data where none are given."""
    if c.labels or c.kind == "regression":
        return c
    found = {label for source in sources for row in tables.read(source, c.columns) for label in _labels(c, row)}
    return replace(c, labels=tuple(sorted(found)))


def _labels(c: Config, row: tables.Row) -> tuple[str, ...]:
    if c.kind == "single":
        return (row.text(c.label, "objective.label"),)
    if isinstance(row.cells.get(c.label), list):
        return row.words(c.label, "objective.label")
    return tuple(part.strip() for part in row.text(c.label, "objective.label").split(",") if part.strip())


def outputs(c: Config) -> int:
    return 1 if c.kind == "regression" else len(c.labels)


def specs(c: Config, width: int) -> dict[str, Any]:
    n = outputs(c)
    return dict(classify=Spec((width, n), ("embed", None), normal(0.02)), classify_bias=bias(n))


def check(c: Config, tokenizer: Any) -> None:
    if c.class_weights and (c.kind == "regression" or len(c.class_weights) != len(c.labels)):
        raise ValueError(f"objective.class_weights: {len(c.class_weights)} weights for {len(c.labels)} labels")
    if c.label_smoothing and c.kind != "single":
        raise ValueError("objective.label_smoothing: is for kind=single; set it to 0")
    if c.kind == "single" and len(c.labels) < 2:
        raise ValueError(f"objective.labels: {len(c.labels)} labels leave nothing to tell apart")


def read(c: Config, source: str, tokenizer: Any, row: dict) -> tuple[list[dict], list[str]]:
    """(texts as tokens with their targets, what a user should know of them)."""
    rows = split(source, tables.read(source, c.columns)).examples
    texts = [[r.text(name, f"objective.{field}") for r in rows]
             for name, field in ((c.text, "text"), (c.text2, "text2")) if name]  # fmt: skip
    encoded = [tokenizer.encode_batch(several) for several in texts]
    if c.kind != "regression":
        check_labels(((r.where, label) for r in rows for label in _labels(c, r)), c.labels, "objective.labels")
    items, cut = [], 0
    for r, *parts in zip(rows, *encoded, strict=True):
        ids, types, whole = joined([list(part) for part in parts], tokenizer, row)
        cut += not whole
        items.append(dict(ids=ids, types=types, target=_target(c, r), where=r.where))
    note = f"{source}: {cut:,} of {len(items):,} texts lose their end; raise train.seq_len to keep it"
    return items, [note] if cut else []


def _target(c: Config, row: tables.Row) -> np.ndarray:
    if c.kind == "regression":
        text = row.text(c.label, "objective.label")
        try:
            return np.array([float(text)], np.float32)
        except ValueError:
            raise ValueError(f"{row.where}: {c.label} is {text!r}, where a number is due") from None
    return np.isin(c.labels, _labels(c, row)).astype(np.float32)


def marks(tokenizer: Any, kind: str) -> tuple[list[int], list[int], list[int]]:
    """What stands before a text, between two of them, and at the end."""
    if kind == "encoder":
        first = tokenizer.bos_id if tokenizer.cls_id is None else tokenizer.cls_id
        sep = tokenizer.eos_id if tokenizer.sep_id is None else tokenizer.sep_id
        twice = tokenizer.piece(first) == "<s>"  # RoBERTa separates two texts by two of them
        return [first], [sep] * (2 if twice else 1), [sep]
    return [tokenizer.bos_id], [tokenizer.eos_id], []


def joined(parts: list[list[int]], tokenizer: Any, row: dict) -> tuple[list[int], list[int], bool]:
    """(ids, number of the text each belongs to, whether all fits). Of a pair the longer one loses its end first."""
    first, between, last = marks(tokenizer, row["kind"])
    room = row["seq_len"] - len(first) - len(last) - (len(between) if len(parts) > 1 else 0)
    whole = sum(map(len, parts)) <= room
    while sum(map(len, parts)) > room:
        max(parts, key=len).pop()
    ids, types = [*first, *parts[0]], [0] * (len(first) + len(parts[0]))
    if len(parts) > 1:
        ids, types = [*ids, *between, *parts[1]], [*types, *[0] * len(between), *[1] * len(parts[1])]
    return [*ids, *last], [*types, *[types[-1] if len(parts) > 1 else 0] * len(last)], whole


def example(c: Config, record: dict, tokenizer: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    weight = record["target"] @ np.array(c.class_weights, np.float32) if c.class_weights and c.kind == "single" else 1.0
    at = 0 if record["kind"] == "encoder" else len(record["ids"]) - 1
    return padded(record, tokenizer) | dict(at=np.int32(at), target=record["target"], rows=np.float32(weight))


def padded(record: dict, tokenizer: Any) -> dict[str, np.ndarray]:
    """A text alone in its row."""
    out = {name: np.zeros(record["seq_len"], np.int32) for name in ("tokens", "types", "segments", "positions")}
    n = len(record["ids"])
    out["tokens"][:n], out["types"][:n] = record["ids"], record["types"]
    out["tokens"][n:] = tokenizer.pad_id or 0
    out["segments"][:n], out["positions"][:n] = 1, np.arange(n)
    return out


def weights(batch: dict) -> dict[str, jax.Array]:
    return {"texts": batch["rows"].sum()}


def logits(c: Config, model: Model, params: Any, batch: dict, key: jax.Array | None) -> tuple[jax.Array, Any]:
    """`[B, L]` in float32, and the model's output."""
    body, head = (None, None) if key is None else jax.random.split(key)
    out = states(model, params, batch, body)
    z_BL = linear(model, params["classify"], dropout(summary(model, params, batch, out), c.dropout, head))
    return z_BL + params["classify_bias"][None], out


def states(model: Model, params: Any, batch: dict, key: jax.Array | None) -> Any:
    """The model's output, told which text a token belongs to if it can be."""
    given = batch if model.config.types > 1 else {k: v for k, v in batch.items() if k != "types"}
    return model.forward(params, given, key=key)


def summary(model: Model, params: Any, batch: dict, out: Any) -> jax.Array:
    """`[B, D]`: what the model makes of each row, where it is read."""
    if model.config.pooler:
        return model.pooled(params, out.x_BTD)
    return at_places(model, out.x_BTD, batch["at"][:, None])[:, 0]


def at_places(model: Model, x_BTD: jax.Array, at_BN: jax.Array) -> jax.Array:
    """`[B, N, D]`: the states at N places of each row."""
    x_BTD, at_BN = model.shard(x_BTD, "batch", None, None), model.shard(at_BN, "batch", None)
    return jnp.take_along_axis(x_BTD, at_BN[..., None], axis=1)


def linear(model: Model, w_DL: jax.Array, x_BD: jax.Array) -> jax.Array:
    """`[B, L]` in float32."""
    w_DL = model.shard(w_DL.astype(x_BD.dtype), None, None)
    return model.shard.einsum("bd,dl->bl", x_BD, w_DL, "batch", None).astype(jnp.float32)


def loss(c: Config, model: Model, params: Any, batch: dict, key: jax.Array | None) -> dict[str, dict[str, jax.Array]]:
    z_BL, out = logits(c, model, params, batch, key)
    y_BL, right_B = batch["target"], None
    if c.kind == "single":
        loss_B, right_B = single(z_BL, y_BL, c.label_smoothing)
    elif c.kind == "multi":
        each_BL = -y_BL * jax.nn.log_sigmoid(z_BL) - (1 - y_BL) * jax.nn.log_sigmoid(-z_BL)
        scale_L = jnp.asarray(c.class_weights or (1.0,) * len(c.labels), jnp.float32)
        loss_B = (each_BL * scale_L[None]).mean(-1)
        right_B = ((z_BL > 0) == (y_BL > 0)).all(-1)
    else:
        loss_B = jnp.square(z_BL - y_BL).mean(-1)
    return {"texts": sums(batch["rows"], out.aux_B, loss_B, right_B)}


def single(z_BL: jax.Array, y_BL: jax.Array, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """(cross-entropy, whether the likeliest label is right) of each row; `y_BL` is one at its label."""
    log_BL = jax.nn.log_softmax(z_BL, -1)
    loss_B = -(1 - smoothing) * (y_BL * log_BL).sum(-1) - smoothing * log_BL.mean(-1)
    return loss_B, z_BL.argmax(-1) == y_BL.argmax(-1)


def sums(
    rows_B: jax.Array, aux_B: jax.Array | None, loss_B: jax.Array, right_B: jax.Array | None
) -> dict[str, jax.Array]:
    """Over rows, by their weights. `aux_B`: what the model adds to the loss."""
    values = dict(loss=(loss_B * rows_B).sum())
    if right_B is not None:
        values["accuracy"] = (right_B * rows_B).sum()
    if aux_B is not None:
        values["aux"] = (aux_B * rows_B).sum()
        values["loss"] += values["aux"]
    return values


def predict(c: Config, model: Model, params: Any, batch: dict) -> jax.Array:
    """`[B, L]`: the head's outputs."""
    return logits(c, model, params, batch, None)[0]


def answers(c: Config, items: Sequence[dict], found: Sequence[np.ndarray]) -> tuple[list[Any], list[Any]]:
    """(true, predicted): labels, lists of labels, or numbers."""
    pairs = [(item["target"], z) for item, z in zip(items, found, strict=True)]
    if c.kind == "regression":
        return [float(y[0]) for y, _ in pairs], [float(z[0]) for _, z in pairs]
    if c.kind == "single":
        return [c.labels[int(np.argmax(y))] for y, _ in pairs], [c.labels[int(np.argmax(z))] for _, z in pairs]
    told = lambda row: [label for label, on in zip(c.labels, row > 0, strict=True) if on]  # noqa: E731
    return [told(y) for y, _ in pairs], [told(z) for _, z in pairs]
