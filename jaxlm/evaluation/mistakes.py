"""Says what a task's predictions get wrong: each class's figures, what was taken for what, and the wrong examples that
the model was surest of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.evaluation import metrics
from jaxlm.evaluation.bootstrap import Sample

HARDEST, LONGEST = 20, 400
"""How many wrong examples are told, and how many characters of a text or an answer."""
MOST_CONFUSED, MOST_CLASSES = 24, 100
"""How many classes a table of confusions has, and how many have figures."""


def mistakes(
    scores: str,
    c: Any,
    true: Sequence[Any],
    predicted: Sequence[Any],
    classes: Sample | None,
    places: Sequence[Any],
    losses: Mapping[Any, float],
    record: Callable[[int], tuple[str, Sequence[str]]],
) -> dict[str, Any]:
    """Returns what predictions get wrong, as values that JSON has.

    `scores`: the row of `task_scores.SCORES` that judges them; `c`: the objective's settings; `places`: where each
    example comes from; `losses`: those that are known, by place; `record`: number of an example → its text, and its
    words where tags are predicted of them.

    `over` examples of which `wrong` are (None where answers are numbers), `classes` with precision, recall, F1 and
    support, `confusion` with labels and counts by [true][predicted], and the `hardest` examples.
    """
    numbers = scores == "classes" and c.kind == "regression"
    wrong = [i for i, (a, b) in enumerate(zip(true, predicted, strict=True)) if _is_wrong(scores, a, b)]
    # Without losses the order is that of the data; NaN, of an example without targets, comes last.
    sure = {i: float(losses.get(places[i], np.nan)) for i in wrong}
    hardest = sorted(wrong, key=lambda i: (np.isnan(sure[i]), -sure[i] if np.isfinite(sure[i]) else 0.0))[:HARDEST]
    out: dict[str, Any] = {
        "over": len(true),
        "wrong": None if numbers else len(wrong),
        "hardest": [_told(scores, places[i], sure[i], true[i], predicted[i], *record(i)) for i in hardest],
    }
    if classes is not None:
        out["classes"] = _class_figures(classes)
    if (pairs := _pairs(scores, c, true, predicted)) is not None:
        out["confusion"] = confusion(*pairs)
    return out


def _is_wrong(scores: str, true: Any, predicted: Any) -> bool:
    return metrics.match(true, predicted[0][0])[0] < 1 if scores == "spans" else bool(true != predicted)


def _told(
    scores: str, place: Any, loss: float, true: Any, predicted: Any, text: str, words: Sequence[str]
) -> dict[str, Any]:
    if scores == "tags":
        differ = [i for i, (a, b) in enumerate(zip(true, predicted, strict=True)) if a != b]
        true, predicted = ([f"{words[i]}: {tags[i]}" for i in differ] for tags in (true, predicted))
    elif scores == "choices":
        true, predicted = (chr(ord("A") + number) for number in (true, predicted))
    elif scores == "spans":
        true, predicted = list(true) or "no answer", predicted[0][0] or "no answer"
    return {"where": place if isinstance(place, str) else None, "text": _cut(text), "true": _cut(_shown(true)),
            "found": _cut(_shown(predicted)), "loss": None if np.isnan(loss) else loss}  # fmt: skip


def _shown(answer: Any) -> str:
    """Returns an answer as text: a label, a number, or several labels."""
    if isinstance(answer, str):
        return answer
    return f"{answer:.4g}" if isinstance(answer, int | float) else ", ".join(map(str, answer))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def _class_figures(classes: Sample) -> dict[str, dict[str, float]]:
    """Returns the figures of the classes that are true of most."""
    out: dict[str, dict[str, float]] = {}
    for name, values_R in classes.figures(classes.counts_NM.sum(0, keepdims=True)).items():
        kind, _, figure = name.rpartition("/")
        out.setdefault(kind, {})[figure] = float(values_R[0])
    most = sorted(out, key=lambda kind: -out[kind]["support"])[:MOST_CLASSES]
    return {kind: figures for kind, figures in out.items() if kind in set(most)}


def _pairs(
    scores: str, c: Any, true: Sequence[Any], predicted: Sequence[Any]
) -> tuple[Sequence[str], Sequence[str], Sequence[str]] | None:
    """Returns (true labels, predicted labels, all labels) of a task in which one label stands against another."""
    if (scores == "classes" and c.kind == "single") or scores == "relations":
        return true, predicted, c.labels
    if scores == "tags":
        return [x for tags in true for x in tags], [x for tags in predicted for x in tags], c.labels
    if scores == "choices":
        letters = [[chr(ord("A") + number) for number in numbers] for numbers in (true, predicted)]
        return *letters, sorted({*letters[0], *letters[1]})  # type: ignore[return-value]
    return None


def confusion(true: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Counts how often each label was taken for each other: `counts` by [true][predicted] of the `labels` with the most
    mistakes, in their own order; how many are `left_out`."""
    number = {label: i for i, label in enumerate(labels)}
    counts_LL = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(counts_LL, ([number[x] for x in true], [number[x] for x in predicted]), 1)
    mistakes_L = counts_LL.sum(0) + counts_LL.sum(1) - 2 * counts_LL.diagonal()
    kept = np.sort(np.argsort(-mistakes_L, kind="stable")[:MOST_CONFUSED])
    return {"labels": [labels[i] for i in kept], "counts": counts_LL[np.ix_(kept, kept)].tolist(),
            "left_out": len(labels) - len(kept)}  # fmt: skip
