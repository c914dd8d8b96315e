"""Chooses a format for each weight so that all together fit so many bytes: where a byte saves the most error first.

Errors are those that a solver reports, of one scale for all weights (relative to a layer's power, or what a model's
loss loses); they are taken to add up. Nothing here needs a device.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple


class Option(NamedTuple):
    """An Option is one way to store a weight."""

    name: str
    nbytes: int
    error: float


class _Step(NamedTuple):
    """One weight's move from one option of its hull to the next larger one."""

    rate: float
    """How much error a byte more takes away."""
    weight: str
    at: int
    """How many steps of this weight come before."""
    more: int
    """Bytes."""


def hull(options: Sequence[Option]) -> list[Option]:
    """Returns the options that no mixture of two others beats, from the smallest: each byte more takes away less error
    than the one before."""
    kept: list[Option] = []
    for o in sorted(options, key=lambda o: (o.nbytes, o.error)):
        if kept and o.error >= kept[-1].error:
            continue  # larger and no better
        while len(kept) > 1 and _rate(kept[-2], kept[-1]) <= _rate(kept[-1], o):
            kept.pop()
        kept.append(o)
    return kept


def _rate(a: Option, b: Option) -> float:
    return (a.error - b.error) / (b.nbytes - a.nbytes)


def choose(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """Returns an option for each weight, whose bytes add up to no more than `budget`.

    It starts from the smallest of each, and takes the steps along the hulls that take away the most error a byte while
    they fit; a weight whose step doesn't fit stays where it is. Before the first that doesn't fit, no other choice of
    as many bytes has less error; in the end the error is above the least by less than that step's. Raises ValueError
    where even the smallest don't fit, where there are none, and for an error or a size that is no number.
    """
    for weight, given in options.items():
        if not given:
            raise ValueError(f"options: {weight} has none")
        for o in given:
            if not (0 <= o.error < float("inf") and o.nbytes > 0):
                raise ValueError(f"options: {weight} as {o.name} has an error of {o.error} and {o.nbytes} bytes")
    hulls = {weight: hull(given) for weight, given in options.items()}
    left = budget - sum(h[0].nbytes for h in hulls.values())
    if left < 0:
        raise ValueError(f"budget: {budget:,} bytes; the smallest formats take {budget - left:,}; give at least that")
    steps = [
        _Step(_rate(a, b), weight, i, b.nbytes - a.nbytes)
        for weight, h in hulls.items()
        for i, (a, b) in enumerate(pairwise(h))
    ]
    taken = dict.fromkeys(hulls, 0)
    for step in sorted(steps, key=lambda s: (-s.rate, s.weight, s.at)):
        if step.at == taken[step.weight] and step.more <= left:
            taken[step.weight] += 1
            left -= step.more
    return {weight: h[taken[weight]] for weight, h in hulls.items()}
