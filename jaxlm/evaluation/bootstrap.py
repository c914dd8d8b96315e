"""The bootstrap over examples gives each figure an interval (Efron & Tibshirani 1993).

It says how far a figure would move on other examples of the same kind and, paired, whether two models differ by more
than that (Koehn 2004).

N examples, M counts of each, R resamples.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES, SEED = 10_000, 0
LEVEL = 0.95
MOST = 10_000  # examples that are drawn one by one
DRAWS_AT_ONCE = 1 << 22  # bounds the memory
Figures = dict[str, np.ndarray]


class Sample(NamedTuple):
    """A sample holds counts of what one model did on each example, whose sums give its figures.

    A resample is a matrix product, therefore. `figures` makes each figure `[R]` of sums `[R, M]` over some examples.
    `keys` are equal where two models had the same examples; `unit` names these.
    """

    counts_NM: np.ndarray
    figures: Callable[[np.ndarray], Figures]
    keys: Sequence[Any] = ()
    unit: str = "examples"


def intervals(sample: Sample, resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, list[float]]:
    """Returns the ends of each figure's 95 % interval (percentiles), [lower, upper]; empty for a single example, which
    tells nothing of chance."""
    if len(sample.counts_NM) < 2:
        return {}
    return {name: _ends(values_R) for name, values_R in _resampled([sample], resamples, seed)[0].items()}


def paired(a: Sample, b: Sample, resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, dict[str, Any]]:
    """Compares each figure of two models: both values, the difference a - b, an interval of each, and p.

    p is twice the share of resamples in which the difference is zero or has the other sign (one resample added to both
    counts), so p < 0.05 says what the interval says. N examples that all agree happen by chance with a probability of
    2^(1 - N), so p is never below that, and None where that is above 0.05. A single example has no intervals: None.
    Raises a ValueError where the examples differ.
    """
    check_same(a, b)
    if len(a.counts_NM) < 2:
        return _of_one(a, b)
    least = 2.0 ** (1 - len(a.counts_NM))
    whole = [{name: float(v[0]) for name, v in _figures(s, s.counts_NM.sum(0)[None]).items()} for s in (a, b)]
    drawn = _resampled([a, b], resamples, seed)
    out = {}
    for name in (n for n in drawn[0] if n in drawn[1]):
        difference_R = drawn[0][name] - drawn[1][name]
        difference_R = difference_R[~np.isnan(difference_R)]
        beyond = min((difference_R <= 0).sum(), (difference_R >= 0).sum())
        one, other = whole[0][name], whole[1][name]
        out[name] = dict(
            value=one, interval=_ends(drawn[0][name]), against=other, against_interval=_ends(drawn[1][name]),
            difference=one - other, difference_interval=_ends(difference_R),
            p=None if least > 1 - LEVEL else min(1.0, max(least, 2 * float(beyond + 1) / (len(difference_R) + 1))),
        )  # fmt: skip
    return out


def _of_one(a: Sample, b: Sample) -> dict[str, dict[str, Any]]:
    """Compares the figures of two models on a single example, which has no intervals."""
    one, other = ({name: float(v[0]) for name, v in _figures(s, s.counts_NM.sum(0)[None]).items()} for s in (a, b))
    none = dict(interval=None, against_interval=None, difference_interval=None, p=None)
    return {name: dict(value=one[name], against=other[name], difference=one[name] - other[name], **none)
            for name in one if name in other}  # fmt: skip


def gains(
    now: Mapping[str, Sample], before: Mapping[str, np.ndarray], resamples: int = RESAMPLES
) -> dict[str, dict[str, Any]]:
    """Compares each figure of a model with the same model's `before` (counts by the samples' names), as `paired` does.

    `over` in the result says over how many examples.
    """
    out: dict[str, dict[str, Any]] = {}
    for name, sample in now.items():
        if name in before and before[name].shape == sample.counts_NM.shape and len(sample.counts_NM):
            compared = paired(sample, sample._replace(counts_NM=before[name]), resamples)
            over = size(sample)
            out |= {figure: {**values, "over": over} for figure, values in compared.items()}
    return out


def by_class(compared: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns comparisons of `CLASS/FIGURE` by class, then figure; `support`, the same for both, as a number."""
    out: dict[str, dict[str, Any]] = {}
    for name, values in compared.items():
        kind, _, figure = name.rpartition("/")
        out.setdefault(kind, {})[figure] = values["value"] if figure == "support" else dict(values)
    return out


def size(sample: Sample) -> str:
    """Returns how many examples a sample has, as it is shown."""
    n = len(sample.counts_NM)
    return f"{n:,} {sample.unit.removesuffix('s') if n == 1 and sample.unit != 'batches' else sample.unit}"


def check_same(a: Sample, b: Sample) -> None:
    """Raises a ValueError where two models were not asked the same examples."""
    if len(a.counts_NM) != len(b.counts_NM):
        raise ValueError(
            f"against: the two models have {len(a.counts_NM)} and {len(b.counts_NM)} {a.unit}; compare them on the "
            f"same ones, named with `data`"
        )
    for i, (one, other) in enumerate(zip(a.keys, b.keys, strict=True)):
        if one != other:
            raise ValueError(
                f"against: number {i + 1} of the {a.unit} is not the same for the two models; compare them on the "
                f"same data, cut into the same examples (`data`, and for losses the same tokenizer and lengths)"
            )


def _resampled(samples: Sequence[Sample], resamples: int, seed: int) -> list[Figures]:
    """Returns the figures of each sample over the same resamples.

    More than `MOST` examples are put into as many groups, neighbours into different ones, which are drawn instead: sums
    of independent examples are independent too, and the time stays bounded.
    """
    samples = [s._replace(counts_NM=_grouped(s.counts_NM)) for s in samples]
    N, rng = len(samples[0].counts_NM), np.random.default_rng(seed)
    sums: list[list[np.ndarray]] = [[] for _ in samples]
    step = max(1, DRAWS_AT_ONCE // N)
    for at in range(0, resamples, step):
        R = min(step, resamples - at)
        drawn = rng.integers(0, N, (R, N)) + N * np.arange(R)[:, None]
        times_RN = np.bincount(drawn.ravel(), minlength=R * N).reshape(R, N).astype(np.float64)
        for parts, s in zip(sums, samples, strict=True):
            parts.append(times_RN @ s.counts_NM)
    return [_figures(s, np.concatenate(parts)) for parts, s in zip(sums, samples, strict=True)]


def _grouped(counts_NM: np.ndarray) -> np.ndarray:
    """Adds up every `MOST`th example."""
    whole = len(counts_NM) // MOST * MOST
    if whole <= MOST:
        return counts_NM
    out = counts_NM[:whole].reshape(-1, MOST, counts_NM.shape[1]).sum(0)
    out[: len(counts_NM) - whole] += counts_NM[whole:]
    return out


def _figures(s: Sample, sums_RM: np.ndarray) -> Figures:
    with np.errstate(divide="ignore", invalid="ignore"):
        return s.figures(sums_RM)


def _ends(values_R: np.ndarray) -> list[float]:
    """Returns the ends of the interval. NaN, the figure of a resample without a single target, is left out."""
    rest = 100 * (1 - LEVEL) / 2
    values_R = values_R[~np.isnan(values_R)]
    return [float(x) for x in np.percentile(values_R, [rest, 100 - rest])] if len(values_R) else [np.nan, np.nan]


def within(ends: Sequence[Any] | None, sign: str = "") -> str:
    """Returns an interval as it is shown; nothing where there is none. Numbers like NaN may come as text."""
    return "" if ends is None else " … ".join(f"{x:{sign}.4g}" if isinstance(x, int | float) else str(x) for x in ends)


def shown_p(p: float | None) -> str:
    """Returns p as it is shown; "too few" where there are too few examples for any."""
    return "too few" if p is None else f"{p:.4f}"


def table(
    compared: Mapping[str, Mapping[str, Any]], about: str = "", heads: tuple[str, str] = ("value", "against")
) -> str:
    """Returns the result of `paired` as text in columns, each value with its 95 % interval, and `about` as the last
    line."""
    rows = [("", *(x for head in (*heads, "difference") for x in (head, "95 %")), "p")]
    for name, f in compared.items():
        rows.append((name, f"{f['value']:.5g}", within(f["interval"]), f"{f['against']:.5g}",
                     within(f["against_interval"]), f"{f['difference']:+.4g}", within(f["difference_interval"], "+"),
                     shown_p(f["p"])))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    return "\n".join([*lines, about] if about else lines)
