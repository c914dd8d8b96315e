"""Each example gets counts whose sums give the figures of its field, so that figures can be resampled.

The figures are those of `metrics` (a test says so); where a field has none here, the share of answers that are exactly
right stands for it. N examples, M counts, R resamples, L labels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.evaluation import metrics, perplexity
from jaxlm.evaluation.bootstrap import Figures, Sample


def _label_counts(examples: Iterable[tuple[Sequence[Any], Sequence[Any]]], labels: Sequence[Any]) -> np.ndarray:
    """Counts in each example how often each label is rightly predicted, is true, is predicted: `[N, 3 L]`.

    An example is (true labels, predicted labels).
    """
    number = {label: i for i, label in enumerate(labels)}
    pairs = list(examples)
    out = np.zeros((len(pairs), 3, len(labels)))
    for i, (true, predicted) in enumerate(pairs):
        for a, b in zip(true, predicted, strict=True):
            out[i, 0, number[a]] += a == b
            out[i, 1, number[a]] += 1
            out[i, 2, number[b]] += 1
    return out.reshape(len(pairs), -1)


def _per_label(sums_RM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (right, true, predicted, F1), each `[R, L]`."""
    right_RL, true_RL, predicted_RL = np.split(sums_RM, 3, axis=1)
    return right_RL, true_RL, predicted_RL, _ratio(2 * right_RL, true_RL + predicted_RL)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divides, with 0 where the divisor is 0."""
    return np.where(b > 0, a / np.where(b > 0, b, 1), 0.0)


def _of_classes(sums_RM: np.ndarray) -> Figures:
    right_RL, true_RL, predicted_RL, f1_RL = _per_label(sums_RM)
    total, right = true_RL.sum(1), right_RL.sum(1)
    spread = (total**2 - (true_RL**2).sum(1)) * (total**2 - (predicted_RL**2).sum(1))
    return dict(
        accuracy=right / total,
        f1_macro=f1_RL.mean(1),
        f1_weighted=(f1_RL * true_RL).sum(1) / total,
        mcc=_ratio(right * total - (true_RL * predicted_RL).sum(1), np.sqrt(np.maximum(spread, 0))),
    )


def _classes(c: Any, true: Sequence[Any], predicted: Sequence[Any]) -> Sample:
    if c.kind == "regression":
        return _numbers(true, predicted)
    if c.kind == "multi":
        return _multiple(true, predicted, c.labels)
    return Sample(_label_counts((([a], [b]) for a, b in zip(true, predicted, strict=True)), c.labels), _of_classes)


def _multiple(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], labels: Sequence[str]) -> Sample:
    a_NL, b_NL = (
        np.array([[label in text for label in labels] for text in texts], float) for texts in (true, predicted)
    )
    exact_N1 = (a_NL == b_NL).all(1, keepdims=True).astype(float)

    def figures(sums_RM: np.ndarray) -> Figures:
        right_RL, true_RL, predicted_RL, f1_RL = _per_label(sums_RM[:, 2:])
        micro = _ratio(2 * right_RL.sum(1), (true_RL + predicted_RL).sum(1))
        return dict(f1_micro=micro, f1_macro=f1_RL.mean(1), exact=sums_RM[:, 0] / sums_RM[:, 1])

    return Sample(np.hstack([exact_N1, np.ones_like(exact_N1), a_NL * b_NL, a_NL, b_NL]), figures)


def _numbers(true: Sequence[float], predicted: Sequence[float]) -> Sample:
    """Leaves out Spearman's correlation, which is no function of sums."""
    x, y = np.array(true, float), np.array(predicted, float)
    x, y = x - x.mean(), y - x.mean()  # correlations of large numbers would lose digits

    def figures(sums_RM: np.ndarray) -> Figures:
        n, a, b, aa, bb, ab, error = sums_RM.T
        return dict(pearson=(ab - a * b / n) / np.sqrt((aa - a * a / n) * (bb - b * b / n)), mse=error / n)

    return Sample(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y, (x - y) ** 2], 1), figures)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Returns the entities as (kind, first word, word after the last).

    One begins with B- and goes on with I- of its kind, nothing else (seqeval's strict mode).
    """
    out, kind, start = set(), "", 0
    for i, tag in enumerate([*tags, "O"]):
        if kind and tag != f"I-{kind}":
            out.add((kind, start, i))
            kind = ""
        if tag.startswith("B-"):
            kind, start = tag[2:], i
    return out


def _tags(c: Any, true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Sample:
    words_NM = _label_counts(zip(true, predicted, strict=True), c.labels)
    both = [(entities(a), entities(b)) for a, b in zip(true, predicted, strict=True)]
    spans_N3 = np.array([(len(a & b), len(a), len(b)) for a, b in both], float)

    def figures(sums_RM: np.ndarray) -> Figures:
        out = {f"word_{name}": value for name, value in _of_classes(sums_RM[:, 3:]).items()}
        if not metrics.is_spans(c.labels):
            return out
        right, actual, predicted = sums_RM[:, :3].T
        f1 = _ratio(2 * right, actual + predicted)
        return out | dict(precision=_ratio(right, predicted), recall=_ratio(right, actual), f1=f1)

    return Sample(np.hstack([spans_N3, words_NM]), figures)


def _entity_counts(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], kinds: Sequence[str]
                   ) -> np.ndarray:  # fmt: skip
    """Counts in each text the entities of each kind that are rightly predicted, are true, are predicted: `[N, 3 L]`."""
    out = np.zeros((len(true), 3, len(kinds)))
    number = {kind: i for i, kind in enumerate(kinds)}
    for i, (a, b) in enumerate(zip(true, predicted, strict=True)):
        for row, found in enumerate((entities(a) & entities(b), entities(a), entities(b))):
            for kind, *_ in found:
                out[i, row, number[kind]] += 1
    return out.reshape(len(true), -1)


def _relation_counts(c: Any, true: Sequence[str], predicted: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Returns the relations without their directions, and how often each is rightly predicted, is true, is predicted in
    each example: `[N, 3, L]`."""
    kinds = sorted({metrics.relation(label) for label in c.labels if label != c.negative})
    counts_N3L = np.zeros((len(true), 3, len(kinds)))
    for i, pair in enumerate(zip(true, predicted, strict=True)):
        for kind, *each in metrics.related(*pair, c.negative or ""):
            counts_N3L[i, :, kinds.index(kind)] = each
    return kinds, counts_N3L


def by_class(scores: str, c: Any, true: Sequence[Any], predicted: Sequence[Any]) -> Sample | None:
    """Returns the sample of each class's figures: `CLASS/precision`, `CLASS/recall`, `CLASS/f1` and `CLASS/support`,
    the number of true ones. None: the task has no classes.

    Classes are labels, relations without their directions and without the negative label, kinds of entities where tags
    mark them, else tags.
    """
    if scores == "classes" and c.kind == "single":
        names, counts = c.labels, _label_counts((([a], [b]) for a, b in zip(true, predicted, strict=True)), c.labels)
    elif scores == "classes" and c.kind == "multi":
        names = c.labels
        a_NL, b_NL = (np.array([[label in text for label in names] for text in texts]) for texts in (true, predicted))
        counts = np.hstack([a_NL & b_NL, a_NL, b_NL]).astype(float)
    elif scores == "relations":
        names, counts = _relation_counts(c, true, predicted)
        counts = counts.reshape(len(true), -1)
    elif scores == "tags" and metrics.is_spans(c.labels):
        names = sorted({label[2:] for label in c.labels if label != "O"})
        counts = _entity_counts(true, predicted, names)
    elif scores == "tags":
        names, counts = c.labels, _label_counts(zip(true, predicted, strict=True), c.labels)
    else:
        return None

    def figures(sums_RM: np.ndarray) -> Figures:
        right_RL, true_RL, predicted_RL, f1_RL = _per_label(sums_RM)
        each = dict(precision=_ratio(right_RL, predicted_RL), recall=_ratio(right_RL, true_RL), f1=f1_RL,
                    support=true_RL)  # fmt: skip
        return {f"{name}/{metric}": x_RL[:, i] for i, name in enumerate(names) for metric, x_RL in each.items()}

    return Sample(counts, figures)


def _relations(c: Any, true: Sequence[str], predicted: Sequence[str]) -> Sample:
    _, counts_N3L = _relation_counts(c, true, predicted)
    right_N = np.array([float(a == b) for a, b in zip(true, predicted, strict=True)])

    def figures(sums_RM: np.ndarray) -> Figures:
        right_RL, true_RL, predicted_RL, f1_RL = _per_label(sums_RM[:, 2:])
        right, actual, predicted = right_RL.sum(1), true_RL.sum(1), predicted_RL.sum(1)
        return dict(
            f1_macro=f1_RL.mean(1), f1_micro=_ratio(2 * right, actual + predicted), precision=_ratio(right, predicted),
            recall=_ratio(right, actual), accuracy=sums_RM[:, 1] / sums_RM[:, 0],
        )  # fmt: skip

    return Sample(np.column_stack([np.ones_like(right_N), right_N, counts_N3L.reshape(len(true), -1)]), figures)


def _spans(c: Any, true: Sequence[Sequence[str]], predicted: Sequence[Sequence[tuple[str, float]]]) -> Sample:
    each_N2 = np.array([metrics.match(a, b[0][0]) for a, b in zip(true, predicted, strict=True)])
    answered_N1 = np.array([[float(bool(a))] for a in true])

    def figures(sums_RM: np.ndarray) -> Figures:
        n, exact, f1, answered, answered_exact, answered_f1 = sums_RM.T
        out = dict(exact=exact / n, f1=f1 / n)
        if not 0 < answered_N1.sum() < len(true):
            return out
        out |= dict(hasans_exact=answered_exact / answered, hasans_f1=answered_f1 / answered)
        unanswered, rest_exact, rest_f1 = n - answered, exact - answered_exact, f1 - answered_f1
        return out | dict(noans_exact=rest_exact / unanswered, noans_f1=rest_f1 / unanswered)

    counts_NM = np.hstack([np.ones_like(answered_N1), each_N2, answered_N1, answered_N1 * each_N2])
    return Sample(counts_NM, figures, unit="questions")


COUNTS: dict[str, Callable[[Any, Any, Any], Sample]] = {
    "classes": _classes,
    "tags": _tags,
    "relations": _relations,
    "choices": lambda c, true, predicted: means(
        {"accuracy": [float(a == b) for a, b in zip(true, predicted, strict=True)]}
    ),
    "spans": _spans,
}


def means(values: Mapping[str, Sequence[float]], keys: Sequence[Any] = ()) -> Sample:
    """Returns the sample of figures that are means over the examples; `values` has each figure's value by example."""
    table_NM = np.array([np.ones(len(next(iter(values.values())))), *values.values()], float).T
    return Sample(table_NM, lambda sums_RM: dict(zip(values, (sums_RM[:, 1:] / sums_RM[:, :1]).T, strict=True)), keys)


def places(items: Sequence[dict], answers: int) -> list[str | None]:
    """Returns where in its source each answer's item comes from.

    Several items may belong to one answer, as the windows of a text do: they come from the same place.
    """
    out = [item.get("where") for item in items]
    return out if len(out) == answers else list(dict.fromkeys(out))


def of_answers(scores: str, c: Any, items: Sequence[dict], true: Sequence[Any], predicted: Sequence[Any]) -> Sample:
    """Returns the sample of predictions. `scores` is the objective's name for the kind of its scores."""
    keys = [(place, repr(answer)) for place, answer in zip(places(items, len(true)), true, strict=True)]
    if scores in COUNTS:
        return COUNTS[scores](c, true, predicted)._replace(keys=keys)
    return means({"exact": [float(a == b) for a, b in zip(true, predicted, strict=True)]}, keys)


def of_losses(found: perplexity.Tally, whole: bool = True) -> Sample:
    """Returns the sample of losses by document or example: the `whole` of their figures or, for a task that has scores
    of its own, the loss alone."""
    counts_NM, keys, unit = found.table()

    def figures(sums_RM: np.ndarray) -> Figures:
        means = perplexity.means(*perplexity.nested(found.columns, sums_RM.T))
        return {k: v for k, v in means.items() if (k.rpartition("/")[2] != "targets" if whole else is_loss(k))}

    return Sample(counts_NM, figures, keys, unit)


def is_loss(name: str) -> bool:
    """Returns whether a figure is a loss that is minimised."""
    return name.rpartition("/")[2] == "loss"


# The harness's metrics that are not means over examples, computed from summed pairs (log likelihood, size).
RATIOS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "bits_per_byte": lambda likelihood, size: -likelihood / size / np.log(2),
    "byte_perplexity": lambda likelihood, size: np.exp(-likelihood / size),
    "word_perplexity": lambda likelihood, size: np.exp(-likelihood / size),
}


def of_task(examples: Sequence[dict]) -> Sample:
    """Returns the sample of one task's examples in the harness's form.

    A metric that is neither a number nor a known pair is left out.
    """
    keys = [(e["doc_id"], e.get("filter"), e.get("doc_hash")) for e in examples]
    columns: dict[str, Sequence[float]] = {}
    ratios: dict[str, Sequence[Sequence[float]]] = {}
    for name in examples[0]["metrics"]:
        values = [e[name] for e in examples]
        if all(isinstance(v, bool | int | float) for v in values):
            columns[name] = [float(v) for v in values]
        elif name in RATIOS:
            ratios[name] = values
    ones = np.ones(len(examples))
    counts_NM = np.column_stack([ones, *columns.values(), *(np.array(v, float) for v in ratios.values())])

    def figures(sums_RM: np.ndarray) -> Figures:
        n, rest = sums_RM[:, 0], sums_RM[:, 1 + len(columns) :]
        out = {name: sums_RM[:, 1 + i] / n for i, name in enumerate(columns)}
        return out | {name: RATIOS[name](rest[:, 2 * i], rest[:, 2 * i + 1]) for i, name in enumerate(ratios)}

    return Sample(counts_NM, figures, keys)


def of_tasks(examples_by_task: dict[str, list[dict]]) -> dict[str, Sample]:
    """Returns a sample for each task, and for each filter of its answers where a task has several."""
    out = {}
    for task, examples in examples_by_task.items():
        filters = list(dict.fromkeys(e.get("filter") for e in examples))
        for name in filters:
            these = [e for e in examples if e.get("filter") == name]
            out[task if len(filters) == 1 else f"{task},{name}"] = of_task(these)
    return out
