"""Counts of each example whose sums give the figures of its field, so that figures can be resampled.

The figures are those of `metrics` (a test says so); where a field has none here, the share of answers that are exactly
right stands for it. N examples, M counts, R resamples, L labels.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.evaluation import metrics, perplexity
from jaxlm.evaluation.bootstrap import Figures, Sample


def _labelled(rows: Iterable[tuple[Sequence[Any], Sequence[Any]]], labels: Sequence[Any]) -> np.ndarray:
    """`[N, 3 L]`: how often each label was found where it is true, is true, was found; of (true, found) labels."""
    number = {label: i for i, label in enumerate(labels)}
    pairs = list(rows)
    out = np.zeros((len(pairs), 3, len(labels)))
    for i, (true, found) in enumerate(pairs):
        for a, b in zip(true, found, strict=True):
            out[i, 0, number[a]] += a == b
            out[i, 1, number[a]] += 1
            out[i, 2, number[b]] += 1
    return out.reshape(len(pairs), -1)


def _per_label(sums_RM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(right, true, found, F1), each `[R, L]`."""
    right_RL, true_RL, found_RL = np.split(sums_RM, 3, axis=1)
    return right_RL, true_RL, found_RL, _ratio(2 * right_RL, true_RL + found_RL)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """0 where nothing is there to divide by."""
    return np.where(b > 0, a / np.where(b > 0, b, 1), 0.0)


def _of_classes(sums_RM: np.ndarray) -> Figures:
    right_RL, true_RL, found_RL, f1_RL = _per_label(sums_RM)
    total, right = true_RL.sum(1), right_RL.sum(1)
    spread = (total**2 - (true_RL**2).sum(1)) * (total**2 - (found_RL**2).sum(1))
    return dict(
        accuracy=right / total,
        f1_macro=f1_RL.mean(1),
        f1_weighted=(f1_RL * true_RL).sum(1) / total,
        mcc=_ratio(right * total - (true_RL * found_RL).sum(1), np.sqrt(np.maximum(spread, 0))),
    )


def _classes(c: Any, true: Sequence[Any], found: Sequence[Any]) -> Sample:
    if c.kind == "regression":
        return _numbers(true, found)
    if c.kind == "multi":
        return _multiple(true, found, c.labels)
    return Sample(_labelled((([a], [b]) for a, b in zip(true, found, strict=True)), c.labels), _of_classes)


def _multiple(true: Sequence[Sequence[str]], found: Sequence[Sequence[str]], labels: Sequence[str]) -> Sample:
    a_NL, b_NL = (np.array([[label in row for label in labels] for row in rows], float) for rows in (true, found))
    exact_N1 = (a_NL == b_NL).all(1, keepdims=True).astype(float)

    def figures(sums_RM: np.ndarray) -> Figures:
        right_RL, true_RL, found_RL, f1_RL = _per_label(sums_RM[:, 2:])
        micro = _ratio(2 * right_RL.sum(1), (true_RL + found_RL).sum(1))
        return dict(f1_micro=micro, f1_macro=f1_RL.mean(1), exact=sums_RM[:, 0] / sums_RM[:, 1])

    return Sample(np.hstack([exact_N1, np.ones_like(exact_N1), a_NL * b_NL, a_NL, b_NL]), figures)


def _numbers(true: Sequence[float], found: Sequence[float]) -> Sample:
    """Without Spearman's correlation, which is no function of sums."""
    x, y = np.array(true, float), np.array(found, float)
    x, y = x - x.mean(), y - x.mean()  # correlations of large numbers would lose digits

    def figures(sums_RM: np.ndarray) -> Figures:
        n, a, b, aa, bb, ab, error = sums_RM.T
        return dict(pearson=(ab - a * b / n) / np.sqrt((aa - a * a / n) * (bb - b * b / n)), mse=error / n)

    return Sample(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y, (x - y) ** 2], 1), figures)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first word, word after the last): begun by B- and continued by I- of its kind, nothing else (strict)."""
    out, kind, begun = set(), "", 0
    for i, tag in enumerate([*tags, "O"]):
        if kind and tag != f"I-{kind}":
            out.add((kind, begun, i))
            kind = ""
        if tag.startswith("B-"):
            kind, begun = tag[2:], i
    return out


def _tags(c: Any, true: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> Sample:
    words_NM = _labelled(zip(true, found, strict=True), c.labels)
    both = [(entities(a), entities(b)) for a, b in zip(true, found, strict=True)]
    spans_N3 = np.array([(len(a & b), len(a), len(b)) for a, b in both], float)

    def figures(sums_RM: np.ndarray) -> Figures:
        out = {f"word_{name}": value for name, value in _of_classes(sums_RM[:, 3:]).items()}
        if not metrics.is_spans(c.labels):
            return out
        right, there, told = sums_RM[:, :3].T
        return out | dict(
            precision=_ratio(right, told), recall=_ratio(right, there), f1=_ratio(2 * right, there + told)
        )

    return Sample(np.hstack([spans_N3, words_NM]), figures)


def _relations(c: Any, true: Sequence[str], found: Sequence[str]) -> Sample:
    kinds = sorted({metrics.relation(label) for label in c.labels if label != c.negative})
    counts_N3L = np.zeros((len(true), 3, len(kinds)))
    for i, pair in enumerate(zip(true, found, strict=True)):
        for kind, *each in metrics.related(*pair, c.negative or ""):
            counts_N3L[i, :, kinds.index(kind)] = each
    right_N = np.array([float(a == b) for a, b in zip(true, found, strict=True)])

    def figures(sums_RM: np.ndarray) -> Figures:
        right_RL, true_RL, found_RL, f1_RL = _per_label(sums_RM[:, 2:])
        right, there, told = right_RL.sum(1), true_RL.sum(1), found_RL.sum(1)
        return dict(
            f1_macro=f1_RL.mean(1), f1_micro=_ratio(2 * right, there + told), precision=_ratio(right, told),
            recall=_ratio(right, there), accuracy=sums_RM[:, 1] / sums_RM[:, 0],
        )  # fmt: skip

    return Sample(np.column_stack([np.ones_like(right_N), right_N, counts_N3L.reshape(len(true), -1)]), figures)


def _spans(c: Any, true: Sequence[Sequence[str]], found: Sequence[Sequence[tuple[str, float]]]) -> Sample:
    each_N2 = np.array([metrics.match(a, b[0][0]) for a, b in zip(true, found, strict=True)])
    there_N1 = np.array([[float(bool(a))] for a in true])

    def figures(sums_RM: np.ndarray) -> Figures:
        n, exact, f1, there, there_exact, there_f1 = sums_RM.T
        out = dict(exact=exact / n, f1=f1 / n)
        if not 0 < there_N1.sum() < len(true):
            return out
        out |= dict(hasans_exact=there_exact / there, hasans_f1=there_f1 / there)
        return out | dict(noans_exact=(exact - there_exact) / (n - there), noans_f1=(f1 - there_f1) / (n - there))

    return Sample(np.hstack([np.ones_like(there_N1), each_N2, there_N1, there_N1 * each_N2]), figures, unit="questions")


COUNTS: dict[str, Callable[[Any, Any, Any], Sample]] = {
    "classes": _classes,
    "tags": _tags,
    "relations": _relations,
    "choices": lambda c, true, found: means({"accuracy": [float(a == b) for a, b in zip(true, found, strict=True)]}),
    "spans": _spans,
}


def means(values: Mapping[str, Sequence[float]], keys: Sequence[Any] = ()) -> Sample:
    """Of figures that are means over the examples."""
    table_NM = np.array([np.ones(len(next(iter(values.values())))), *values.values()], float).T
    return Sample(table_NM, lambda sums_RM: dict(zip(values, (sums_RM[:, 1:] / sums_RM[:, :1]).T, strict=True)), keys)


def places(items: Sequence[dict], answers: int) -> list[str | None]:
    """Where each answer's item stands. Several items may belong to one, as the windows of a text do: they come from
    the same place."""
    out = [item.get("where") for item in items]
    return out if len(out) == answers else list(dict.fromkeys(out))


def of_answers(scores: str, c: Any, items: Sequence[dict], true: Sequence[Any], found: Sequence[Any]) -> Sample:
    """Of predictions. `scores`: what their objective calls them."""
    keys = [(place, repr(answer)) for place, answer in zip(places(items, len(true)), true, strict=True)]
    if scores in COUNTS:
        return COUNTS[scores](c, true, found)._replace(keys=keys)
    return means({"exact": [float(a == b) for a, b in zip(true, found, strict=True)]}, keys)


def of_losses(parts: Sequence[perplexity.Part], keys: Sequence[Any] = ()) -> Sample:
    """Of what `perplexity.parts` gives: the batches are the examples, so that the figures of few say little."""
    sums, totals = parts[0]
    columns = [(name, metric) for name, values in sums.items() for metric in values]
    rows = [[s[name][metric] for name, metric in columns] + [t[name] for name in totals] for s, t in parts]

    def figures(sums_RM: np.ndarray) -> Figures:
        added: dict[str, dict[str, Any]] = {name: {} for name in sums}
        for (name, metric), value_R in zip(columns, sums_RM.T, strict=False):
            added[name][metric] = value_R
        weights = dict(zip(totals, sums_RM[:, len(columns) :].T, strict=True))
        return {k: v for k, v in perplexity.means(added, weights).items() if k.rpartition("/")[2] != "targets"}

    return Sample(np.array(rows, float), figures, keys, "batches")


def keyed(batches: Iterable[Mapping[str, Any]], keys: list[int]) -> Iterator[Mapping[str, Any]]:
    """The batches, having put a checksum of each into `keys`."""
    for batch in batches:
        held = [np.asarray(shard.data) for name in sorted(batch) for shard in batch[name].addressable_shards]
        keys.append(zlib.crc32(b"".join(leaf.tobytes() for leaf in held)))
        yield batch


# How the harness's metrics that are not means over examples come from its pairs (log likelihood, size).
RATIOS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "bits_per_byte": lambda likelihood, size: -likelihood / size / np.log(2),
    "byte_perplexity": lambda likelihood, size: np.exp(-likelihood / size),
    "word_perplexity": lambda likelihood, size: np.exp(-likelihood / size),
}


def of_task(examples: Sequence[dict]) -> Sample:
    """Of the harness's examples of one task; a metric that is neither a number nor a known pair is left out."""
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


def of_tasks(found: dict[str, list[dict]]) -> dict[str, Sample]:
    """By task, and filter of its answers where it has several."""
    out = {}
    for task, examples in found.items():
        filters = list(dict.fromkeys(e.get("filter") for e in examples))
        for name in filters:
            these = [e for e in examples if e.get("filter") == name]
            out[task if len(filters) == 1 else f"{task},{name}"] = of_task(these)
    return out
