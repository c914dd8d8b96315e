"""Masked language modelling as BERT was trained (Devlin et al. 2019, section 3.1 and appendix A.1)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.ranges import BelowOne, NonNegative, PositiveShare
from jaxlm.data.packing import Window
from jaxlm.models.model import Model
from jaxlm.nn.losses import Readout, cross_entropy
from jaxlm.objectives.objective import DeviceBatch, Example, Objective, RowShape, Sums, Tokenizer
from jaxlm.objectives.outputs import Predicted


@dataclass(frozen=True)
class Config:
    rate: PositiveShare = 0.15
    """Share of tokens that are predicted; of those 80 % become the mask token, 10 % a random one, 10 % stay."""
    whole_word: bool = False
    """Choose whole words instead of single tokens."""
    label_smoothing: BelowOne = 0.0
    z_loss: NonNegative = 0.0


def check(c: Config, tokenizer: Tokenizer) -> None:
    if tokenizer.mask_id is None:
        raise ValueError("objective: masked language modelling needs a mask token, and data.tokenizer has none")


def example(c: Config, record: Window, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    """Makes corrupted tokens [T] and [K] positions to predict of a window [T + 1].

    `rng` differs each epoch, and so does the masking.
    """
    tokens, segments = record["tokens"][:-1], record["segments"][:-1]
    out = corrupt(c, tokens, segments > 0, tokenizer, rng)
    return out | Example(segments=segments, positions=record["positions"][:-1])


def corrupt(c: Config, tokens: np.ndarray, real: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    """Returns corrupted `tokens`, and `at`, `targets`, `weights` of a fixed number of positions.

    Special tokens are never chosen. `real`: False where there is padding.
    """
    special = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id)
    free = np.flatnonzero(real & ~np.isin(tokens, [i for i in special if i is not None]))
    most = target_positions(c, len(tokens))
    wanted = min(most, max(1, round(c.rate * len(free)))) if len(free) else 0
    if c.whole_word:
        chosen = _words(free, tokens, tokenizer.starts_word, wanted, rng)
    else:
        chosen = rng.choice(free, wanted, replace=False) if wanted else free
    chosen = np.sort(chosen)
    n = len(chosen)
    draw = rng.random(n)
    out = tokens.copy()
    out[chosen[draw < 0.8]] = tokenizer.mask_id
    swap = chosen[(draw >= 0.8) & (draw < 0.9)]
    out[swap] = rng.integers(0, tokenizer.vocab_size, len(swap))
    at, targets, weights = np.zeros(most, np.int32), np.zeros(most, np.int32), np.zeros(most, np.float32)
    at[:n], targets[:n], weights[:n] = chosen, tokens[chosen], 1.0
    return Example(tokens=out, at=at, targets=targets, weights=weights)


def target_positions(c: Config, seq_len: int) -> int:
    """Returns the static number of predictions a row: the expected number, rounded up so that a context mesh axis
    divides it."""
    return -(-int(np.ceil(c.rate * seq_len)) // 8) * 8


def _words(
    free: np.ndarray, tokens: np.ndarray, starts: np.ndarray, wanted: int, rng: np.random.Generator
) -> np.ndarray:
    """Chooses whole words in random order, as many as fit into `wanted` tokens."""
    if not wanted:
        return free[:0]
    begins = starts[tokens[free]] | np.append(True, np.diff(free) > 1)
    words = np.split(free, np.flatnonzero(begins)[1:])
    chosen: list[np.ndarray] = []
    for i in rng.permutation(len(words)):
        if len(words[i]) <= wanted:
            chosen.append(words[i])
            wanted -= len(words[i])
        if not wanted:
            break
    return np.concatenate(chosen) if chosen else free[:0]


def totals(batch: DeviceBatch) -> dict[str, jax.Array]:
    return {"masked": batch["weights"].sum()}


def loss(c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> Sums:
    return {"masked": sums(c, model, params, model.forward(params, batch, key=key).x_BTD, batch)}


def sums(c: Config, model: Model, params: Any, x_BTD: jax.Array, batch: DeviceBatch) -> dict[str, jax.Array]:
    """Computes the loss at the chosen positions, which alone reach the vocabulary: a seventh of the head's work at the
    usual rate."""
    out = cross_entropy(
        _readout(model, params, x_BTD, batch),
        batch["targets"],
        batch["weights"],
        shard=model.shard,
        label_smoothing=c.label_smoothing,
        z_loss=c.z_loss,
    )
    return dict(loss=out.loss, nll=out.nll, accuracy=out.correct)


def _readout(model: Model, params: Any, x_BTD: jax.Array, batch: DeviceBatch) -> Readout:
    """Returns the factors of the logits at the chosen positions."""
    x_BTD = model.shard(x_BTD, "batch", None, None)
    x_BKD = jnp.take_along_axis(x_BTD, model.shard(batch["at"], "batch", None)[..., None], axis=1)
    return model.readout(params, model.shard(x_BKD, "batch", "seq", None))


def outputs(c: Any, model: Model, params: Any, batch: DeviceBatch) -> Predicted:
    """Returns the predictions at the chosen positions."""
    return Predicted(_readout(model, params, model.forward(params, batch).x_BTD, batch), batch["weights"])


objective = Objective(Config, "packed", ("encoder",), example=example, totals=totals, loss=loss, check=check,
                      target_positions=target_positions, outputs=outputs)  # fmt: skip
