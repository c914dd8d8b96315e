"""Scores by the libraries that each field uses, so that figures compare with papers; they are the extra `eval`."""

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"these scores need {name.partition('.')[0]}: pip install 'jaxlm[eval]'") from None


def entities(true: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> tuple[dict[str, float], str]:
    """(precision, recall and F1 over all entities, per-class report) by seqeval, strict mode, IOB2."""
    seqeval, scheme = _library("seqeval.metrics"), _library("seqeval.scheme").IOB2
    lists = [list(row) for row in true], [list(row) for row in found]
    strict = dict(mode="strict", scheme=scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that nothing was found of: their precision is 0
        values = {name: float(getattr(seqeval, f"{name}_score")(*lists, zero_division=0, **strict))
                  for name in ("precision", "recall", "f1")}  # fmt: skip
        report = seqeval.classification_report(*lists, digits=4, zero_division=0, **strict)
    return values, report


def classes(true: Sequence[str], found: Sequence[str], labels: Sequence[str]) -> tuple[dict[str, float], str]:
    """(accuracy, macro and weighted F1, Matthews correlation; per-class report) by scikit-learn."""
    sklearn = _library("sklearn.metrics")
    report = sklearn.classification_report(true, found, labels=list(labels), digits=4, zero_division=0)
    f1 = {f"f1_{how}": float(sklearn.f1_score(true, found, average=how, labels=list(labels), zero_division=0))
          for how in ("macro", "weighted")}  # fmt: skip
    values = dict(accuracy=float(sklearn.accuracy_score(true, found)))
    return values | f1 | dict(mcc=float(sklearn.matthews_corrcoef(true, found))), report


def is_spans(labels: Sequence[str]) -> bool:
    """Whether tags mark spans in IOB2."""
    return "O" in labels and all(label == "O" or label[:2] in ("B-", "I-") for label in labels)


def tags(true: Sequence[Sequence[str]], found: Sequence[Sequence[str]], labels: Sequence[str]) -> tuple[dict, str]:
    """Of words, and of entities where tags mark them: figures, and the reports to print."""
    flat = [tag for row in true for tag in row], [tag for row in found for tag in row]
    values, report = classes(*flat, labels=labels)
    values = {f"word_{name}": value for name, value in values.items()}
    text = f"words (scikit-learn)\n{report}"
    if is_spans(labels):
        of_entities, report = entities(true, found)
        values |= of_entities
        text += f"\nentities (seqeval, strict, IOB2)\n{report}"
    return values, text


def multiple(true: Sequence[Sequence[str]], found: Sequence[Sequence[str]], labels: Sequence[str]) -> tuple[dict, str]:
    """Several labels of each text: (micro and macro F1, share of texts with all of them right; per-class report)."""
    sklearn = _library("sklearn.metrics")
    table = [[[label in row for label in labels] for row in rows] for rows in (true, found)]
    f1 = {f"f1_{how}": float(sklearn.f1_score(*table, average=how, zero_division=0)) for how in ("micro", "macro")}
    report = sklearn.classification_report(*table, target_names=list(labels), digits=4, zero_division=0)
    return f1 | dict(exact=float(sklearn.accuracy_score(*table))), report


def numbers(true: Sequence[float], found: Sequence[float], labels: Sequence[str] = ()) -> tuple[dict[str, float], str]:
    """(correlations of Pearson and Spearman by SciPy, mean squared error)."""
    stats = _library("scipy.stats")
    error = sum((a - b) ** 2 for a, b in zip(true, found, strict=True)) / len(true)
    values = dict(pearson=float(stats.pearsonr(true, found).statistic), mse=error)
    values["spearman"] = float(stats.spearmanr(true, found).statistic)
    return values, "\n".join(f"{name:10} {value:.4f}" for name, value in values.items()) + "\n"


# Of classification, by its kind.
KINDS: dict[str, Callable[..., tuple[dict, str]]] = {"single": classes, "multi": multiple, "regression": numbers}
