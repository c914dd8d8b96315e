"""Extractive question answering: where in a text the answer begins and ends, or that the text holds none.

As BERT does it (Devlin et al. 2019, for SQuAD 1.1 and 2.0): a long text is read in windows that overlap, a window
without the answer has its first token as the answer, and of all windows of a question the best span counts.

B windows, T positions, D model width, N tokens of context in a window.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.spec import Spec, bias, normal
from jaxlm.data import labelled
from jaxlm.data.labelled import Question, squad
from jaxlm.models.model import Model
from jaxlm.nn.layers import dropout
from jaxlm.objectives import classify

records = "examples"
models = ("encoder",)
trims = True
scores = "spans"


@dataclass(frozen=True)
class Config:
    question: str = "question"
    """Column of flat records; SQuAD's own files need no names."""
    context: str = "context"
    answers: str = "answers"
    question_len: int = 64
    """Tokens of a question; what is beyond is cut off."""
    stride: int = 128
    """Tokens from the beginning of one window of a long text to that of the next."""
    max_answer: int = 30
    """Tokens of an answer."""
    n_best: int = 20
    """Answers that are kept of each question, the best first."""
    no_answer: bool | None = None
    """Whether a text may hold no answer; None: as in the training data."""
    threshold: float = 0.0
    """By how much no answer must score above the best span to be given; `eval` says what would have been best."""
    dropout: float = 0.1
    """Before the head."""


class Told(NamedTuple):
    """An answer that was found; the empty text is none."""

    text: str
    score: float
    """Above that of no answer."""


def settle(c: Config, sources: Sequence[str]) -> Config:
    if c.no_answer is not None:
        return c
    return dataclasses.replace(c, no_answer=any(not q.answers for s in sources for q in _questions(c, s).examples))


def _questions(c: Config, source: str) -> Any:
    return squad.read(source, squad.Names(c.question, c.context, c.answers))


def specs(c: Config, width: int) -> dict[str, Any]:
    return dict(answer=Spec((width, 2), ("embed", None), normal(0.02)), answer_bias=bias(2))


def check(c: Config, tokenizer: Any) -> None:
    for name in ("question_len", "stride", "max_answer", "n_best"):
        if getattr(c, name) < 1:
            raise ValueError(f"objective.{name}: {getattr(c, name)} must be at least 1")


def read(c: Config, source: str, tokenizer: Any, row: dict) -> tuple[list[dict], list[str]]:
    """(windows of all questions, those of one behind one another; what a user should know of them)."""
    found = _questions(c, source)
    first, between, last = classify.marks(tokenizer, row["kind"])
    asked = tokenizer.encode_batch([q.question for q in found.examples])
    encoded: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}
    items: list[dict] = []
    cut = lost = long = several = 0
    for q, ids in zip(found.examples, asked, strict=True):
        head = [*first, *ids[: c.question_len], *between]
        cut += len(ids) > c.question_len
        room = row["seq_len"] - len(head) - len(last)
        if room < 1:
            raise ValueError(f"train.seq_len: {row['seq_len']} has no room for {q.where} and its text; raise it")
        if q.context not in encoded:  # a text has several questions
            encoded[q.context] = tokenizer.encode_offsets(q.context)
        tokens, spans = encoded[q.context]
        places = _places(q, spans)
        lost += len(places) < len(q.answers)
        long += any(z - a >= c.max_answer for a, z in places)
        windows = _windows(len(tokens), room, c.stride)
        several += len(windows) > 1
        for number, (begin, end, own) in enumerate(windows):
            inside = [(len(head) + a - begin, len(head) + z - begin) for a, z in places if begin <= a and z < end]
            items.append(
                dict(
                    ids=[*head, *tokens[begin:end], *last],
                    types=[0] * len(head) + [1] * (end - begin + len(last)),
                    first=len(head), spans=spans[begin:end], own=own, target=inside[0] if inside else (0, 0),
                    window=number, context=q.context, answers=tuple(text for _, text in q.answers), where=q.where,
                )
            )  # fmt: skip
    told = {
        f"{cut:,} questions lose their end; raise objective.question_len to keep it": cut,
        f"{lost:,} answers have no token; the tokenizer leaves their characters out, so they can't be found": lost,
        f"{long:,} answers are longer than objective.max_answer, so they can't be found; raise it": long,
        f"{several:,} of {len(asked):,} texts are read in several windows, {len(items):,} in all": several,
    }
    return items, [*labelled.told(found), *(f"{source}: {note}" for note, n in told.items() if n)]


def _places(q: Question, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first and the last token of each answer."""
    inside = [[t for t, (a, z) in enumerate(spans) if a < begin + len(text) and z > begin] for begin, text in q.answers]
    return [(tokens[0], tokens[-1]) for tokens in inside if tokens]


def _windows(n: int, room: int, stride: int) -> list[tuple[int, int, list[bool]]]:
    """(first token, token after the last, whether each is its own) of each window of a text of `n` tokens.

    A window owns what no other shows with more around it; there alone an answer may begin.
    """
    begins = [0]
    while begins[-1] + room < n:
        begins.append(begins[-1] + min(stride, room))
    bounds = [(begin, min(begin + room, n)) for begin in begins]
    around = lambda t, begin, end: min(t - begin, end - 1 - t) + 0.01 * (end - begin)  # noqa: E731
    most = [max(around(t, *bound) for bound in bounds if bound[0] <= t < bound[1]) for t in range(n)]
    return [(begin, end, [around(t, begin, end) == most[t] for t in range(begin, end)]) for begin, end in bounds]


def example(c: Config, record: dict, tokenizer: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    allowed = np.zeros(record["seq_len"], np.int32)
    allowed[0] = allowed[record["first"] : record["first"] + len(record["spans"])] = 1
    target = np.array(record["target"], np.int32)
    return classify.padded(record, tokenizer) | dict(allowed=allowed, target=target, rows=np.array(1, np.float32))


def weights(batch: dict) -> dict[str, jax.Array]:
    return {"windows": batch["rows"].sum()}


def logits(c: Config, model: Model, params: Any, batch: dict, key: jax.Array | None) -> tuple[jax.Array, Any]:
    """`[B, T, 2]` in float32 (start, end), out of the question where nothing may begin or end; the model's output."""
    body, head = (None, None) if key is None else jax.random.split(key)
    out = classify.states(model, params, batch, body)
    w_D2 = model.shard(params["answer"].astype(out.x_BTD.dtype), None, None)
    z_BT2 = model.shard.einsum("btd,dl->btl", dropout(out.x_BTD, c.dropout, head), w_D2, "batch", "seq", None)
    z_BT2 = model.shard(z_BT2.astype(jnp.float32), "batch", None, None) + params["answer_bias"][None, None]
    return jnp.where(model.shard(batch["allowed"], "batch", None)[..., None] > 0, z_BT2, -1e9), out


def loss(c: Config, model: Model, params: Any, batch: dict, key: jax.Array | None) -> dict[str, dict[str, jax.Array]]:
    z_BT2, out = logits(c, model, params, batch, key)
    hit_BT2 = jnp.arange(z_BT2.shape[1])[None, :, None] == model.shard(batch["target"], "batch", None)[:, None]
    loss_B2 = -jnp.where(hit_BT2, jax.nn.log_softmax(z_BT2, 1), 0.0).sum(1)
    right_B = (z_BT2.argmax(1) == model.shard(batch["target"], "batch", None)).all(-1)
    return {"windows": classify.sums(batch["rows"], out.aux_B, loss_B2.mean(-1), right_B)}


def predict(c: Config, model: Model, params: Any, batch: dict) -> jax.Array:
    """`[B, T, 2]`: scores of where the answer begins and ends."""
    return logits(c, model, params, batch, None)[0]


def answers(
    c: Config, items: Sequence[dict], found: Sequence[np.ndarray]
) -> tuple[list[tuple[str, ...]], list[list[Told]]]:
    """(true answers, the best found) of each question."""
    firsts = [i for i, item in enumerate(items) if item["window"] == 0]
    parts = [slice(a, b) for a, b in zip(firsts, [*firsts[1:], len(items)], strict=True)]
    return [items[i]["answers"] for i in firsts], [best(c, items[part], found[part]) for part in parts]


def best(c: Config, windows: Sequence[dict], found: Sequence[np.ndarray]) -> list[Told]:
    """Of one question, over its windows; scores are above that of no answer, the lowest of any window."""
    none = min(float(z_T2[0].sum()) for z_T2 in found)
    spans: dict[tuple[int, int], float] = {}
    for item, z_T2 in zip(windows, found, strict=True):
        z_N2 = z_T2[item["first"] : item["first"] + len(item["spans"])]
        size = min(c.max_answer, len(z_N2))
        ends_NA = np.full((len(z_N2), size), -np.inf)  # a: tokens that follow the first
        for a in range(size):
            ends_NA[: len(z_N2) - a, a] = z_N2[a:, 1]
        score_NA = np.where(np.array(item["own"])[:, None], z_N2[:, :1] + ends_NA, -np.inf).ravel()
        for at in np.argsort(-score_NA, kind="stable")[: c.n_best]:
            start, more = divmod(int(at), size)
            if np.isfinite(score_NA[at]):
                span = item["spans"][start][0], item["spans"][start + more][1]
                spans[span] = max(spans.get(span, -np.inf), float(score_NA[at]))
    text = windows[0]["context"]
    told = sorted((Told(text[a:z], score - none) for (a, z), score in spans.items() if a < z), key=lambda t: -t.score)
    kept = told[: c.n_best]
    if c.no_answer is not False:
        kept.append(Told("", -c.threshold))
    return sorted(kept, key=lambda t: -t.score) or [Told("", 0.0)]
