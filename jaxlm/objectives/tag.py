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
from jaxlm.nn.layers import dropout

records = "examples"
models = ("encoder", "decoder")
packs = True
scores = "tags"


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


def settle(c: Config, sources: Sequence[str]) -> Config:
    """With the labels of the training data where none are given."""
    if c.labels:
        return c
    examples = [example for source in sources for example in conll.read(source, c.word, c.tag).examples]
    found = {tag for example in examples for tag in example.tags}
    return replace(c, labels=(*(["O"] if "O" in found else []), *sorted(found - {"O"})))


def specs(c: Config, width: int) -> dict[str, Any]:
    n = len(c.labels)
    return dict(tag=Spec((width, n), ("embed", None), normal(0.02)), tag_bias=bias(n))


def check(c: Config, tokenizer: Any) -> None:
    if c.class_weights and len(c.class_weights) != len(c.labels):
        raise ValueError(f"objective.class_weights: {len(c.class_weights)} weights for {len(c.labels)} labels")
    if len(set(c.labels)) != len(c.labels):
        raise ValueError("objective.labels: a label stands twice in the list")


def read(c: Config, source: str, tokenizer: Any, row: dict) -> tuple[list[dict], list[str]]:
    """(sentences as tokens with the first token of each word, what a user should know of them)."""
    found = conll.read(source, c.word, c.tag)
    check_labels(((e.where, tag) for e in found.examples for tag in e.tags), c.labels, "objective.labels")
    number = {label: i for i, label in enumerate(c.labels)}
    first, last = _around(tokenizer, row["kind"])
    room = row["seq_len"] - len(first) - len(last)
    items, cut = [], 0
    words = [word if i == 0 else f" {word}" for e in found.examples for i, word in enumerate(e.words)]
    encoded = iter(tokenizer.encode_batch(words))
    for e in found.examples:
        ids: list[int] = []
        firsts: list[int] = []
        whole = True
        for new in [next(encoded) for _ in e.words]:
            whole = whole and len(ids) + len(new) <= room
            firsts.append(len(first) + len(ids) if new and whole else -1)
            ids += new if whole else []
        cut += not whole
        tags = [number[tag] for tag in e.tags]
        items.append(dict(ids=[*first, *ids, *last], firsts=firsts, tags=tags, where=e.where))
    note = (
        f"{source}: {cut:,} of {len(items):,} sentences lose their end, which counts as untagged; raise train.seq_len"
    )
    return items, [note] if cut else []


def _around(tokenizer: Any, kind: str) -> tuple[list[int], list[int]]:
    """What stands before and after a sentence."""
    if kind == "encoder":
        first = tokenizer.bos_id if tokenizer.cls_id is None else tokenizer.cls_id
        last = tokenizer.eos_id if tokenizer.sep_id is None else tokenizer.sep_id
        return [first], [last]
    return [tokenizer.bos_id], []


def example(c: Config, record: dict, tokenizer: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    out = {name: np.zeros(record["seq_len"], np.int32) for name in ("tokens", "targets", "segments", "positions")}
    weights, n = np.zeros(record["seq_len"], np.float32), len(record["ids"])
    out["tokens"][:n], out["segments"][:n], out["positions"][:n] = record["ids"], 1, np.arange(n)
    out["tokens"][n:] = tokenizer.pad_id or 0
    for at, tag in zip(record["firsts"], record["tags"], strict=True):
        if at >= 0:
            out["targets"][at] = tag
            weights[at] = c.class_weights[tag] if c.class_weights else 1.0
    return out | dict(weights=weights)


def weights(batch: dict) -> dict[str, jax.Array]:
    return {"tags": batch["weights"].sum()}


def logits(c: Config, model: Model, params: Any, batch: dict, key: jax.Array | None) -> tuple[jax.Array, Any]:
    """`[B, T, L]` in float32, and the model's output."""
    body, head = (None, None) if key is None else jax.random.split(key)
    out = model.forward(params, batch, key=body)
    x_BTD = dropout(out.x_BTD, c.dropout, head)
    w_DL = model.shard(params["tag"].astype(x_BTD.dtype), None, None)
    z_BTL = model.shard.einsum("btd,dl->btl", x_BTD, w_DL, "batch", "seq", None)
    return z_BTL.astype(jnp.float32) + params["tag_bias"][None, None], out


def loss(c: Config, model: Model, params: Any, batch: dict, key: jax.Array | None) -> dict[str, dict[str, jax.Array]]:
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


def predict(c: Config, model: Model, params: Any, batch: dict) -> jax.Array:
    """`[B, T]`: the likeliest label of each token."""
    return logits(c, model, params, batch, None)[0].argmax(-1)


def answers(c: Config, items: Sequence[dict], found: Sequence[np.ndarray]) -> tuple[list[list[str]], list[list[str]]]:
    """(true, predicted) tags of each sentence's words; words without tokens are untagged."""
    rest = "O" if "O" in c.labels else c.labels[0]
    true = [[c.labels[tag] for tag in item["tags"]] for item in items]
    told = [[c.labels[row[at]] if at >= 0 else rest for at in item["firsts"]]
            for item, row in zip(items, found, strict=True)]  # fmt: skip
    return true, told
