"""Causal language modelling: every token predicts the next one of its document."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm.models.model import Model
from jaxlm.nn.layers import Output
from jaxlm.nn.losses import cross_entropy

records = "packed"
models = ("decoder",)


@dataclass(frozen=True)
class Config:
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    """Weight of log²Z, which keeps logits from drifting (PaLM used 1e-4)."""


def specs(c: Config, width: int) -> dict[str, Any]:
    return {}


def check(c: Config, tokenizer: Any) -> None:
    pass


def example(c: Config, record: dict, tokenizer: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`[T + 1]` → inputs and targets `[T]`. The last token of a document has no target in the next one."""
    tokens, segments = record["tokens"], record["segments"]
    return dict(
        tokens=tokens[:-1],
        targets=tokens[1:],
        weights=((segments[1:] == segments[:-1]) & (segments[1:] > 0)).astype(np.float32),
        segments=segments[:-1],
        positions=record["positions"][:-1],
    )


def weights(batch: dict) -> dict[str, jax.Array]:
    return {"tokens": batch["weights"].sum()}


def loss(c: Config, model: Model, params: Any, batch: dict, key: jax.Array | None) -> dict[str, dict[str, jax.Array]]:
    out = model.forward(params, batch, key=key)
    sums = cross_entropy(
        model.readout(params, out.x_BTD),
        batch["targets"],
        batch["weights"],
        shard=model.shard,
        label_smoothing=c.label_smoothing,
        z_loss=c.z_loss,
    )
    values = dict(loss=sums.loss, nll=sums.nll, accuracy=sums.correct) | of_rows(out, batch["weights"])
    if "aux" in values:
        values["loss"] += values["aux"]
    return {"tokens": values}


def of_rows(out: Output, weights_BT: jax.Array) -> dict[str, jax.Array]:
    """Sums of what a model says of each row: `aux`, which is part of the loss, and what it shows besides.

    A row weighs as much as its targets do, so micro-batches and meshes agree.
    """
    each_B = (out.shown_B or {}) | ({} if out.aux_B is None else {"aux": out.aux_B})
    return {name: (x_B * weights_BT.sum(-1)).sum() for name, x_B in each_B.items()}
