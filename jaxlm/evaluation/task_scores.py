"""Predictions of a trained task, and what the field's libraries say of them."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from jaxlm.evaluation import metrics, samples
from jaxlm.evaluation.bootstrap import Sample

# By what an objective calls its `scores`: (config, true, predicted) → (figures, report to print).
SCORES: dict[str, Callable[[Any, Any, Any], tuple[dict[str, float], str]]] = {
    "classes": lambda c, true, found: metrics.KINDS[c.kind](true, found, c.labels),
    "tags": lambda c, true, found: metrics.tags(true, found, c.labels),
    "relations": lambda c, true, found: metrics.relations(true, found, c.labels, c.negative or ""),
    "choices": lambda c, true, found: metrics.choices(true, found),
    "spans": lambda c, true, found: metrics.spans(true, found),
}


def score(objective: ModuleType, c: Any, items: Sequence[dict], found: Sequence[np.ndarray]) -> tuple[dict, str]:
    """Of predictions for all items, in their order."""
    return SCORES[objective.scores](c, *objective.answers(c, items, found))


class Judged(NamedTuple):
    figures: dict[str, float]
    report: str
    sample: Sample
    """To be resampled."""
    examples: list[dict[str, Any]]
    """Where each stands, what is true, what was found."""


def judge(objective: ModuleType, c: Any, items: Sequence[dict], found: Sequence[np.ndarray]) -> Judged:
    """All that is to be said of the same predictions."""
    true, told = objective.answers(c, items, found)
    values, report = SCORES[objective.scores](c, true, told)
    sample = samples.of_answers(objective.scores, c, items, true, told)
    rows = [dict(where=where, true=a, found=b)
            for where, a, b in zip(samples.places(items, len(true)), true, told, strict=True)]  # fmt: skip
    return Judged(values, report, sample, rows)
