"""A stream that demonstrates little says so, in numbers."""

import re

import pytest

from jaxlm.evaluation.stream_warnings import warnings


def results(matrix, *, lower=False, methods=(), forgetting=(0.5, 0.4, 0.6), learned=0.8, adapter="none", costs=None):
    return {
        "stages": ["a", "b"], "metrics": ["bits_per_byte" if lower else "accuracy"] * 2, "methods": list(methods),
        "lower_is_better": [lower] * 2, "matrices": [matrix], "adapter": adapter, "costs": costs or {},
        "figures": {"forgetting": list(forgetting), "learned": [learned, None, None]},
    }  # fmt: skip


def test_a_good_demonstration_says_nothing():
    assert warnings(results([[None, None], [0.9, 0.44], [0.4, 0.9]])) == []
    assert warnings(results([[8.0, 8.0], [2.0, 4.01], [4.0, 2.0]], lower=True, learned=-2.0)) == []


@pytest.mark.parametrize(
    ("matrix", "lower", "said"),
    [
        ([[None, None], [0.9, 0.45], [0.4, 0.9]], False, "stage b .* accuracy 0.45 before and 0.9 after, 50% of"),
        ([[8.0, 8.0], [2.0, 4.0], [4.0, 2.0]], True, "stage b .* 4 before and 2 after, the reciprocal 50% of"),
        ([[3.0, 8.0], [2.0, 5.0], [4.0, 2.0]], True, "stage a .* 3 before and 2 after, the reciprocal 67% of"),
    ],
)
def test_a_stage_that_could_be_done_before_is_told(matrix, lower, said):
    [line] = warnings(results(matrix, lower=lower))
    assert re.match(said, line) and "\n" not in line


def test_little_forgetting_is_told_of_the_plain_stream_alone():
    matrix = [[None, None], [0.9, None], [0.88, 0.9]]
    few, unsure = (0.039, 0.03, 0.05), (0.2, -0.01, 0.41)
    [line] = warnings(results(matrix, forgetting=few))
    assert "forgot 0.039, less than 5% of the 0.8 that was learned" in line
    [line] = warnings(results(matrix, forgetting=unsure))
    assert "forgot 0.2, with a 95 % interval from -0.01 that reaches to 0" in line
    assert warnings(results(matrix, forgetting=few, methods=["ewc"])) == []
    assert warnings(results(matrix, forgetting=(0.041, None, None))) == [], "one seed has no interval"


def test_adapters_forget_little():
    costs = {"after a": {"parameters": 1000, "trained": 20}}
    [line] = warnings(results([[None, None], [0.9, None], [0.4, 0.9]], adapter="lora", costs=costs))
    assert line.startswith("the adapter lora was trained, 2.00% of the weights") and "forgot 0.5" in line
