"""Next-sentence prediction, alone or with masked language modelling as BERT was trained (Devlin et al. 2019)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.spec import Spec, bias, normal
from jaxlm.data.packing import Pair
from jaxlm.models.model import Model
from jaxlm.objectives import classify, masked
from jaxlm.objectives.objective import DeviceBatch, Example, Objective, RowShape, Sums, Tokenizer


@dataclass(frozen=True)
class Config:
    masked_too: bool = True
    """Add the masked-LM loss, as BERT did."""
    mask: masked.Config = field(default_factory=masked.Config)
    next_label: Literal[0, 1] = 0
    """The head's output that says that the second text goes on with the first: 0 as in published files. Runs of version
    0.1.0 have 1."""


def as_published(c: Config, weights: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Returns the settings and the weights of the same head with its outputs in the order of published files."""
    if c.next_label == 0:
        return c, dict(weights)
    turned = {n: weights[n][..., ::-1] for n in ("next_sentence", "next_sentence_bias") if n in weights}
    return replace(c, next_label=0), {**weights, **turned}


def specs(c: Config, width: int) -> dict[str, Spec]:
    return dict(next_sentence=Spec((width, 2), ("embed", None), normal(0.02)), next_sentence_bias=bias(2))


def check(c: Config, tokenizer: Tokenizer) -> None:
    if tokenizer.cls_id is None or tokenizer.sep_id is None:
        raise ValueError("objective: next-sentence prediction needs [CLS] and [SEP], which data.tokenizer lacks")
    if c.masked_too:
        masked.check(c.mask, tokenizer)


def window(c: Config, seq_len: int) -> int:
    """Returns how many tokens of text fit a row with [CLS] and two [SEP]."""
    return seq_len - 3


def example(c: Config, record: Pair, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    """Makes `[CLS] first [SEP] second [SEP]`, padded to the row."""
    assert tokenizer.cls_id is not None and tokenizer.sep_id is not None
    first, second, length = record["first"], record["second"], row.seq_len
    sep = [tokenizer.sep_id]
    tokens = np.concatenate([[tokenizer.cls_id], first, sep, second, sep]).astype(np.int32)
    n, pad = len(tokens), length - len(tokens)
    types = np.repeat([0, 1], [len(first) + 2, len(second) + 1]).astype(np.int32)
    real = np.arange(length) < n
    out = Example(
        tokens=np.pad(tokens, (0, pad), constant_values=tokenizer.pad_id or 0),
        types=np.pad(types, (0, pad)),
        segments=real.astype(np.int32),
        positions=np.arange(length, dtype=np.int32),
        is_next=np.asarray(record["is_next"], np.int32),
        rows=np.ones((), np.float32),
    )
    return out | masked.corrupt(c.mask, out["tokens"], real, tokenizer, rng) if c.masked_too else out


def target_positions(c: Config, seq_len: int) -> int:
    """Returns the number of predictions a row of the masked-LM loss, if there is one."""
    return masked.target_positions(c.mask, seq_len) if c.masked_too else 0


def totals(batch: DeviceBatch) -> dict[str, jax.Array]:
    out = {"pairs": batch["rows"].sum()}
    return out | masked.totals(batch) if "at" in batch else out


def loss(c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> Sums:
    x_BTD = model.forward(params, batch, key=key).x_BTD
    first_BD = model.pooled(params, x_BTD)
    z_B2 = classify.linear(model, params["next_sentence"], first_BD) + params["next_sentence_bias"][None]
    log_p_B2 = jax.nn.log_softmax(z_B2)
    follows_B, yes, no = batch["is_next"] == 1, c.next_label, 1 - c.next_label
    nll_B = -jnp.where(follows_B, log_p_B2[:, yes], log_p_B2[:, no])
    hit_B = (z_B2[:, yes] > z_B2[:, no]) == follows_B
    rows_B = batch["rows"]
    out = {"pairs": dict(loss=(nll_B * rows_B).sum(), accuracy=(hit_B * rows_B).sum())}
    return out | {"masked": masked.sums(c.mask, model, params, x_BTD, batch)} if c.masked_too else out


objective = Objective(Config, "pairs", ("encoder",), example=example, totals=totals, loss=loss, specs=specs,
                      check=check, window=window, target_positions=target_positions,
                      as_published=as_published)  # fmt: skip
