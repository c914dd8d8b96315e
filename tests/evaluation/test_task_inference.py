"""The task that a vector is inferred to belong to, beside distances by hand and scikit-learn."""

import numpy as np
import pytest

from jaxlm.evaluation import task_inference
from jaxlm.evaluation.task_inference import infer, shared_covariance, statistics


@pytest.fixture
def groups() -> list[np.ndarray]:
    """Vectors of three tasks with correlated numbers, of unlike counts, which overlap."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6))
    return [rng.normal(size=(n, 6)) @ mixing + 1.5 * rng.normal(size=6) for n in (40, 300, 90)]


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.7])
def test_the_nearest_mean_by_mahalanobis_distance(groups, shrinkage):
    tasks, x = [statistics(g.astype(np.float32)) for g in groups], np.concatenate(groups)
    covariance = sum((g - g.mean(0)).T @ (g - g.mean(0)) / len(g) for g in groups) / 3
    covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / 6 * np.eye(6)
    np.testing.assert_allclose(shared_covariance(tasks, shrinkage), covariance, rtol=1e-4, atol=1e-5)
    inverse = np.linalg.inv(covariance)
    distances = [[(v - g.mean(0)) @ inverse @ (v - g.mean(0)) for g in groups] for v in x]
    found = infer(x, tasks, shrinkage)
    np.testing.assert_array_equal(found, np.argmin(distances, 1))
    assert 0.4 < np.mean(found == np.repeat([0, 1, 2], [len(g) for g in groups])) < 1


def test_as_scikit_learn(groups):
    lda = pytest.importorskip("sklearn.discriminant_analysis").LinearDiscriminantAnalysis
    labels = np.repeat([0, 1, 2], [len(g) for g in groups])
    theirs = lda(solver="lsqr", priors=[1 / 3] * 3, shrinkage=0.1).fit(np.concatenate(groups), labels)
    tasks = [statistics(g) for g in groups]
    np.testing.assert_allclose(shared_covariance(tasks, 0.1), theirs.covariance_, rtol=1e-9)
    np.testing.assert_array_equal(infer(np.concatenate(groups), tasks, 0.1), theirs.predict(np.concatenate(groups)))


def test_few_rows_and_equal_rows_have_an_answer():
    few = [statistics(np.eye(8)[i : i + 1] * 3) for i in range(2)]
    np.testing.assert_array_equal(infer(np.eye(8)[:2], few), [0, 1])
    with pytest.raises(ValueError, match="no rows to know it by"):
        statistics(np.zeros((0, 4)))
    assert task_inference.SHRINKAGE > 0
