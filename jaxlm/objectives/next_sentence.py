"""Next-sentence prediction, alone or with masked language modelling as BERT was trained (Devlin et al. 2019)."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.spec import Spec, bias, normal
from jaxlm.data.packing import Pair
from jaxlm.models.model import Model
from jaxlm.nn.layers import add_bias
from jaxlm.objectives import masked
from jaxlm.objectives.objective import DeviceBatch, Example, Objective, RowShape, Sums, Tokenizer


@dataclass(frozen=True)
class Config:
    masked_too: bool = True
    """Add the masked-LM loss, as BERT did."""
    mask: masked.Config = field(default_factory=masked.Config)


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


def totals(batch: DeviceBatch) -> dict[str, jax.Array]:
    out = {"pairs": batch["rows"].sum()}
    return out | masked.totals(batch) if "at" in batch else out


def loss(c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> Sums:
    x_BTD = model.forward(params, batch, key=key).x_BTD
    first_BD = model.pooled(params, x_BTD)
    w_D2 = model.shard(params["next_sentence"].astype(first_BD.dtype), None, None)
    z_B2 = add_bias(first_BD @ w_D2, params["next_sentence_bias"]).astype(jnp.float32)
    log_p_B2 = jax.nn.log_softmax(z_B2)
    yes_B = batch["is_next"]
    nll_B = -jnp.where(yes_B == 1, log_p_B2[:, 1], log_p_B2[:, 0])
    hit_B = (z_B2[:, 1] > z_B2[:, 0]) == (yes_B == 1)
    rows_B = batch["rows"]
    out = {"pairs": dict(loss=(nll_B * rows_B).sum(), accuracy=(hit_B * rows_B).sum())}
    return out | {"masked": masked.sums(c.mask, model, params, x_BTD, batch)} if c.masked_too else out


objective = Objective(Config, "pairs", ("encoder",), example=example, totals=totals, loss=loss, specs=specs,
                      check=check, window=window)  # fmt: skip
