"""Few points stand for many: nothing that a curve does is lost in its buckets."""

import math
import random

import numpy as np
import pytest

from jaxlm.training.log_table import BUCKETS, Table, bucket_size


def table(values, name="loss"):
    out = Table()
    for i, value in enumerate(values, 1):
        out.add({"kind": "train", "step": i, name: value}, {"step": i, "tokens": 10 * i, "seconds": i / 4})
    return out


def test_buckets_keep_the_least_the_greatest_and_the_mean():
    values = [random.Random(0).gauss(0, 1) for _ in range(5000)]
    values[1234] = 99.0
    found = table(values).buckets(0, 5000, 64)
    loss = found["columns"]["loss"]
    assert len(loss["mean"]) == len(found["n"]) == math.ceil(5000 / 64) and sum(found["n"]) == 5000
    assert found["step"][:3] == [1, 65, 129] and found["tokens"][1] == 650 and found["seconds"][1] == 16.25
    assert max(loss["high"]) == 99 and loss["high"].index(99) == 1234 // 64
    assert min(loss["low"]) == pytest.approx(min(values), rel=1e-6)
    assert np.average(loss["mean"], weights=found["n"]) == pytest.approx(np.mean(values), rel=1e-5)


def test_what_is_not_finite_is_told_and_not_drawn():
    found = table([1.0, "NaN", 3.0, "Infinity", "-Infinity", 6.0]).buckets(0, 6, 1)["columns"]["loss"]
    assert found == {"mean": [1.0, None, 3.0, None, None, 6.0], "gaps": [1, 3, 4]}
    found = table([1.0, "NaN", 3.0, "Infinity", "NaN", "NaN"]).buckets(0, 6, 2)["columns"]["loss"]
    assert found == {"mean": [1.0, 3.0, None], "low": [1.0, 3.0, None], "high": [1.0, 3.0, None], "gaps": [0, 1, 2]}


def test_a_column_that_comes_and_goes_is_no_gap():
    out = Table()
    for i, line in enumerate(({"a": 1}, {"b": 2}, {"a": 3, "time": {"speed": 5}}, {"a": None, "note": "x"})):
        out.add({"kind": "train", "step": i} | line, {"step": i, "tokens": 0, "seconds": 0})
    columns = out.buckets(0, 4, 1)["columns"]
    assert {name: column["mean"] for name, column in columns.items()} == {
        "a": [1, None, 3, None], "b": [None, 2, None, None], "time/speed": [None, None, 5, None]
    }  # fmt: skip
    assert not any(column["gaps"] for column in columns.values())


def test_numbers_are_short_and_right_to_seven_digits():
    values = [1 / 3, 1e-9 / 7, -123456.789012, 0.0, 1e300 / 3, 5e-324, 12345678.9]
    found = table(values).buckets(0, len(values), 1)["columns"]["loss"]["mean"]
    assert found == pytest.approx(values, rel=1e-6) and found[0] == 0.3333333 and found[3] == 0


def test_a_bucket_doubles_and_whole_ones_stay():
    """What a page has of a log stays true while it grows, until there are twice as many rows to a bucket."""
    assert [bucket_size(n) for n in (0, 1, BUCKETS, BUCKETS + 1, 2 * BUCKETS, 1_000_000)] == [1, 1, 1, 2, 2, 512]
    values = [math.sin(i) for i in range(6000)]
    before, after = table(values[:5000]).buckets(0, 5000, 4), table(values).buckets(0, 6000, 4)
    assert before["columns"]["loss"]["mean"] == after["columns"]["loss"]["mean"][:1250]


def test_a_range_has_the_rows_beside_it():
    whole = table(range(100))
    assert whole.find("step", 10, 20) == (8, 21) and whole.find("tokens", 0, 1e9) == (0, 100)
    assert whole.find("seconds", 3.0, 3.0)[0] < whole.find("seconds", 3.0, 3.0)[1]
