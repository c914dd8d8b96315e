"""Texts that a model writes are scored against the true ones by each field's libraries.

R resamples, M counts.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.evaluation import samples
from jaxlm.evaluation.bootstrap import Figures, Sample
from jaxlm.evaluation.metrics import UNSPACED, import_library

KANA = re.compile(r"[\u3040-\u30ff]")
# Thai, Lao, Tibetan, Myanmar and Khmer put no spaces between words either.
SOUTH_EAST = re.compile(r"[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\ua9e0-\ua9ff\uaa60-\uaa7f]")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
Texts = Sequence[str]


class Scored(NamedTuple):
    """The result holds the figures, how they were counted (`about`, for comparison with others'), and their sample."""

    figures: dict[str, float]
    about: str
    sample: Sample


def script(texts: Texts) -> str:
    """Returns the kind of script that at least a third of the characters is of: zh, ja, or other for those of South
    East Asia, all of which put no spaces between words; spaced for letters beyond Latin's; else latin."""
    whole = "".join("".join(texts).split())
    if whole and 3 * len(UNSPACED.findall(whole)) >= len(whole):
        return "ja" if KANA.search(whole) else "zh"
    if whole and 3 * len(SOUTH_EAST.findall(whole)) >= len(whole):
        return "other"
    beyond = sum(c > "\u024f" and unicodedata.category(c)[0] in "LM" for c in whole)
    latin = sum(c <= "\u024f" and c.isalpha() for c in whole)
    return "spaced" if beyond and 2 * beyond >= latin else "latin"


def bleu(true: Texts, predicted: Texts) -> Scored:
    """Computes BLEU and chrF by sacrebleu, from 0 to 100. Scripts without spaces are cut into characters: their
    words would give 0."""
    sacrebleu = import_library("sacrebleu.metrics")
    metric = sacrebleu.BLEU(tokenize={"zh": "zh", "ja": "char", "other": "char"}.get(script(true), "13a"))
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


class _Words:
    """Cuts texts for `rouge_score` into words of any script: a character with its marks where none is spaced, else what
    stands between spaces and punctuation."""

    def tokenize(self, text: str) -> list[str]:
        words: list[str] = []
        before = ""
        for c in unicodedata.normalize("NFC", text).lower():
            kind = "" if unicodedata.category(c)[0] not in "LMN" else "one" if self._is_unspaced(c) else "word"
            joins = bool(words) and (
                kind == "word" == before or (before and kind and unicodedata.category(c)[0] == "M")
            )
            if joins:
                words[-1] += c
            elif kind:
                words.append(c)
            before = before if joins else kind
        return words

    def _is_unspaced(self, c: str) -> bool:
        return bool(UNSPACED.match(c) or SOUTH_EAST.match(c))


def rouge(true: Texts, predicted: Texts) -> Scored:
    """Computes ROUGE F1 by rouge-score, whose own words are a to z and 0 to 9 alone.

    A text of another script than Latin has that script's words, and each Chinese or Thai character is one.
    """
    library = import_library("rouge_score.rouge_scorer")
    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    own = library.RougeScorer(names, use_stemmer=True)
    others = library.RougeScorer(names, use_stemmer=False, tokenizer=_Words())
    kinds = [script([text]) for text in true]
    each = [(own if kind == "latin" else others).score(a, b) for a, b, kind in zip(true, predicted, kinds, strict=True)]
    values = {name: [s[name].fmeasure for s in each] for name in names}
    cut = {"latin": "words by its own rules, stemmed", "spaced": "words of any script"}
    found = dict.fromkeys(cut.get(kind, "characters") for kind in kinds)
    about = f"ROUGE F1 by rouge-score, {', '.join(found)}; Lsum by lines"
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
