"""Extractive question answering: where in a text the answer begins and ends, or that the text holds none.

As BERT does it (Devlin et al. 2019, for SQuAD 1.1 and 2.0): a long text is read in windows that overlap, a window
without the answer has its first token as the answer, and of all windows of a question the best span counts.

B windows, T positions, D model width, N tokens of context in a window.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.ranges import BelowOne, Count, Finite
from jaxlm.core.spec import Spec, bias, normal
from jaxlm.data import labelled
from jaxlm.data.labelled import Question, squad, tables
from jaxlm.models.model import Model
from jaxlm.nn.family import Outputs
from jaxlm.nn.layers import Output, dropout
from jaxlm.objectives import classify
from jaxlm.objectives.objective import (
    DeviceBatch,
    Example,
    ExampleReader,
    Objective,
    Prediction,
    Record,
    RowShape,
    Sums,
    TaskHead,
    Tokenizer,
    Use,
    no_tokens,
)  # fmt: skip
from jaxlm.objectives.outputs import Predicted


@dataclass(frozen=True)
class Config:
    question: str = "question"
    """Column of flat records; SQuAD's own files need no names."""
    context: str = "context"
    answers: str = "answers"
    question_len: Count = 64
    """Tokens of a question; what is beyond is cut off."""
    stride: Count = 128
    """Tokens from the beginning of one window of a long text to that of the next."""
    max_answer: Count = 30
    """Tokens of an answer."""
    n_best: Count = 20
    """Answers that are kept of each question, the best first."""
    no_answer: bool | None = None
    """Whether a text may hold no answer; None: as in the training data."""
    threshold: Finite = 0.0
    """By how much no answer must score above the best span to be given; `eval` says what would have been best."""
    dropout: BelowOne = 0.1
    """Before the head."""


class Answer(NamedTuple):
    """A predicted answer; the empty text is none."""

    text: str
    score: float
    """Above that of no answer."""


class Span(NamedTuple):
    """A predicted answer and its place."""

    text: str
    score: float
    """Above that of no answer."""
    start: int
    """The first character in the text."""
    end: int
    """The character after the last."""


class Window(Record):
    """A window is a question with a part of its text."""

    ids: list[int]
    types: list[int]
    first: int
    """Position of the window's first token of context."""
    spans: list[tuple[int, int]]
    """The characters of the text that each token of context stands for."""
    may_begin: list[bool]
    """Whether an answer may begin at each token of context; of all windows that have a token one alone says so."""
    target: tuple[int, int]
    """First and last position of the answer; (0, 0): this window holds none."""
    window: int
    """Number of the window among those of its question."""
    context: str
    answers: tuple[str, ...]


def infer_from_data(c: Config, sources: Sequence[str]) -> Config:
    """Takes from the training data whether a text may hold no answer, where that is not set."""
    if c.no_answer is not None:
        return c
    return dataclasses.replace(c, no_answer=any(not q.answers for s in sources for q in _questions(c, s).examples))


def _questions(c: Config, source: str) -> labelled.Split:
    return squad.read(source, squad.Names(c.question, c.context, c.answers))


def specs(c: Config, width: int) -> dict[str, Spec]:
    return dict(answer=Spec((width, 2), ("embed", None), normal(0.02)), answer_bias=bias(2))


def check(c: Config, tokenizer: Tokenizer) -> None:
    for name in ("question_len", "stride", "max_answer", "n_best"):
        if getattr(c, name) < 1:
            raise ValueError(f"objective.{name}: {getattr(c, name)} must be at least 1")


def read(c: Config, source: str, row: RowShape, tokenizer: Tokenizer) -> tuple[list[Window], list[str]]:
    """Returns the windows of all questions, those of a question one after another, and what a user should know."""
    split = _questions(c, source)
    records, notes = _records(c, split.examples, row, tokenizer)
    return records, [*labelled.summarize_problems(split), *(f"{source}: {note}" for note in notes)]


def _records(
    c: Config, examples: Sequence[Question], row: RowShape, tokenizer: Tokenizer
) -> tuple[list[Window], list[str]]:
    first, between, last = classify.marks(tokenizer, row.kind)
    questions = tokenizer.encode_batch([q.question for q in examples])
    encoded: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}
    records: list[Window] = []
    cut = lost = long = several = 0
    for q, ids in zip(examples, questions, strict=True):
        head = [*first, *ids[: c.question_len], *between]
        cut += len(ids) > c.question_len
        room = row.seq_len - len(head) - len(last)
        if room < 1:
            raise ValueError(f"train.seq_len: {row.seq_len} has no room for {q.where} and its text; raise it")
        if q.context not in encoded:  # a text has several questions
            encoded[q.context] = tokenizer.encode_offsets(q.context)
        tokens, spans = encoded[q.context]
        bounds = _answer_tokens(q, spans)
        lost += len(bounds) < len(q.answers)
        long += any(z - a >= c.max_answer for a, z in bounds)
        windows = _windows(len(tokens), room, c.stride)
        several += len(windows) > 1
        for number, (begin, end, may_begin) in enumerate(windows):
            inside = [(len(head) + a - begin, len(head) + z - begin) for a, z in bounds if begin <= a and z < end]
            records.append(
                Window(
                    ids=[*head, *tokens[begin:end], *last],
                    types=[0] * len(head) + [1] * (end - begin + len(last)),
                    first=len(head), spans=spans[begin:end], may_begin=may_begin,
                    target=inside[0] if inside else (0, 0),
                    window=number, context=q.context, answers=tuple(text for _, text in q.answers), where=q.where,
                )
            )  # fmt: skip
    counts = {
        f"{cut:,} questions lose their end; raise objective.question_len to keep it": cut,
        f"{lost:,} answers have no token; the tokenizer leaves their characters out, so they can't be found": lost,
        f"{long:,} answers are longer than objective.max_answer, so they can't be found; raise it": long,
        f"{several:,} of {len(questions):,} texts are read in several windows, {len(records):,} in all": several,
    }
    return records, [note for note, n in counts.items() if n]


def _answer_tokens(q: Question, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the first and the last token of each answer that has any."""
    inside = [[t for t, (a, z) in enumerate(spans) if a < begin + len(text) and z > begin] for begin, text in q.answers]
    return [(tokens[0], tokens[-1]) for tokens in inside if tokens]


def _windows(n: int, room: int, stride: int) -> list[tuple[int, int, list[bool]]]:
    """Returns (first token, token after the last, whether an answer may begin at each) of each window of `n` tokens.

    An answer may begin at a token in the window that shows most around it, and in no other.
    """
    begins = [0]
    while begins[-1] + room < n:
        begins.append(begins[-1] + min(stride, room))
    bounds = [(begin, min(begin + room, n)) for begin in begins]
    margin = lambda t, begin, end: min(t - begin, end - 1 - t) + 0.01 * (end - begin)  # noqa: E731
    most = [max(margin(t, *bound) for bound in bounds if bound[0] <= t < bound[1]) for t in range(n)]
    return [(begin, end, [margin(t, begin, end) == most[t] for t in range(begin, end)]) for begin, end in bounds]


def example(c: Config, record: Window, row: RowShape, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    allowed = np.zeros(row.seq_len, np.int32)
    allowed[0] = allowed[record["first"] : record["first"] + len(record["spans"])] = 1
    target = np.array(record["target"], np.int32)
    out = classify.padded(record["ids"], record["types"], row, tokenizer)
    return out | Example(allowed=allowed, target=target, rows=np.array(1, np.float32))


def totals(batch: DeviceBatch) -> dict[str, jax.Array]:
    return {"windows": batch["rows"].sum()}


def logits(c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> tuple[jax.Array, Output]:
    """Computes `[B, T, 2]` in float32 (start, end), very low where nothing may begin or end, and the model's output."""
    body, head = (None, None) if key is None else jax.random.split(key)
    out = classify.states(model, params, batch, body)
    x_BTD = classify.token_states(model, params, out)
    z_BT2 = classify.linear(model, params["answer"], dropout(x_BTD, c.dropout, head))
    z_BT2 = model.shard(z_BT2, "batch", None, None) + params["answer_bias"][None, None]
    return jnp.where(model.shard(batch["allowed"], "batch", None)[..., None] > 0, z_BT2, -1e9), out


def loss(c: Config, model: Model, params: Any, batch: DeviceBatch, key: jax.Array | None) -> Sums:
    z_BT2, out = logits(c, model, params, batch, key)
    hit_BT2 = jnp.arange(z_BT2.shape[1])[None, :, None] == model.shard(batch["target"], "batch", None)[:, None]
    loss_B2 = -jnp.where(hit_BT2, jax.nn.log_softmax(z_BT2, 1), 0.0).sum(1)
    right_B = (z_BT2.argmax(1) == model.shard(batch["target"], "batch", None)).all(-1)
    return {"windows": classify.sums(batch["rows"], out.aux_B, loss_B2.mean(-1), right_B)}


def outputs(c: Config, model: Model, params: Any, batch: DeviceBatch) -> Predicted:
    """Returns two places a window, the beginning and the end, which choose among its positions."""
    z_BT2 = logits(c, model, params, batch, None)[0]
    return Predicted(z_BT2.swapaxes(1, 2), jnp.broadcast_to(batch["rows"][:, None] / 2, (len(z_BT2), 2)))


def predict(c: Config, model: Model, params: Any, batch: DeviceBatch) -> jax.Array:
    """Returns scores of where the answer begins and ends, `[B, T, 2]`."""
    return logits(c, model, params, batch, None)[0]


def answers(
    c: Config, records: Sequence[Window], predictions: Sequence[np.ndarray]
) -> tuple[list[tuple[str, ...]], list[list[Answer]]]:
    """Returns the true answers and the best predicted ones of each question."""
    parts = _questions_of(records)
    true = [records[part.start]["answers"] for part in parts]
    return true, [best(c, records[part], predictions[part]) for part in parts]


def _questions_of(records: Sequence[Window]) -> list[slice]:
    """Returns where the windows of each question stand among all."""
    firsts = [i for i, record in enumerate(records) if record["window"] == 0]
    return [slice(a, b) for a, b in zip(firsts, [*firsts[1:], len(records)], strict=True)]


def best(c: Config, windows: Sequence[Window], predictions: Sequence[np.ndarray]) -> list[Answer]:
    """Returns the best answers to one question, over its windows."""
    return [Answer(found.text, found.score) for found in best_spans(c, windows, predictions)]


def best_spans(c: Config, windows: Sequence[Window], predictions: Sequence[np.ndarray]) -> list[Span]:
    """Returns the best answers to one question, over its windows, with their places.

    Scores are above that of no answer, which is the lowest of any window.
    """
    none = min(float(z_T2[0].sum()) for z_T2 in predictions)
    spans: dict[tuple[int, int], float] = {}
    for record, z_T2 in zip(windows, predictions, strict=True):
        z_N2 = z_T2[record["first"] : record["first"] + len(record["spans"])]
        size = min(c.max_answer, len(z_N2))
        ends_NA = np.full((len(z_N2), size), -np.inf)  # a: tokens that follow the first
        for a in range(size):
            ends_NA[: len(z_N2) - a, a] = z_N2[a:, 1]
        score_NA = np.where(np.array(record["may_begin"])[:, None], z_N2[:, :1] + ends_NA, -np.inf).ravel()
        for at in np.argsort(-score_NA, kind="stable")[: c.n_best]:
            start, extra = divmod(int(at), size)
            if np.isfinite(score_NA[at]):
                span = record["spans"][start][0], record["spans"][start + extra][1]
                spans[span] = max(spans.get(span, -np.inf), float(score_NA[at]))
    text = windows[0]["context"]
    ranked = [Span(text[a:z], score - none, a, z) for (a, z), score in spans.items() if a < z]
    out = sorted(ranked, key=lambda answer: -answer.score)[: c.n_best]
    if c.no_answer is not False:
        out.append(Span("", -c.threshold, 0, 0))
    return sorted(out, key=lambda answer: -answer.score) or [Span("", 0.0, 0, 0)]


def rows(c: Config, source: str) -> Iterable[tables.Row]:
    """Returns the questions of a file with their texts; of SQuAD's own files too."""
    return squad.rows(source, squad.Names(c.question, c.context, c.answers))


def unlabelled(c: Config, lines: Sequence[tables.Row], row: RowShape, tokenizer: Tokenizer) -> list[Window]:
    """Returns the windows of questions without answers."""
    asked = [Question(line.where, "", line.text(c.question, "objective.question"), str(line.cells[c.context]), ())
             for line in lines if line.text(c.context, "objective.context")]  # fmt: skip
    if len(asked) < len(lines):
        empty = next(line for line in lines if not line.text(c.context, "objective.context"))
        raise ValueError(f"{empty.where}: an empty {c.context}; remove it")
    return _records(c, asked, row, tokenizer)[0]


def told(c: Config, records: Sequence[Window], predictions: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Returns the `answer`, empty if there is none, with its characters `start` and `end` in the text, its `score`
    above that of no answer, and the next `others`."""
    out = []
    for part in _questions_of(records):
        first, *others = [span._asdict() for span in best_spans(c, records[part], predictions[part])[:5]]
        out.append({"answer": first.pop("text")} | first | {"others": others})
    return out


def head_logits(c: Config, model: Model, params: Any, batch: DeviceBatch) -> jax.Array:
    """Computes scores of where an answer begins and ends at any place of plain rows, `[B, T, 2]`."""
    anywhere = jnp.ones_like(batch["tokens"])
    return logits(c, model, params, batch | DeviceBatch(allowed=anywhere), None)[0]


def read_outputs(out: Outputs) -> Config:
    """Returns the settings of a published head, which gives an answer in any case: its files don't say that a text may
    hold none."""
    if len(out.labels) != 2:
        raise ValueError(f"{len(out.labels)} outputs where a beginning and an end are due")
    return Config(no_answer=False)


use = Use[Config](rows, lambda c: "", unlabelled, told)
head = TaskHead[Config](
    "QuestionAnswering", "answer", head_logits, read_outputs, lambda c: Outputs(("LABEL_0", "LABEL_1"))
)
objective = Objective(
    Config, ExampleReader(read), ("encoder",), example=example, totals=totals, loss=loss, specs=specs, check=check,
    infer_from_data=infer_from_data, target_positions=no_tokens, padding="trim",
    prediction=Prediction(predict, answers, "spans", use), head=head, outputs=outputs,
)  # fmt: skip
