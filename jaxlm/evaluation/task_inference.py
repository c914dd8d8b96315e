"""Infers which task a text belongs to, from vectors of texts of each task: linear discriminant analysis, whose classes
are the tasks, all equally likely beforehand. With a shared covariance the likeliest task is the one whose mean is
nearest by Mahalanobis distance.

N rows, D numbers of a vector, K tasks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SHRINKAGE = 0.1
TINY = 1e-12  # a variance, so that vectors that are all alike have an inverse too


class Statistics(NamedTuple):
    """Holds what is known of a task's vectors, float64."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray
    """Of the rows about their mean, divided by their number."""


def statistics(x_ND: np.ndarray) -> Statistics:
    """Returns the statistics of one task's vectors. ValueError: there are none."""
    if not len(x_ND):
        raise ValueError("task inference: a task has no rows to know it by")
    x_ND = x_ND.astype(np.float64)
    mean_D = x_ND.mean(0)
    return Statistics(mean_D, (x_ND - mean_D).T @ (x_ND - mean_D) / len(x_ND))


def shared_covariance(tasks: Sequence[Statistics], shrinkage: float = SHRINKAGE) -> np.ndarray:
    """Returns the mean of the tasks' covariances, mixed by `shrinkage` with a multiple of the identity that has the
    same trace, so that it has an inverse where there are fewer rows than numbers (Ledoit & Wolf 2004)."""
    mean_DD = np.mean([task.covariance_DD for task in tasks], 0)
    variance = max(np.trace(mean_DD) / len(mean_DD), TINY)
    return (1 - shrinkage) * mean_DD + shrinkage * variance * np.eye(len(mean_DD))


def infer(x_ND: np.ndarray, tasks: Sequence[Statistics], shrinkage: float = SHRINKAGE) -> np.ndarray:
    """Returns the number of the likeliest task for each vector, `[N]`: the largest of x·Σ⁻¹μ − ½ μ·Σ⁻¹μ."""
    means_KD = np.stack([task.mean_D for task in tasks])
    weights_DK = np.linalg.solve(shared_covariance(tasks, shrinkage), means_KD.T)
    scores_NK = x_ND.astype(np.float64) @ weights_DK - 0.5 * (means_KD.T * weights_DK).sum(0)
    return scores_NK.argmax(1)
