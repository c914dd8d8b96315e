"""Causal language modelling lets every token predict the next one of its document."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from jaxlm.core.ranges import BelowOne, NonNegative
from jaxlm.data.packing import Window, concatenated
from jaxlm.models.model import Model
from jaxlm.nn.layers import Output
from jaxlm.nn.losses import cross_entropy
from jaxlm.objectives.objective import (
    DeviceBatch,
    Example,
    Objective,
    OwnTexts,
    RowShape,
    Sums,
    Tokenizer,
    Written,
)  # fmt: skip
from jaxlm.objectives.outputs import Predicted


@dataclass(frozen=True)
class Config:
    label_smoothing: BelowOne = 0.0
    z_loss: NonNegative = 0.0
    """Weight of log²Z, which keeps logits from drifting (PaLM used 1e-4)."""


class TokenLoss(Protocol):
    """The settings that the loss reads; objectives that predict tokens have them too."""

    @property
    def label_smoothing(self) -> float: ...
    @property
    def z_loss(self) -> float: ...


def example(c: Config, record: Window, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    """Makes inputs and targets [T] of a window [T + 1]."""
    return shifted(record)


def shifted(record: Window) -> Example:
    """Returns a window [T + 1] as inputs and targets [T]. A document's last token has no target in the next one."""
    tokens, segments = record["tokens"], record["segments"]
    return Example(
        tokens=tokens[:-1],
        targets=tokens[1:],
        weights=((segments[1:] == segments[:-1]) & (segments[1:] > 0)).astype(np.float32),
        segments=segments[:-1],
        positions=record["positions"][:-1],
    )


def totals(batch: DeviceBatch) -> dict[str, jax.Array]:
    return {"tokens": batch["weights"].sum()}


def loss(c: TokenLoss, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> Sums:
    out = model.forward(params, batch, key=key)
    sums = cross_entropy(
        model.readout(params, out.x_BTD),
        batch["targets"],
        batch["weights"],
        shard=model.shard,
        label_smoothing=c.label_smoothing,
        z_loss=c.z_loss,
    )
    values = dict(loss=sums.loss, nll=sums.nll, accuracy=sums.correct) | row_sums(out, batch["weights"])
    if "aux" in values:
        values["loss"] += values["aux"]
    return {"tokens": values}


def outputs(c: TokenLoss, model: Model, params: Any, batch: DeviceBatch) -> Predicted:
    """Returns the prediction of each token's next one."""
    return Predicted(model.readout(params, model.forward(params, batch).x_BTD), batch["weights"])


def row_sums(out: Output, weights_BT: jax.Array) -> dict[str, jax.Array]:
    """Sums what a model reports of each row: `aux`, which is part of the loss, and what is only shown.

    A row weighs as much as its targets do, so micro-batches and meshes agree.
    """
    each_B = (out.shown_B or {}) | ({} if out.aux_B is None else {"aux": out.aux_B})
    return {name: (x_B * weights_BT.sum(-1)).sum() for name, x_B in each_B.items()}


def window_of(c: Config, texts: Sequence[Written], row: RowShape, tokenizer: Tokenizer) -> Window:
    """Returns the window of texts that a model wrote."""
    whole = [np.array([*text.asked.prompt, *text.answer]) for text in texts]
    return concatenated(whole, row.seq_len + 1, tokenizer.pad_id or 0)


objective = Objective(Config, "packed", ("decoder",), example=example, totals=totals, loss=loss,
                      outputs=outputs, own_texts=OwnTexts(None, window_of, lambda c, kind: True))  # fmt: skip
