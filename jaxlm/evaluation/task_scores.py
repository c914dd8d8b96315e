"""Predictions of a trained task, and what the field's libraries say of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxlm.evaluation import metrics, samples
from jaxlm.evaluation.bootstrap import Sample

# By the name of an objective's `scores`: (settings, true, predicted answers) → (figures, report to print).
SCORES: dict[str, Callable[[Any, Any, Any], tuple[dict[str, float], str]]] = {
    "classes": lambda c, true, predicted: metrics.KINDS[c.kind](true, predicted, c.labels),
    "tags": lambda c, true, predicted: metrics.tags(true, predicted, c.labels),
    "relations": lambda c, true, predicted: metrics.relations(true, predicted, c.labels, c.negative or ""),
    "choices": lambda c, true, predicted: metrics.choices(true, predicted),
    "spans": lambda c, true, predicted: metrics.spans(true, predicted),
}


# By the same name: settings → the figures that there may be, of which some need what the data has.
FIGURES: dict[str, Callable[[Any], tuple[str, ...]]] = {
    "classes": lambda c: metrics.FIGURES[c.kind],
    "tags": lambda c: (*(f"word_{name}" for name in metrics.FIGURES["single"]), "precision", "recall", "f1"),
    "relations": lambda c: ("f1_macro", "f1_micro", "precision", "recall", "accuracy"),
    "choices": lambda c: ("accuracy",),
    "spans": lambda c: ("exact", "f1", "hasans_exact", "hasans_f1", "noans_exact", "noans_f1", "best_f1"),
}


class Judged(NamedTuple):
    figures: dict[str, float]
    report: str
    sample: Sample
    """What the figures are resampled from."""
    examples: list[dict[str, Any]]
    """The file and line, the true answer and the predicted one of each example."""
    classes: Sample | None
    """What the figures of each class are resampled from; None: the task has no classes."""


def judge(scores: str, c: Any, records: Sequence[Any], true: Sequence[Any], predicted: Sequence[Any]) -> Judged:
    """Scores predicted answers by the row `scores` of the table.

    `c`: the objective's settings. `records`: those that the answers belong to, each with its file and line as `where`;
    several may share an answer.
    """
    figures, report = SCORES[scores](c, true, predicted)
    sample = samples.of_answers(scores, c, records, true, predicted)
    examples = [dict(where=where, true=a, found=b)
                for where, a, b in zip(samples.places(records, len(true)), true, predicted, strict=True)]  # fmt: skip
    return Judged(figures, report, sample, examples, samples.by_class(scores, c, true, predicted))
