"""Mixtures track their weights at every prefix; the shuffle is a permutation that epochs and seeds change."""

import itertools

import pytest

from jaxlm.data.mixture import mixture, shuffled

WEIGHTS = [
    [1.0],
    [1, 1],
    [0.9, 0.1],
    [3, 2, 1],
    [0.5, 0.25, 0.125, 0.0625, 0.0625],
    [1, 0, 2],
    [1e-3, 1.0],
    [1 / 3] * 3,
    [7, 1] * 8,
]


def _mixture(weights):
    return mixture([[None] * 10 for _ in weights], weights)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_track_the_weights_at_every_prefix(weights):
    mixed, counts = _mixture(weights), [0] * len(weights)
    for i in range(3000):
        part, counter = mixed.locate(i)
        assert counter == counts[part]  # each part is walked through without gaps
        counts[part] += 1
        for count, share in zip(counts, mixed.shares, strict=True):
            assert abs(count - (i + 1) * share) < 2


def test_far_indices_are_exact():
    mixed = _mixture([0.7, 0.2, 0.1])
    for start in (10**9, 10**18):
        found = [mixed.locate(i) for i in range(start, start + 200)]
        for part in range(3):
            counters = [counter for p, counter in found if p == part]
            assert counters == list(range(counters[0], counters[0] + len(counters)))
            assert abs(counters[0] / start - mixed.shares[part]) < 1e-6


def test_faults_name_the_part():
    for parts, weights, words in (
        ([[1]], [1, 1], "1 parts, 2 weights"),
        ([], [], "0 parts"),
        ([[1], []], [1, 1], "part 1 has no records"),
        ([[1], [1]], [1, -1], "weight 1 is -1"),
        ([[1]], [float("nan")], "weight 0 is nan"),
        ([[1], [1]], [0, 0], "all 0"),
    ):
        with pytest.raises(ValueError, match=words):
            mixture(parts, weights)
    assert mixture([[1], []], [1, 0]).locate(5) == (0, 5)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000])
def test_a_shuffle_is_a_permutation(n):
    assert sorted(shuffled(i, n, 0, 0) for i in range(n)) == list(range(n))


def test_epochs_and_seeds_shuffle_differently():
    orders = [tuple(shuffled(i, 500, seed, epoch) for i in range(500)) for seed in (0, 1, 2**60) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 9
    for order in orders:
        fixed = sum(i == place for i, place in enumerate(order))
        near = sum(abs(a - b) == 1 for a, b in itertools.pairwise(order))
        assert fixed < 10 and near < 15  # a fair shuffle has about 1 and 2
    assert orders[0] == tuple(shuffled(i, 500, 0, 0) for i in range(500))
