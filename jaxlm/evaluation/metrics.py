"""Scores by the libraries that each field uses, so that figures compare with papers; they are the extra `eval`."""

import collections
import importlib
import re
import string
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import Any


def import_library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"these scores need {name.partition('.')[0]}: pip install 'jaxlm[eval]'") from None


def entities(true: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> tuple[dict[str, float], str]:
    """(precision, recall and F1 over all entities, per-class report) by seqeval, strict mode, IOB2."""
    seqeval, scheme = import_library("seqeval.metrics"), import_library("seqeval.scheme").IOB2
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
    sklearn = import_library("sklearn.metrics")
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
    sklearn = import_library("sklearn.metrics")
    table = [[[label in row for label in labels] for row in rows] for rows in (true, found)]
    f1 = {f"f1_{how}": float(sklearn.f1_score(*table, average=how, zero_division=0)) for how in ("micro", "macro")}
    report = sklearn.classification_report(*table, target_names=list(labels), digits=4, zero_division=0)
    return f1 | dict(exact=float(sklearn.accuracy_score(*table))), report


def numbers(true: Sequence[float], found: Sequence[float], labels: Sequence[str] = ()) -> tuple[dict[str, float], str]:
    """(correlations of Pearson and Spearman by SciPy, mean squared error)."""
    stats = import_library("scipy.stats")
    error = sum((a - b) ** 2 for a, b in zip(true, found, strict=True)) / len(true)
    values = dict(pearson=float(stats.pearsonr(true, found).statistic), mse=error)
    values["spearman"] = float(stats.spearmanr(true, found).statistic)
    return values, "\n".join(f"{name:10} {value:.4f}" for name, value in values.items()) + "\n"


def relation(label: str) -> str:
    """A relation without its direction: Cause-Effect(e2,e1) is Cause-Effect."""
    return re.sub(r"\(e[12],e[12]\)$", "", label)


def related(true: str, found: str, negative: str) -> list[tuple[str, int, int, int]]:
    """(relation, right, true, found) of one pair of entities: right only with its direction, and none if negative."""
    counted = {relation(label) for label in (true, found) if label != negative}
    return [(kind, int(true == found), int(true != negative and relation(true) == kind),
             int(found != negative and relation(found) == kind)) for kind in sorted(counted)]  # fmt: skip


def relations(true: Sequence[str], found: Sequence[str], labels: Sequence[str], negative: str) -> tuple[dict, str]:
    """F1 without the negative label: macro as SemEval 2010 task 8 has it, over relations whose two directions count as
    one but must be right; micro as TACRED has it. And a report of all labels by scikit-learn."""
    sums = {relation(label): [0, 0, 0] for label in labels if label != negative}
    for pair in zip(true, found, strict=True):
        for kind, *counts in related(*pair, negative):
            sums[kind] = [a + b for a, b in zip(sums[kind], counts, strict=True)]
    f1 = lambda right, there, told: 2 * right / max(1, there + told)  # noqa: E731
    right, there, told = map(sum, zip(*sums.values(), strict=True))
    accuracy = sum(a == b for a, b in zip(true, found, strict=True)) / len(true)
    values = dict(f1_macro=sum(f1(*counts) for counts in sums.values()) / len(sums), f1_micro=f1(right, there, told),
                  precision=right / max(1, told), recall=right / max(1, there), accuracy=accuracy)  # fmt: skip
    width = max(map(len, sums))
    lines = [f"{'':{width}}{'precision':>11}{'recall':>9}{'f1':>9}{'pairs':>8}"]
    lines += [f"{kind:{width}}{r / max(1, b):11.4f}{r / max(1, a):9.4f}{f1(r, a, b):9.4f}{a:8,}"
              for kind, (r, a, b) in sums.items()]  # fmt: skip
    _, report = classes(true, found, labels)
    left_out = f", without {negative!r}" if negative else ""
    return values, f"relations{left_out}\n" + "\n".join(lines) + f"\n\nlabels (scikit-learn)\n{report}"


def choices(true: Sequence[int], found: Sequence[int]) -> tuple[dict[str, float], str]:
    """(share of right choices; how often each place is right and chosen, which shows a liking for one)."""
    n, right, told = len(true), collections.Counter(true), collections.Counter(found)
    lines = [f"{'choice':8}{'right':>9}{'chosen':>9}"]
    lines += [f"{chr(ord('A') + i):8}{right[i] / n:9.4f}{told[i] / n:9.4f}" for i in sorted({*right, *told})]
    return dict(accuracy=sum(a == b for a, b in zip(true, found, strict=True)) / n), "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------- answers

UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")


def answer_words(text: str, unspaced: bool) -> list[str]:
    """What is compared of an answer: lower case, no punctuation, no articles (as SQuAD's own script has it); of Chinese
    and Japanese each character is a word, since nothing stands between words there (as in MLQA's and CMRC's)."""
    if unspaced:
        text = UNSPACED.sub(r" \g<0> ", text)
    marks = {c for c in text if unspaced and unicodedata.category(c)[0] == "P"} | set(string.punctuation)
    text = "".join(c for c in text.lower() if c not in marks)
    return (text if unspaced else re.sub(r"\b(a|an|the)\b", " ", text)).split()


def match(true: Sequence[str], found: str) -> tuple[float, float]:
    """(exact match, F1 over words) with the true answer that is closest; without one, that none was found."""
    unspaced = any(UNSPACED.search(text) for text in (*true, found))
    b = answer_words(found, unspaced)
    answers = [words for text in true if (words := answer_words(text, unspaced))] or [[]]
    exact, f1 = 0.0, 0.0
    for a in answers:
        exact = max(exact, float(a == b))
        same = sum((collections.Counter(a) & collections.Counter(b)).values())
        f1 = max(f1, 2 * same / (len(a) + len(b)) if a and b else float(a == b))
    return exact, f1


def spans(true: Sequence[Sequence[str]], found: Sequence[Sequence[tuple[str, float]]]) -> tuple[dict[str, float], str]:
    """SQuAD's figures. `found`: of each question (text, score above no answer), the best first."""
    each = [match(a, b[0][0]) for a, b in zip(true, found, strict=True)]
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
        f1, at = best_threshold(true, found)
        values |= dict(best_f1=f1, best_threshold=at)
        lines.append(f"with objective.threshold {at:.4g}, the best for these questions, f1 would be {f1:.4f}")
    return values, "\n".join(lines) + "\n"


def best_threshold(true: Sequence[Sequence[str]], found: Sequence[Sequence[tuple[str, float]]]) -> tuple[float, float]:
    """(F1, by how much no answer must score above the best span to be given) where F1 is highest."""
    told = [next(((text, score) for text, score in several if text), ("", -1e9)) for several in found]
    sure = sorted(range(len(told)), key=lambda i: -told[i][1])  # spans are given to ever less sure ones
    total = best = float(sum(not a for a in true))
    at = -told[sure[0]][1] - 1
    for i, after in zip(sure, [*sure[1:], None], strict=True):
        total += match(true[i], told[i][0])[1] - (not true[i])
        if total > best and (after is None or told[after][1] < told[i][1]):
            best, at = total, -told[i][1]
    return best / len(told), at


# Of classification, by its kind.
KINDS: dict[str, Callable[..., tuple[dict, str]]] = {"single": classes, "multi": multiple, "regression": numbers}
