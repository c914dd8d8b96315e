"""Scores come from the libraries that each field uses, so that figures compare with papers (the extra `eval`)."""

import collections
import importlib
import re
import string
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import Any


def import_library(name: str) -> Any:
    """Imports a module of the extra `eval`; raises a ValueError that says how to install it where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"these scores need {name.partition('.')[0]}: pip install 'jaxlm[eval]'") from None


def entities(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> tuple[dict[str, float], str]:
    """Returns ({precision, recall, f1} over all entities, report by class) by seqeval, strict mode, IOB2."""
    seqeval, scheme = import_library("seqeval.metrics"), import_library("seqeval.scheme").IOB2
    lists = [list(text) for text in true], [list(text) for text in predicted]
    strict = dict(mode="strict", scheme=scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes that nothing was predicted of: their precision is 0
        values = {name: float(getattr(seqeval, f"{name}_score")(*lists, zero_division=0, **strict))
                  for name in ("precision", "recall", "f1")}  # fmt: skip
        report = seqeval.classification_report(*lists, digits=4, zero_division=0, **strict)
    return values, report


def classes(true: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> tuple[dict[str, float], str]:
    """Returns ({accuracy, macro and weighted F1, Matthews correlation}, report by class) by scikit-learn."""
    sklearn = import_library("sklearn.metrics")
    report = sklearn.classification_report(true, predicted, labels=list(labels), digits=4, zero_division=0)
    f1 = {f"f1_{kind}": float(sklearn.f1_score(true, predicted, average=kind, labels=list(labels), zero_division=0))
          for kind in ("macro", "weighted")}  # fmt: skip
    values = dict(accuracy=float(sklearn.accuracy_score(true, predicted)))
    return values | f1 | dict(mcc=float(sklearn.matthews_corrcoef(true, predicted))), report


def is_spans(labels: Sequence[str]) -> bool:
    """Says whether tags mark spans in IOB2."""
    return "O" in labels and all(label == "O" or label[:2] in ("B-", "I-") for label in labels)


def tags(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], labels: Sequence[str]) -> tuple[dict, str]:
    """Returns (figures, report) over words, and over entities where tags mark them."""
    flat = [tag for text in true for tag in text], [tag for text in predicted for tag in text]
    values, report = classes(*flat, labels=labels)
    values = {f"word_{name}": value for name, value in values.items()}
    text = f"words (scikit-learn)\n{report}"
    if is_spans(labels):
        entity_values, report = entities(true, predicted)
        values |= entity_values
        text += f"\nentities (seqeval, strict, IOB2)\n{report}"
    return values, text


def multiple(
    true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], labels: Sequence[str]
) -> tuple[dict, str]:
    """Scores several labels of each text: ({micro and macro F1, share of texts with all of them right}, report)."""
    sklearn = import_library("sklearn.metrics")
    table = [[[label in text for label in labels] for text in texts] for texts in (true, predicted)]
    f1 = {f"f1_{kind}": float(sklearn.f1_score(*table, average=kind, zero_division=0)) for kind in ("micro", "macro")}
    report = sklearn.classification_report(*table, target_names=list(labels), digits=4, zero_division=0)
    return f1 | dict(exact=float(sklearn.accuracy_score(*table))), report


def numbers(
    true: Sequence[float], predicted: Sequence[float], labels: Sequence[str] = ()
) -> tuple[dict[str, float], str]:
    """Returns ({Pearson's and Spearman's correlations by SciPy, mean squared error}, report)."""
    stats = import_library("scipy.stats")
    error = sum((a - b) ** 2 for a, b in zip(true, predicted, strict=True)) / len(true)
    values = dict(pearson=float(stats.pearsonr(true, predicted).statistic), mse=error)
    values["spearman"] = float(stats.spearmanr(true, predicted).statistic)
    return values, "\n".join(f"{name:10} {value:.4f}" for name, value in values.items()) + "\n"


def relation(label: str) -> str:
    """Returns a relation without its direction: Cause-Effect for Cause-Effect(e2,e1)."""
    return re.sub(r"\(e[12],e[12]\)$", "", label)


def related(true: str, predicted: str, negative: str) -> list[tuple[str, int, int, int]]:
    """Counts one pair of entities: (relation, right, true, predicted) of each relation that it concerns.

    It is right only with its direction; the negative label is no relation.
    """
    counted = {relation(label) for label in (true, predicted) if label != negative}
    return [(kind, int(true == predicted), int(true != negative and relation(true) == kind),
             int(predicted != negative and relation(predicted) == kind)) for kind in sorted(counted)]  # fmt: skip


def relations(true: Sequence[str], predicted: Sequence[str], labels: Sequence[str], negative: str) -> tuple[dict, str]:
    """Returns ({F1, precision, recall, accuracy}, report) without the negative label.

    Macro F1 is as SemEval 2010 task 8 has it, over relations whose two directions count as one but must be right; micro
    F1 is as TACRED has it. The report has all labels, by scikit-learn.
    """
    sums = {relation(label): [0, 0, 0] for label in labels if label != negative}
    for pair in zip(true, predicted, strict=True):
        for kind, *counts in related(*pair, negative):
            sums[kind] = [a + b for a, b in zip(sums[kind], counts, strict=True)]
    f1 = lambda right, actual, predicted: 2 * right / max(1, actual + predicted)  # noqa: E731
    right, num_true, num_predicted = map(sum, zip(*sums.values(), strict=True))
    accuracy = sum(a == b for a, b in zip(true, predicted, strict=True)) / len(true)
    values = dict(f1_macro=sum(f1(*counts) for counts in sums.values()) / len(sums),
                  f1_micro=f1(right, num_true, num_predicted),
                  precision=right / max(1, num_predicted), recall=right / max(1, num_true),
                  accuracy=accuracy)  # fmt: skip
    width = max(map(len, sums))
    lines = [f"{'':{width}}{'precision':>11}{'recall':>9}{'f1':>9}{'pairs':>8}"]
    lines += [f"{kind:{width}}{r / max(1, b):11.4f}{r / max(1, a):9.4f}{f1(r, a, b):9.4f}{a:8,}"
              for kind, (r, a, b) in sums.items()]  # fmt: skip
    _, report = classes(true, predicted, labels)
    left_out = f", without {negative!r}" if negative else ""
    return values, f"relations{left_out}\n" + "\n".join(lines) + f"\n\nlabels (scikit-learn)\n{report}"


def choices(true: Sequence[int], predicted: Sequence[int]) -> tuple[dict[str, float], str]:
    """Returns ({accuracy}, report of how often each choice is right and chosen, which shows a bias for one)."""
    n, right, chosen = len(true), collections.Counter(true), collections.Counter(predicted)
    lines = [f"{'choice':8}{'right':>9}{'chosen':>9}"]
    lines += [f"{chr(ord('A') + i):8}{right[i] / n:9.4f}{chosen[i] / n:9.4f}" for i in sorted({*right, *chosen})]
    return dict(accuracy=sum(a == b for a, b in zip(true, predicted, strict=True)) / n), "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------- answers

UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")


def answer_words(text: str, unspaced: bool) -> list[str]:
    """Returns the words of an answer to compare: lower case, no punctuation, no articles, as in SQuAD's script.

    In `unspaced` scripts (Chinese, Japanese) each character is a word, as in MLQA's and CMRC's scripts.
    """
    if unspaced:
        text = UNSPACED.sub(r" \g<0> ", text)
    marks = {c for c in text if unspaced and unicodedata.category(c)[0] == "P"} | set(string.punctuation)
    text = "".join(c for c in text.lower() if c not in marks)
    return (text if unspaced else re.sub(r"\b(a|an|the)\b", " ", text)).split()


def match(true: Sequence[str], predicted: str) -> tuple[float, float]:
    """Returns (exact match, F1 over words) with the closest true answer; without any, whether none was predicted."""
    unspaced = any(UNSPACED.search(text) for text in (*true, predicted))
    predicted_words = answer_words(predicted, unspaced)
    answers = [words for text in true if (words := answer_words(text, unspaced))] or [[]]
    exact, f1 = 0.0, 0.0
    for words in answers:
        exact = max(exact, float(words == predicted_words))
        if not words or not predicted_words:
            f1 = max(f1, float(words == predicted_words))
            continue
        shared = sum((collections.Counter(words) & collections.Counter(predicted_words)).values())
        f1 = max(f1, 2 * shared / (len(words) + len(predicted_words)))
    return exact, f1


def spans(
    true: Sequence[Sequence[str]], predicted: Sequence[Sequence[tuple[str, float]]]
) -> tuple[dict[str, float], str]:
    """Returns (SQuAD's figures, report). `predicted` has (text, score above no answer) of each question, best first."""
    each = [match(a, b[0][0]) for a, b in zip(true, predicted, strict=True)]
    values: dict[str, float] = {}
    lines = [f"{'':12}{'exact':>8}{'f1':>8}{'questions':>11}"]
    parts = {"": each, "hasans_": [m for m, a in zip(each, true, strict=True) if a],
             "noans_": [m for m, a in zip(each, true, strict=True) if not a]}  # fmt: skip
    for name, part in parts.items():
        if part and (not name or 0 < len(parts["noans_"]) < len(each)):
            exact, f1 = (sum(column) / len(part) for column in zip(*part, strict=True))
            values |= {f"{name}exact": exact, f"{name}f1": f1}
            lines.append(f"{name.rstrip('_') or 'all':12}{exact:8.4f}{f1:8.4f}{len(part):11,}")
    if "noans_f1" in values:
        f1, threshold = best_threshold(true, predicted)
        values |= dict(best_f1=f1, best_threshold=threshold)
        lines.append(f"with objective.threshold {threshold:.4g}, the best for these questions, f1 would be {f1:.4f}")
    return values, "\n".join(lines) + "\n"


def best_threshold(
    true: Sequence[Sequence[str]], predicted: Sequence[Sequence[tuple[str, float]]]
) -> tuple[float, float]:
    """Returns (the highest F1, its threshold): by how much no answer must score above the best span to be chosen."""
    best_spans = [next(((text, score) for text, score in spans if text), ("", -1e9)) for spans in predicted]
    order = sorted(range(len(best_spans)), key=lambda i: -best_spans[i][1])  # ever less sure ones get their span
    total = best = float(sum(not a for a in true))
    threshold = -best_spans[order[0]][1] - 1
    for i, after in zip(order, [*order[1:], None], strict=True):
        total += match(true[i], best_spans[i][0])[1] - (not true[i])
        if total > best and (after is None or best_spans[after][1] < best_spans[i][1]):
            best, threshold = total, -best_spans[i][1]
    return best / len(best_spans), threshold


# The scores of classification by the objective's kind.
KINDS: dict[str, Callable[..., tuple[dict, str]]] = {"single": classes, "multi": multiple, "regression": numbers}
FIGURES = {
    "single": ("accuracy", "f1_macro", "f1_weighted", "mcc"),
    "multi": ("f1_micro", "f1_macro", "exact"),
    "regression": ("pearson", "spearman", "mse"),
}
