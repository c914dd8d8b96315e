"""Predictions of a trained task, and what the field's libraries say of them."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from jaxlm.eval import counts, metrics
from jaxlm.eval.compare import Sample

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


def sample(objective: ModuleType, c: Any, items: Sequence[dict], found: Sequence[np.ndarray]) -> Sample:
    """The same predictions, to be resampled."""
    return counts.of_answers(objective.scores, c, items, *objective.answers(c, items, found))
