"""Formats under a budget of bytes, against every choice that there is."""

import itertools

import numpy as np
import pytest

from jaxlm.weights.compress.budget import Option, choose, hull


def drawn(seed: int) -> dict[str, list[Option]]:
    """Four weights with four options each, of which some are of no use."""
    rng = np.random.default_rng(seed)
    return {
        f"w{i}": [Option(str(k), int(rng.integers(1, 40)), float(rng.exponential() * 4.0**-k)) for k in range(4)]
        for i in range(4)
    }


def every(options: dict[str, list[Option]]) -> list[tuple[int, float]]:
    return [(sum(o.nbytes for o in c), sum(o.error for o in c)) for c in itertools.product(*options.values())]


def total(chosen: dict[str, Option]) -> tuple[int, float]:
    return sum(o.nbytes for o in chosen.values()), sum(o.error for o in chosen.values())


def largest_step(options: dict[str, list[Option]]) -> float:
    return max((a.error - b.error for o in options.values() for a, b in itertools.pairwise(hull(o))), default=0)


def test_it_is_as_good_as_any_choice_up_to_the_step_that_does_not_fit():
    best = 0
    for seed in range(30):
        options = drawn(seed)
        choices = every(options)
        for budget in range(min(n for n, _ in choices), max(n for n, _ in choices) + 1, 3):
            size, error = total(choose(options, budget))
            least = min(e for n, e in choices if n <= budget)
            assert size <= budget
            assert least <= error + 1e-12 < least + largest_step(options) + 1e-9
            best += error <= least + 1e-12
    assert best > 400, "and often it is the best"


def test_where_the_steps_fit_exactly_nothing_is_better():
    for seed in range(30):
        options = drawn(seed)
        choices = every(options)
        steps = sorted(
            ((a.error - b.error) / (b.nbytes - a.nbytes), b.nbytes - a.nbytes)
            for o in options.values()
            for a, b in itertools.pairwise(hull(o))
        )
        budget = sum(hull(o)[0].nbytes for o in options.values())
        for _, more in reversed(steps):
            budget += more
            _, error = total(choose(options, budget))
            assert error == pytest.approx(min(e for n, e in choices if n <= budget))


def test_the_hull_leaves_out_what_a_mixture_beats():
    good = [Option("int4", 4, 9.0), Option("int8", 8, 1.0), Option("float32", 32, 0.0)]
    dented = [*good, Option("larger and worse", 9, 2.0), Option("above the line", 6, 6.0), Option("worse", 4, 10.0)]
    assert hull(dented) == good


def test_what_cannot_be_is_refused():
    options = {"q": [Option("int4", 400, 1.0)], "k": [Option("int4", 600, 1.0)]}
    with pytest.raises(ValueError, match="budget: 999 bytes; the smallest formats take 1,000; give at least that"):
        choose(options, 999)
    with pytest.raises(ValueError, match="options: q has none"):
        choose({"q": []}, 1)
    with pytest.raises(ValueError, match="options: q as int4 has an error of nan and 4 bytes"):
        choose({"q": [Option("int4", 4, float("nan"))]}, 10)
