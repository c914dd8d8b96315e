"""How two entities of a text are related: marks around both, read where each begins (Baldini Soares et al. 2019).

B rows, T positions, D model width, L labels.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxlm.core.spec import Spec, bias, normal
from jaxlm.data.labelled import Related, Split, check_labels, relations
from jaxlm.models.model import Model
from jaxlm.nn.layers import dropout
from jaxlm.objectives import classify

records = "examples"
models = ("encoder",)
trims = True
scores = "relations"

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
    dropout: float = 0.1
    """Before the head."""
    label_smoothing: float = 0.0


def _related(c: Config, source: str) -> Split:
    return relations.read(source, relations.Names(c.text, c.head, c.tail, c.label), c.columns)


def settle(c: Config, sources: Sequence[str]) -> Config:
    """With the labels of the training data, and the one of these that stands for no relation."""
    labels = c.labels or tuple(sorted({e.label for source in sources for e in _related(c, source).examples}))
    negative = c.negative
    if negative is None:
        negative = next((label for label in labels if label.casefold() in NEGATIVE), "")
    return replace(c, labels=labels, negative=negative)


def specs(c: Config, width: int) -> dict[str, Any]:
    n = len(c.labels)
    return dict(relate=Spec((2 * width, n), ("embed", None), normal(0.02)), relate_bias=bias(n))


def check(c: Config, tokenizer: Any) -> None:
    if len(c.labels) < 2:
        raise ValueError(f"objective.labels: {len(c.labels)} labels leave nothing to tell apart")
    if c.negative and c.negative not in c.labels:
        raise ValueError(f"objective.negative: {c.negative!r} is none of the labels {', '.join(c.labels)}")
    marks(c, tokenizer)


def marks(c: Config, tokenizer: Any) -> tuple[list[list[int]], str]:
    """(ids that stand before and after the first entity and the second, how a user calls them)."""
    if c.markers:
        if len(c.markers) != 4:
            raise ValueError(f"objective.markers: {len(c.markers)} pieces, where 4 are due")
        if gone := [piece for piece in c.markers if tokenizer.id_of(piece) is None]:
            raise ValueError(f"objective.markers: the tokenizer has no piece {gone[0]!r}; name others, or none")
        return [[tokenizer.id_of(piece)] for piece in c.markers], " ".join(c.markers)
    unused = [piece for i in range(100) for piece in (f"[unused{i}]", f"<unused{i}>") if tokenizer.id_of(piece)][:4]
    if len(unused) == 4:
        return marks(replace(c, markers=tuple(unused)), tokenizer)
    return [tokenizer.encode(text) for text in (" @", " @", " #", " #")], "the texts @ and #"


def read(c: Config, source: str, tokenizer: Any, row: dict) -> tuple[list[dict], list[str]]:
    """(marked texts as tokens with the places of their entities, what a user should know of them)."""
    found = _related(c, source).examples
    check_labels(((e.where, e.label) for e in found), c.labels, "objective.labels")
    around, called = marks(c, tokenizer)
    first, _, last = classify.marks(tokenizer, row["kind"])
    room = row["seq_len"] - len(first) - len(last)
    parts = [_parts(e) for e in found]
    encoded = iter(tokenizer.encode_batch([text for pieces, _ in parts for text in pieces]))
    items, cut = [], 0
    for e, (pieces, order) in zip(found, parts, strict=True):
        ids: list[int] = []
        begins = [0] * 4
        for _, which in zip(pieces, [*order, None], strict=True):
            ids += next(encoded)
            if which is not None:
                begins[which] = len(ids)
                ids += around[which]
        a, b = begins[0], begins[2]
        if abs(a - b) >= room:
            raise ValueError(
                f"{e.where}: its entities begin {abs(a - b)} tokens apart, too far for train.seq_len "
                f"{row['seq_len']}; raise it, or remove the example"
            )
        start = max(0, min((a + b + 1 - room) // 2, len(ids) - room))  # a stretch around both
        cut += len(ids) > room
        ids = [*first, *ids[start : start + room], *last]
        at = np.array([a, b], np.int32) + len(first) - start
        target = np.isin(c.labels, e.label).astype(np.float32)
        items.append(dict(ids=ids, types=[0] * len(ids), at=at, target=target, where=e.where))
    notes = [f"{source}: entities stand between {called}"]
    if cut:
        notes.append(f"{source}: {cut:,} of {len(items):,} texts lose an end; raise train.seq_len to keep it")
    return items, notes


def _parts(e: Related) -> tuple[list[str], list[int]]:
    """The text cut where entities begin and end, and which of the four marks stands at each cut. White space begins
    a piece, as it does a token."""
    places = sorted([(e.head[1], 0, 1), (e.tail[1], 0, 3), (e.head[0], 1, 0), (e.tail[0], 1, 2)])
    cuts = [0, *(place for place, _, _ in places), len(e.text)]
    pieces = [e.text[a:z] for a, z in itertools.pairwise(cuts)]
    before = ["", *(" " if piece != piece.rstrip() else "" for piece in pieces)]
    return [b + piece.rstrip() for b, piece in zip(before, pieces, strict=False)], [which for *_, which in places]


def example(c: Config, record: dict, tokenizer: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    own = dict(at=record["at"], target=record["target"], rows=np.array(1, np.float32))
    return classify.padded(record, tokenizer) | own


def weights(batch: dict) -> dict[str, jax.Array]:
    return {"pairs": batch["rows"].sum()}


def logits(c: Config, model: Model, params: Any, batch: dict, key: jax.Array | None) -> tuple[jax.Array, Any]:
    """`[B, L]` in float32, and the model's output."""
    body, head = (None, None) if key is None else jax.random.split(key)
    out = classify.states(model, params, batch, body)
    x_B2D = classify.at_places(model, out.x_BTD, batch["at"])
    x_BD = dropout(x_B2D.reshape(len(x_B2D), -1), c.dropout, head)
    return classify.linear(model, params["relate"], x_BD) + params["relate_bias"][None], out


def loss(c: Config, model: Model, params: Any, batch: dict, key: jax.Array | None) -> dict[str, dict[str, jax.Array]]:
    z_BL, out = logits(c, model, params, batch, key)
    return {
        "pairs": classify.sums(batch["rows"], out.aux_B, *classify.single(z_BL, batch["target"], c.label_smoothing))
    }


def predict(c: Config, model: Model, params: Any, batch: dict) -> jax.Array:
    """`[B, L]`: the head's outputs."""
    return logits(c, model, params, batch, None)[0]


def answers(c: Config, items: Sequence[dict], found: Sequence[np.ndarray]) -> tuple[list[str], list[str]]:
    """(true, predicted) labels."""
    return [c.labels[int(np.argmax(i["target"]))] for i in items], [c.labels[int(np.argmax(z))] for z in found]
