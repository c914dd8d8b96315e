"""Texts that a model writes are scored against the true ones by each field's libraries.

R resamples, M counts.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.evaluation import samples
from jaxlm.evaluation.bootstrap import Figures, Sample
from jaxlm.evaluation.metrics import UNSPACED, import_library

KANA = re.compile(r"[\u3040-\u30ff]")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
Texts = Sequence[str]


class Scored(NamedTuple):
    """The result holds the figures, how they were counted (`about`, for comparison with others'), and their sample."""

    figures: dict[str, float]
    about: str
    sample: Sample


def script(texts: Texts) -> str:
    """Returns zh or ja where at least a third of the characters is of their scripts, which put no spaces between words.

    Else it returns spaced.
    """
    whole = "".join(texts)
    if 3 * len(UNSPACED.findall(whole)) < len("".join(whole.split())):
        return "spaced"
    return "ja" if KANA.search(whole) else "zh"


def bleu(true: Texts, predicted: Texts) -> Scored:
    """Computes BLEU and chrF by sacrebleu, from 0 to 100. Chinese is cut into characters: its words would give 0."""
    sacrebleu = import_library("sacrebleu.metrics")
    metric = sacrebleu.BLEU(tokenize={"zh": "zh", "ja": "char"}.get(script(true), "13a"))
    chrf = sacrebleu.CHRF()
    whole, other = metric.corpus_score(predicted, [true]), chrf.corpus_score(predicted, [true])
    each = [metric.corpus_score([b], [[a]]) for a, b in zip(true, predicted, strict=True)]
    counts_NM = np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in each], float)

    def figures(sums_RM: np.ndarray) -> Figures:
        scores = [
            metric.compute_bleu(counts[:4], counts[4:], length, reference_length, smooth_method="exp").score
            for length, reference_length, *counts in sums_RM.astype(int).tolist()
        ]
        return {"bleu": np.array(scores)}

    about = f"BLEU {metric.get_signature()}\nchrF {chrf.get_signature()}"
    return Scored(dict(bleu=whole.score, chrf=other.score), about, Sample(counts_NM, figures, unit="texts"))


class _Characters:
    """Cuts texts for `rouge_score` into words, each character of a script without spaces being one."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(rf"{UNSPACED.pattern}|[a-z0-9]+", text.lower())


def rouge(true: Texts, predicted: Texts) -> Scored:
    """Computes ROUGE F1 by rouge-score, whose own words are a to z and 0 to 9 alone; each Chinese character is one."""
    library, spaced = import_library("rouge_score.rouge_scorer"), script(true) == "spaced"
    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = library.RougeScorer(names, use_stemmer=spaced, tokenizer=None if spaced else _Characters())
    each = [scorer.score(a, b) for a, b in zip(true, predicted, strict=True)]
    values = {name: [s[name].fmeasure for s in each] for name in names}
    about = f"ROUGE F1 by rouge-score, {'words by its own rules, stemmed' if spaced else 'characters'}; Lsum by lines"
    return Scored({name: float(np.mean(v)) for name, v in values.items()}, about, samples.means(values))


def exact(true: Texts, predicted: Texts) -> Scored:
    """Returns the share of texts that equal the true ones but for white space."""
    same = [float(a.split() == b.split()) for a, b in zip(true, predicted, strict=True)]
    return Scored(dict(exact=float(np.mean(same))), "exact: equal but for white space", samples.means(dict(exact=same)))


def number(true: Texts, predicted: Texts) -> Scored:
    """Returns the share of texts whose last number is the true text's last; whatever leads there doesn't count."""
    last = lambda text: next((float(n.replace(",", "")) for n in reversed(NUMBER.findall(text))), None)  # noqa: E731
    same = [float(last(a) is not None and last(a) == last(b)) for a, b in zip(true, predicted, strict=True)]
    about = "number: the last number in the text is that of the true one"
    return Scored(dict(number=float(np.mean(same))), about, samples.means(dict(number=same)))


METRICS: dict[str, Callable[[Texts, Texts], Scored]] = {"bleu": bleu, "rouge": rouge, "exact": exact, "number": number}
