"""Computes what a stream's scores say: how much was learned, kept and transferred.

a[i, j] is the score of stage j after stage i was learned, for T stages; row 0 is the model before the first, so that
the score right after learning stage j (counted from 0) is a[j + 1, j]. Scores of which less is better are taken with
their sign turned, so that differences above 0 are always for the better; NaN stands where there is no score.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import t as student


def figures(
    a: np.ndarray, single: Sequence[float] | None = None, joint: Sequence[float] | None = None
) -> dict[str, float]:
    """Returns the figures of a matrix `[T + 1, T]` of scores of which more is better.

    average: the mean of all stages at the end. average_along: the mean over the stream of the average over the stages
    seen so far. forgetting: the mean over all stages but the last of the best score that was ever reached before the
    end, less that at the end (Chaudhry et al. 2018). backward: the mean of the score at the end less that right after
    learning (backward transfer; its negative is Avalanche's forgetting). forward: the mean of what a stage scores right
    before it is learned less what the model scored before the stream (forward transfer); NaN where stages have heads of
    their own. learned: the mean score right after learning. With references: below_joint and below_single, the mean
    differences to training on everything at once and to each stage by itself.
    """
    T = a.shape[1]
    now, after = a[T], np.array([a[j + 1, j] for j in range(T)])
    old = range(T - 1)
    out = {
        "average": float(np.mean(now)),
        "average_along": float(np.mean([np.mean(a[i + 1, : i + 1]) for i in range(T)])),
        "learned": float(np.mean(after)),
        "forgetting": float(np.mean([np.nanmax(a[j + 1 : T, j]) - now[j] for j in old])) if T > 1 else math.nan,
        "backward": float(np.mean([now[j] - after[j] for j in old])) if T > 1 else math.nan,
        "forward": float(np.mean([a[j, j] - a[0, j] for j in range(1, T)])) if T > 1 else math.nan,
    }
    if single is not None:
        out["below_single"] = float(np.mean(np.asarray(single) - now))
    if joint is not None:
        out["below_joint"] = float(np.mean(np.asarray(joint) - now))
    return out


def over_seeds(each: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Returns [mean, low, high] of each figure: the mean over seeds with its 95 % interval by Student's t; with one
    seed the ends are NaN."""
    out = {}
    for name in each[0]:
        values = np.array([figures[name] for figures in each])
        mean, n = float(values.mean()), len(values)
        half = float(student.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        out[name] = [mean, mean - half, mean + half]
    return out
