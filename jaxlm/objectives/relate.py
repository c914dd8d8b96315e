"""How two entities of a text are related: marks around both, read where each begins (Baldini Soares et al. 2019).

B rows, T positions, D model width, L labels.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.ranges import BelowOne
from jaxlm.core.spec import Spec, bias, normal
from jaxlm.data.labelled import Related, Split, check_labels, relations, tables
from jaxlm.models.model import Model
from jaxlm.nn.layers import Output, dropout
from jaxlm.objectives import classify
from jaxlm.objectives.objective import (
    DeviceBatch,
    Example,
    ExampleReader,
    Objective,
    Prediction,
    RowShape,
    Sums,
    Tokenizer,
    Use,
    no_tokens,
)  # fmt: skip
from jaxlm.objectives.outputs import Predicted

# Names that the field has for no relation.
NEGATIVE = ("other", "no_relation", "na", "none")


@dataclass(frozen=True)
class Config:
    labels: tuple[str, ...] = ()
    """In the order of the head's rows; empty: those of the training data, by name."""
    negative: str | None = None
    """The label of entities that aren't related, which F1 leaves out; None: Other, no_relation, NA or none if the
    labels have it; empty: there is none."""
    text: str = "text"
    """Column of CSV, TSV, JSON and TFDS tables; texts have <e1>, </e1>, <e2>, </e2> in them, or `head` and `tail`."""
    head: str = "head"
    """Column of the first entity: [first character, after the last], of words where texts are lists of words."""
    tail: str = "tail"
    label: str = "label"
    columns: tuple[str, ...] = ()
    """Names of the columns of a CSV or TSV file whose first line is no header."""
    markers: tuple[str, ...] = ()
    """Four pieces of the tokenizer to stand around the two entities; empty: its unused ones ([unused0] …), else the
    texts @ and #."""
    dropout: BelowOne = 0.1
    """Before the head."""
    label_smoothing: BelowOne = 0.0


def _related(c: Config, source: str) -> Split:
    return relations.read(source, relations.Names(c.text, c.head, c.tail, c.label), c.columns)


class MarkedText(classify.Text):
    at: np.ndarray
    """int32 [2]: where the two entities begin."""


def infer_from_data(c: Config, sources: Sequence[str]) -> Config:
    """Takes the labels of the training data, and the one of these that means no relation."""
    labels = c.labels or tuple(sorted({e.label for source in sources for e in _related(c, source).examples}))
    negative = c.negative
    if negative is None:
        negative = next((label for label in labels if label.casefold() in NEGATIVE), "")
    return replace(c, labels=labels, negative=negative)


def specs(c: Config, width: int) -> dict[str, Spec]:
    n = len(c.labels)
    return dict(relate=Spec((2 * width, n), ("embed", None), normal(0.02)), relate_bias=bias(n))


def check(c: Config, tokenizer: Tokenizer) -> None:
    if len(c.labels) < 2:
        raise ValueError(f"objective.labels: {len(c.labels)} labels leave nothing to tell apart")
    if c.negative and c.negative not in c.labels:
        raise ValueError(f"objective.negative: {c.negative!r} is none of the labels {', '.join(c.labels)}")
    marks(c, tokenizer)


def marks(c: Config, tokenizer: Tokenizer) -> tuple[list[list[int]], str]:
    """Returns the ids that stand before and after the first entity and the second, and how a user calls them."""
    if c.markers:
        if len(c.markers) != 4:
            raise ValueError(f"objective.markers: {len(c.markers)} pieces, where 4 are due")
        ids = [tokenizer.id_of(piece) for piece in c.markers]
        if None in ids:
            missing = c.markers[ids.index(None)]
            raise ValueError(f"objective.markers: the tokenizer has no piece {missing!r}; name others, or none")
        return [[id] for id in ids if id is not None], " ".join(c.markers)
    unused = [piece for i in range(100) for piece in (f"[unused{i}]", f"<unused{i}>") if tokenizer.id_of(piece)][:4]
    if len(unused) == 4:
        return marks(replace(c, markers=tuple(unused)), tokenizer)
    return [tokenizer.encode(text) for text in (" @", " @", " #", " #")], "the texts @ and #"


def read(c: Config, source: str, row: RowShape, tokenizer: Tokenizer) -> tuple[list[MarkedText], list[str]]:
    """Returns marked texts as tokens with the positions of their entities, and what a user should know of them."""
    examples = _related(c, source).examples
    check_labels(((e.where, e.label) for e in examples), c.labels, "objective.labels")
    records, cut = _records(c, examples, row, tokenizer)
    notes = [f"{source}: entities stand between {marks(c, tokenizer)[1]}"]
    if cut:
        notes.append(f"{source}: {cut:,} of {len(records):,} texts lose an end; raise train.seq_len to keep it")
    return records, notes


def _records(
    c: Config, examples: Sequence[Related], row: RowShape, tokenizer: Tokenizer
) -> tuple[list[MarkedText], int]:
    """Returns marked texts as tokens, and how many of them lose an end."""
    markers, _ = marks(c, tokenizer)
    first, _, last = classify.marks(tokenizer, row.kind)
    room = row.seq_len - len(first) - len(last)
    parts = [_parts(e) for e in examples]
    encoded = iter(tokenizer.encode_batch([text for pieces, _ in parts for text in pieces]))
    records, cut = [], 0
    for e, (pieces, order) in zip(examples, parts, strict=True):
        ids: list[int] = []
        begins = [0] * 4
        for _, which in zip(pieces, [*order, None], strict=True):
            ids += next(encoded)
            if which is not None:
                begins[which] = len(ids)
                ids += markers[which]
        a, b = begins[0], begins[2]
        if abs(a - b) >= room:
            raise ValueError(
                f"{e.where}: its entities begin {abs(a - b)} tokens apart, too far for train.seq_len "
                f"{row.seq_len}; raise it, or remove the example"
            )
        start = max(0, min((a + b + 1 - room) // 2, len(ids) - room))  # a stretch around both
        cut += len(ids) > room
        ids = [*first, *ids[start : start + room], *last]
        at = np.array([a, b], np.int32) + len(first) - start
        target = np.isin(c.labels, e.label).astype(np.float32)
        records.append(MarkedText(ids=ids, types=[0] * len(ids), at=at, target=target, where=e.where))
    return records, cut


def _parts(e: Related) -> tuple[list[str], list[int]]:
    """Returns the text cut where entities begin and end, and which of the four marks stands at each cut. White space
    begins a piece, as it does a token."""
    bounds = sorted([(e.head[1], 0, 1), (e.tail[1], 0, 3), (e.head[0], 1, 0), (e.tail[0], 1, 2)])
    cuts = [0, *(at for at, _, _ in bounds), len(e.text)]
    pieces = [e.text[a:z] for a, z in itertools.pairwise(cuts)]
    before = ["", *(" " if piece != piece.rstrip() else "" for piece in pieces)]
    return [b + piece.rstrip() for b, piece in zip(before, pieces, strict=False)], [which for *_, which in bounds]


def example(c: Config, record: MarkedText, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    out = classify.padded(record["ids"], record["types"], row, tokenizer)
    return out | Example(at=record["at"], target=record["target"], rows=np.array(1, np.float32))


def totals(batch: DeviceBatch) -> dict[str, jax.Array]:
    return {"pairs": batch["rows"].sum()}


def logits(c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> tuple[jax.Array, Output]:
    """Computes the head's outputs of each text `[N, L]` in float32, and the model's."""
    body, head = (None, None) if key is None else jax.random.split(key)
    out = classify.states(model, params, batch, body)
    at_BK2 = batch["at"] if batch["at"].ndim == 3 else batch["at"][:, None]
    both = [classify.states_at(model, out.x_BTD, at_BK2[..., entity]) for entity in (0, 1)]
    x_ND = classify.by_text(model, jnp.concatenate(both, -1))
    z_NL = classify.linear(model, params["relate"], dropout(x_ND, c.dropout, head))
    return z_NL + params["relate_bias"][None], out


def loss(c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> Sums:
    z_NL, out = logits(c, model, params, batch, key)
    found = classify.single(z_NL, batch["target"].reshape(z_NL.shape), c.label_smoothing)
    return {"pairs": classify.sums(batch["rows"], out.aux_B, *found)}


def outputs(c: Config, model: Model, params: Any, batch: DeviceBatch) -> Predicted:
    """Returns the head's outputs, one place a pair."""
    return Predicted(predict(c, model, params, batch), classify.weights_by_row(batch))


def predict(c: Config, model: Model, params: Any, batch: DeviceBatch) -> jax.Array:
    """Returns the head's outputs `[B, K, L]`."""
    return classify.by_row(model, logits(c, model, params, batch, None)[0], batch)


def answers(c: Config, records: Sequence[MarkedText], predictions: Sequence[np.ndarray]) -> tuple[list[str], list[str]]:
    """Returns true and predicted labels."""
    true = [c.labels[int(np.argmax(record["target"]))] for record in records]
    return true, [c.labels[int(np.argmax(z))] for z in predictions]


def unlabelled(c: Config, lines: Sequence[tables.Row], row: RowShape, tokenizer: Tokenizer) -> list[MarkedText]:
    """Returns marked texts as tokens without a label."""
    names = relations.Names(c.text, c.head, c.tail, c.label)
    return _records(c, [relations.related(line, names, labelled=False) for line in lines], row, tokenizer)[0]


def told(c: Config, records: Sequence[MarkedText], predictions: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Returns the `label` and the `probabilities` of all."""
    each = [classify.softmax(z) for z in predictions]
    return [{"label": c.labels[int(np.argmax(p))], "probabilities": classify.named(c.labels, p)} for p in each]


use = Use[Config](classify.rows, lambda c: c.text, unlabelled, told)
objective = Objective(
    Config, ExampleReader(read), ("encoder",), example=example, totals=totals, loss=loss, specs=specs, check=check,
    infer_from_data=infer_from_data, target_positions=no_tokens, padding="pack",
    outputs=outputs, prediction=Prediction(predict, answers, "relations", use, of="text"),
)  # fmt: skip
