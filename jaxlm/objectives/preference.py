"""Preferences between two answers to a prompt: DPO (Rafailov et al. 2023), IPO (Azar et al. 2023), KTO (Ethayarajh et
al. 2024) and ORPO (Hong et al. 2024).

A row holds both whole texts, prompt and preferred answer as segment 1, prompt and other answer as segment 2, so one
forward pass reads them and neither sees the other. B rows, T positions, A answers of a row: preferred, other and, for
KTO, one that belongs to another prompt.

The log likelihood of each answer under the reference model (the weights at the start) is computed once, before
training, and is part of the batch as `reference` [B, A].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.ranges import BelowOne, NonNegative
from jaxlm.data import conversations, render_chat
from jaxlm.models.model import Model
from jaxlm.nn.layers import Output
from jaxlm.nn.losses import Readout, cross_entropy, log_likelihoods
from jaxlm.objectives.causal import row_sums
from jaxlm.objectives.objective import (
    DeviceBatch,
    Example,
    ExampleReader,
    Objective,
    Record,
    Reference,
    RowShape,
    Sums,
    Tokenizer,
)  # fmt: skip

PREFERRED, OTHER, FOREIGN = 1, 2, 3  # segments


@dataclass(frozen=True)
class Config:
    method: Literal["dpo", "ipo", "kto", "orpo"] = "dpo"
    """kto estimates the drift from its reference anew in each micro-batch, for which these should not be too small."""
    beta: NonNegative = 0.1
    """How strongly the model is bound to its reference; orpo: weight of the odds ratio."""
    label_smoothing: BelowOne = 0.0
    """dpo: share of preferences that are taken to be wrong (conservative DPO)."""
    sft: NonNegative = 0.0
    """Weight of the preferred answer's mean negative log likelihood beside the preference; orpo has it always."""
    prompt: str = "prompt"
    """Field: a text, or a list of messages."""
    preferred: str = "chosen"
    other: str = "rejected"
    template: str = ""
    """Chat template in Jinja; empty: the model's own, or plain texts if it has none."""


class Answers(Record):
    """A record holds the answers to a prompt that share a row."""

    texts: list[tuple[list[int], int]]
    """Ids of each whole text, and where its answer begins."""
    reference: Sequence[float] | np.ndarray
    """Log likelihood of each answer under the reference model; zeros until it is computed."""


def check(c: Config, tokenizer: Tokenizer) -> None:
    if c.beta <= 0:
        raise ValueError(f"objective.beta: {c.beta} must be above 0")
    if not 0 <= c.label_smoothing < 0.5:
        raise ValueError(f"objective.label_smoothing: {c.label_smoothing} must be at least 0 and below 0.5")


def needs_reference(c: Config) -> bool:
    return c.method != "orpo"


def read(c: Config, source: str, row: RowShape, tokenizer: Tokenizer) -> tuple[list[Answers], list[str]]:
    """Returns pairs of answers, and what a user should know of them."""
    every = []
    for where, values in conversations.read_records(source):
        sides: list[Any] = [values.get(name) for name in (c.preferred, c.other)]
        if not all(sides):
            names = ", ".join(values) or "none"
            raise ValueError(f"{where}: no {c.preferred!r} and {c.other!r}; fields: {names}; name them in objective")
        prompt = conversations.parse_messages(where, values[c.prompt], "user", c.prompt) if values.get(c.prompt) else []
        for name, side in zip((c.preferred, c.other), sides, strict=True):
            answer = conversations.parse_messages(where, side, "assistant", name)  # some files repeat the prompt in it
            messages = [*([] if len(answer) > 1 else prompt), *answer]
            every.append(conversations.make(where, messages, values, (c.prompt, c.preferred, c.other)))
    texts = render_chat.encode_for_training(every, tokenizer, c.template or row.template)
    answers = [(t.ids, len(t.ids) - t.learned[::-1].index(False) if False in t.learned else 1) for t in _trimmed(texts)]
    pairs = list(zip(answers[::2], answers[1::2], strict=True))
    records: list[Answers] = []
    for i, (good, bad) in enumerate(pairs):
        several = [good, bad]
        if c.method == "kto":  # the prompt of this pair, the answer of the next
            ids, begin = pairs[(i + 1) % len(pairs)][0]
            several.append(([*good[0][: good[1]], *ids[begin:]], good[1]))
        records.append(Answers(where="", texts=several, reference=[0.0] * len(several)))
    room = row.seq_len // (3 if c.method == "kto" else 2)
    notes = conversations.unread_fields(source, every[::2])
    both = [list(zip(r["texts"], _fitting(r["texts"], room), strict=True)) for r in records]
    lost = [[(begin - b, len(ids) - begin - len(cut) + b) for (ids, begin), (cut, b) in pair] for pair in both]
    for side, what in enumerate(("the prompt loses its beginning", "an answer loses its end")):
        if n := sum(any(counts[side] for counts in pair) for pair in lost):
            notes.append(f"{source}: in {n:,} of {len(records):,} pairs {what}; raise train.seq_len to keep it")
    return records, notes


def _fitting(texts: Sequence[tuple[list[int], int]], room: int) -> list[tuple[list[int], int]]:
    """Returns the texts cut so that each has at most `room` targets.

    All keep as much of their prompt: its end, as much as the longest answer leaves, which may have at least half. What
    is too long of an answer is cut at its end.
    """
    longest = max(len(ids) - begin for ids, begin in texts)
    kept = max(1, room + 1 - min(longest, (room + 1) // 2))
    cut = [(ids[max(0, begin - kept) :], min(begin, kept)) for ids, begin in texts]
    return [(ids[: room + 1], begin) for ids, begin in cut]


def token_ids(record: Answers) -> list[Sequence[int]]:
    """Returns the token ids of each text of a row."""
    return [ids for ids, _ in record["texts"]]


def _trimmed(texts: list[render_chat.Tokens]) -> list[render_chat.Tokens]:
    """Returns the texts up to the end of their last answer."""
    out = []
    for t in texts:
        n = len(t.ids) - t.learned[::-1].index(True)
        out.append(render_chat.Tokens(t.ids[:n], t.learned[:n]))
    return out


def example(c: Config, record: Answers, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    """Makes a row of the answers, each with its prompt, which is the same for all; see `_fitting`."""
    texts = _fitting(record["texts"], row.seq_len // len(record["texts"]))
    tokens, targets, segments, positions = (np.zeros(row.seq_len, np.int32) for _ in range(4))
    weights, at = np.zeros(row.seq_len, np.float32), 0
    for number, (ids, begin) in enumerate(texts, 1):
        n = len(ids) - 1
        part = slice(at, at + n)
        tokens[part], targets[part] = ids[:-1], ids[1:]
        segments[part], positions[part] = number, np.arange(n)
        weights[at + begin - 1 : at + n] = 1
        at += n
    return Example(
        tokens=tokens, targets=targets, segments=segments, positions=positions, weights=weights,
        reference=np.asarray(record["reference"], np.float32), rows=np.array(1, np.float32),
    )  # fmt: skip


def totals(batch: DeviceBatch) -> dict[str, jax.Array]:
    return {"pairs": batch["rows"].sum()}


def likelihoods(
    model: Model, params: Any, batch: DeviceBatch, answers: int, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, Readout, Output]:
    """Computes the log likelihood of each answer `[B, A]`, without gradients, its tokens `[B, A]`, the readout, and the
    model's output."""
    out = model.forward(params, batch, key=key)
    readout = model.readout(params, out.x_BTD)
    weights_BT = jax.lax.stop_gradient(batch["weights"])  # a row counts as a whole, by `rows`
    log_BT = log_likelihoods(readout, batch["targets"], shard=model.shard) * weights_BT
    mine_BAT = batch["segments"][:, None] == jnp.arange(1, answers + 1)[None, :, None]
    log_BA = jnp.where(mine_BAT, log_BT[:, None], 0.0).sum(-1)
    return log_BA, jnp.where(mine_BAT, weights_BT[:, None], 0.0).sum(-1), readout, out


def reference(c: Config, model: Model, params: Any, batch: DeviceBatch) -> jax.Array:
    """Returns the log likelihood of each answer, `[B, A]`, which is stored of the reference model."""
    return likelihoods(model, params, batch, batch["reference"].shape[-1])[0]


def loss(c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> Sums:
    log_BA, count_BA, readout, out = likelihoods(model, params, batch, batch["reference"].shape[-1], key)
    real_B, zero = batch["rows"] > 0, jnp.zeros_like(log_BA)

    def of(log_BA: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss_B, margin_B = METHODS[c.method](c, log_BA, batch["reference"], jnp.maximum(count_BA, 1), real_B)
        each = dict(loss=loss_B, margin=margin_B, accuracy=(margin_B > 0).astype(jnp.float32))
        each |= dict(preferred=log_BA[:, 0], other=log_BA[:, 1])
        each = {name: jnp.where(real_B, x_B, 0.0) for name, x_B in each.items()}
        return each["loss"].sum(), each

    (_, each), slope_BA = jax.value_and_grad(of, has_aux=True)(log_BA)
    # The chain rule by hand: each target weighs as much as the loss depends on its answer's likelihood.
    slope_BAT = jnp.where(batch["segments"][:, None] == jnp.arange(1, zero.shape[-1] + 1)[None, :, None],
                          slope_BA[..., None], 0.0)  # fmt: skip
    pulls_BT = jax.lax.stop_gradient(-slope_BAT.sum(1) * batch["weights"])
    pulled = cross_entropy(readout, batch["targets"], pulls_BT, shard=model.shard).loss
    values = {name: (x_B * batch["rows"]).sum() for name, x_B in each.items()}
    values["loss"] += pulled - jax.lax.stop_gradient(pulled)
    values |= row_sums(out, batch["rows"][:, None])
    if "aux" in values:
        values["loss"] += values["aux"]
    return {"pairs": values}


def _dpo(c: Config, log_BA: Any, ref_BA: Any, count_BA: Any, real_B: Any) -> tuple[jax.Array, jax.Array]:
    margin_B = c.beta * ((log_BA - ref_BA)[:, 0] - (log_BA - ref_BA)[:, 1])
    wrong = c.label_smoothing
    loss_B = -(1 - wrong) * jax.nn.log_sigmoid(margin_B) - wrong * jax.nn.log_sigmoid(-margin_B)
    return loss_B + _sft(c.sft, log_BA, count_BA), margin_B


def _ipo(c: Config, log_BA: Any, ref_BA: Any, count_BA: Any, real_B: Any) -> tuple[jax.Array, jax.Array]:
    """Computes the loss of means over tokens, so that long answers weigh no more."""
    gain_BA = (log_BA - ref_BA) / count_BA
    margin_B = gain_BA[:, 0] - gain_BA[:, 1]
    return jnp.square(margin_B - 1 / (2 * c.beta)) + _sft(c.sft, log_BA, count_BA), margin_B


def _kto(c: Config, log_BA: Any, ref_BA: Any, count_BA: Any, real_B: Any) -> tuple[jax.Array, jax.Array]:
    """Compares each answer with the drift from the reference, which the answers to other prompts estimate: those of the
    micro-batch, as another one's aren't known yet. So cutting a batch into more of them changes the update."""
    gain_BA = log_BA - ref_BA
    drift = jnp.where(real_B, gain_BA[:, FOREIGN - 1], 0.0).sum() / jnp.maximum(real_B.sum(), 1)
    drift = jax.lax.stop_gradient(jnp.maximum(drift, 0.0))
    good_B = jax.nn.sigmoid(c.beta * (gain_BA[:, 0] - drift))
    bad_B = jax.nn.sigmoid(c.beta * (drift - gain_BA[:, 1]))
    loss_B = ((1 - good_B) + (1 - bad_B)) / 2 + _sft(c.sft, log_BA, count_BA)
    return loss_B, c.beta * (gain_BA[:, 0] - gain_BA[:, 1])


def _orpo(c: Config, log_BA: Any, ref_BA: Any, count_BA: Any, real_B: Any) -> tuple[jax.Array, jax.Array]:
    mean_BA = log_BA / count_BA
    odds_BA = mean_BA - jnp.log1p(-jnp.exp(jnp.minimum(mean_BA, -1e-6)))
    margin_B = odds_BA[:, 0] - odds_BA[:, 1]
    return -mean_BA[:, 0] - c.beta * jax.nn.log_sigmoid(margin_B), margin_B


def _sft(weight: float, log_BA: jax.Array, count_BA: jax.Array) -> Any:
    return -weight * log_BA[:, 0] / count_BA[:, 0] if weight else 0.0


METHODS = {"dpo": _dpo, "ipo": _ipo, "kto": _kto, "orpo": _orpo}


objective = Objective(Config, ExampleReader(read, token_ids), ("decoder",), example=example, totals=totals, loss=loss,
                      check=check, reference=Reference(needs_reference, reference),
                      chat_template=lambda c: c.template)  # fmt: skip
