"""Multiple choice: which of several ways to go on is right (commonsense, reading, exams).

Each choice is read behind its context, in a row of its own, and gets one number; the choices of a question share a
softmax (Radford et al. 2018). B questions, N choices, T positions, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.spec import Spec, normal
from jaxlm.data.labelled import Split, choices
from jaxlm.models.model import Model
from jaxlm.nn.layers import dropout
from jaxlm.objectives import classify

records = "examples"
models = ("encoder", "decoder")
trims = True
scores = "choices"


@dataclass(frozen=True)
class Config:
    context: tuple[str, ...] = ("context",)
    """Columns of CSV, TSV, JSON and TFDS tables that a choice is read behind, one after another."""
    choices: tuple[str, ...] = ("choices",)
    """Column of the list of choices, or a column of each choice."""
    answer: str = "answer"
    """Column of the right choice: its number, its letter, or what the list calls it."""
    first: int = 0
    """Number of the first choice."""
    most: int = 0
    """Choices that a question may have; 0: as many as in the training data."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a CSV or TSV file whose first line is no header."""
    dropout: float = 0.1
    """Before the head."""


def _choices(c: Config, source: str) -> Split:
    return choices.read(source, choices.Names(c.context, c.choices, c.answer), c.columns, c.first)


def settle(c: Config, sources: Sequence[str]) -> Config:
    """With the number of choices in the training data."""
    if c.most:
        return c
    return replace(c, most=max(len(e.choices) for source in sources for e in _choices(c, source).examples))


def specs(c: Config, width: int) -> dict[str, Any]:
    return dict(choice=Spec((width, 1), ("embed", None), normal(0.02)))


def check(c: Config, tokenizer: Any) -> None:
    for name in ("context", "choices"):
        if not getattr(c, name):
            raise ValueError(f"objective.{name}: names no column; name at least one")


def read(c: Config, source: str, tokenizer: Any, row: dict) -> tuple[list[dict], list[str]]:
    """(questions as a text of tokens for each choice, what a user should know of them)."""
    found = _choices(c, source).examples
    if many := next((e for e in found if len(e.choices) > c.most), None):
        raise ValueError(
            f"{many.where}: {len(many.choices)} choices; raise objective.most from {c.most} to have so many"
        )
    space = " " if row["kind"] == "decoder" else ""  # a decoder goes on with the same text
    contexts = tokenizer.encode_batch([e.context for e in found])
    encoded = iter(tokenizer.encode_batch([space + text for e in found for text in e.choices]))
    items, cut = [], 0
    for e, context in zip(found, contexts, strict=True):
        texts = [_joined(context, next(encoded), tokenizer, row) for _ in e.choices]
        cut += not all(whole for *_, whole in texts)
        ids = [id for text, *_ in texts for id in text]
        items.append(dict(texts=[dict(ids=i, types=t) for i, t, _ in texts], ids=ids, answer=e.answer, where=e.where))
    note = f"{source}: {cut:,} of {len(items):,} contexts lose their beginning; raise train.seq_len to keep it"
    return items, [note] if cut else []


def _joined(context: list[int], choice: list[int], tokenizer: Any, row: dict) -> tuple[list[int], list[int], bool]:
    """(ids, number of the part each belongs to, whether all fits). A context loses what is farthest from the choice."""
    first, between, last = classify.marks(tokenizer, row["kind"])
    between = between if row["kind"] == "encoder" else []
    room = row["seq_len"] - len(first) - len(between) - len(last)
    kept = choice[:room]
    before = context[max(0, len(context) + len(kept) - room) :]
    ids, start = [*first, *before, *between, *kept, *last], len(first) + len(before) + len(between)
    return ids, [0] * start + [1] * (len(ids) - start), len(before) + len(kept) == len(context) + len(choice)


def example(c: Config, record: dict, tokenizer: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    rows = [classify.padded(text | dict(seq_len=record["seq_len"]), tokenizer) for text in record["texts"]]
    last = [0 if record["kind"] == "encoder" else len(text["ids"]) - 1 for text in record["texts"]]
    blank = {name: np.zeros_like(leaf) for name, leaf in rows[0].items()}
    missing = c.most - len(rows)
    out = {name: np.stack([row[name] for row in (*rows, *[blank] * missing)]) for name in blank}
    there = np.arange(c.most) < len(rows)
    return out | dict(
        at=np.array([*last, *[0] * missing], np.int32), there=there.astype(np.int32),
        target=(np.arange(c.most) == record["answer"]).astype(np.float32), rows=np.array(1, np.float32),
    )  # fmt: skip


def weights(batch: dict) -> dict[str, jax.Array]:
    return {"questions": batch["rows"].sum()}


def logits(c: Config, model: Model, params: Any, batch: dict, key: jax.Array | None) -> tuple[jax.Array, Any]:
    """`[B, N]` in float32, out of the question where there is no choice; what the model adds to the loss `[B]`."""
    body, head = (None, None) if key is None else jax.random.split(key)
    B, N, _ = batch["tokens"].shape
    flat = {name: leaf.reshape(B * N, *leaf.shape[2:]) for name, leaf in batch.items()
            if name in ("tokens", "types", "segments", "positions", "at")}  # fmt: skip
    out = classify.states(model, params, flat, body)
    x_BD = dropout(classify.summary(model, params, flat, out), c.dropout, head)
    z_BN = _split(model, classify.linear(model, params["choice"], x_BD)[:, 0], N)
    aux_B = None if out.aux_B is None else _split(model, out.aux_B, N).mean(-1)
    return jnp.where(batch["there"] > 0, z_BN, -1e9), aux_B


def _split(model: Model, x: jax.Array, N: int) -> jax.Array:
    """Rows `[B N]` to `[B, N]`; a dimension that is sharded can't be split in two."""
    return model.shard(model.shard(x, None).reshape(-1, N), "batch", None)


def loss(c: Config, model: Model, params: Any, batch: dict, key: jax.Array | None) -> dict[str, dict[str, jax.Array]]:
    z_BN, aux_B = logits(c, model, params, batch, key)
    return {"questions": classify.sums(batch["rows"], aux_B, *classify.single(z_BN, batch["target"]))}


def predict(c: Config, model: Model, params: Any, batch: dict) -> jax.Array:
    """`[B, N]`: the number that each choice gets."""
    return logits(c, model, params, batch, None)[0]


def answers(c: Config, items: Sequence[dict], found: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """(true, predicted) numbers of choices, from 0."""
    return [item["answer"] for item in items], [int(np.argmax(z)) for z in found]
