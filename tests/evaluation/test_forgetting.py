"""The figures of a stream's matrix, by hand."""

import math

import numpy as np
import pytest

from jaxlm.evaluation import forgetting

A = np.array([[0.1, 0.2, 0.3], [0.9, 0.3, 0.2], [0.7, 0.8, 0.4], [0.5, 0.6, 0.9]])


def test_figures_by_hand():
    f = forgetting.figures(A, single=[0.9, 0.8, 1.0], joint=[0.8, 0.8, 0.8])
    assert f["average"] == pytest.approx(2.0 / 3)
    assert f["average_along"] == pytest.approx((0.9 + 0.75 + 2.0 / 3) / 3)
    assert f["learned"] == pytest.approx((0.9 + 0.8 + 0.9) / 3)
    assert f["forgetting"] == pytest.approx(((0.9 - 0.5) + (0.8 - 0.6)) / 2)
    assert f["backward"] == pytest.approx(((0.5 - 0.9) + (0.6 - 0.8)) / 2)
    assert f["forward"] == pytest.approx(((0.3 - 0.2) + (0.4 - 0.3)) / 2)
    assert f["below_single"] == pytest.approx((0.4 + 0.2 + 0.1) / 3)
    assert f["below_joint"] == pytest.approx((0.3 + 0.2 - 0.1) / 3)


def test_the_two_forgettings_differ_where_a_score_rises_in_between():
    a = np.array([[0, 0, 0], [0.5, 0, 0], [0.8, 0.5, 0], [0.6, 0.5, 0.5]])
    f = forgetting.figures(a)
    assert f["forgetting"] == pytest.approx(0.1)  # 0.8 was reached after the second stage
    assert f["backward"] == pytest.approx(0.05)  # 0.6 is above what was reached right after learning


def test_missing_scores_leave_what_needs_them_unknown():
    a = A.copy()
    a[0] = math.nan
    f = forgetting.figures(a)
    assert math.isnan(f["forward"]) and f["average"] == pytest.approx(2.0 / 3)


def test_intervals_over_seeds():
    each = [{"average": x} for x in (0.5, 0.6, 0.7)]
    mean, low, high = forgetting.over_seeds(each)["average"]
    assert mean == pytest.approx(0.6) and (high - mean) == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert low == pytest.approx(2 * mean - high)
    assert math.isnan(forgetting.over_seeds(each[:1])["average"][1])
