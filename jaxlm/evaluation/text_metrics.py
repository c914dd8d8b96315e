"""Texts that a model writes beside the true ones, by the libraries of each field: translations, summaries, answers.

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
    figures: dict[str, float]
    about: str
    """How they were counted, so that they can be compared with others'."""
    sample: Sample


def script(texts: Texts) -> str:
    """spaced; or zh or ja, where at least a third of the characters is of a script without spaces between words."""
    whole = "".join(texts)
    if 3 * len(UNSPACED.findall(whole)) < len("".join(whole.split())):
        return "spaced"
    return "ja" if KANA.search(whole) else "zh"


def bleu(true: Texts, found: Texts) -> Scored:
    """BLEU and chrF by sacrebleu, between 0 and 100. Chinese is cut into characters; of its words BLEU would be 0."""
    sacrebleu = import_library("sacrebleu.metrics")
    metric = sacrebleu.BLEU(tokenize={"zh": "zh", "ja": "char"}.get(script(true), "13a"))
    chrf = sacrebleu.CHRF()
    whole, other = metric.corpus_score(found, [true]), chrf.corpus_score(found, [true])
    each = [metric.corpus_score([b], [[a]]) for a, b in zip(true, found, strict=True)]
    counts_NM = np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in each], float)

    def figures(sums_RM: np.ndarray) -> Figures:
        rows = sums_RM.astype(int).tolist()
        return {
            "bleu": np.array([metric.compute_bleu(r[2:6], r[6:], r[0], r[1], smooth_method="exp").score for r in rows])
        }

    about = f"BLEU {metric.get_signature()}\nchrF {chrf.get_signature()}"
    return Scored(dict(bleu=whole.score, chrf=other.score), about, Sample(counts_NM, figures, unit="texts"))


class _Characters:
    """Words of a text in which each character of a script without spaces is one, for `rouge_score`."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(rf"{UNSPACED.pattern}|[a-z0-9]+", text.lower())


def rouge(true: Texts, found: Texts) -> Scored:
    """ROUGE F1 by rouge-score. Its own words are of a to z and 0 to 9 alone; of Chinese each character is one."""
    library, spaced = import_library("rouge_score.rouge_scorer"), script(true) == "spaced"
    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = library.RougeScorer(names, use_stemmer=spaced, tokenizer=None if spaced else _Characters())
    each = [scorer.score(a, b) for a, b in zip(true, found, strict=True)]
    values = {name: [s[name].fmeasure for s in each] for name in names}
    about = f"ROUGE F1 by rouge-score, {'words by its own rules, stemmed' if spaced else 'characters'}; Lsum by lines"
    return Scored({name: float(np.mean(v)) for name, v in values.items()}, about, samples.means(values))


def exact(true: Texts, found: Texts) -> Scored:
    same = [float(a.split() == b.split()) for a, b in zip(true, found, strict=True)]
    return Scored(dict(exact=float(np.mean(same))), "exact: equal but for white space", samples.means(dict(exact=same)))


def number(true: Texts, found: Texts) -> Scored:
    """As sums are judged: whatever leads there, the last number counts."""
    last = lambda text: next((float(n.replace(",", "")) for n in reversed(NUMBER.findall(text))), None)  # noqa: E731
    same = [float(last(a) is not None and last(a) == last(b)) for a, b in zip(true, found, strict=True)]
    about = "number: the last number in the text is that of the true one"
    return Scored(dict(number=float(np.mean(same))), about, samples.means(dict(number=same)))


METRICS: dict[str, Callable[[Texts, Texts], Scored]] = {"bleu": bleu, "rouge": rouge, "exact": exact, "number": number}
