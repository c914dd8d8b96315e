"""Models of one shape become one: averages, spherical interpolation, and sums of what models changed since their base.

A tensor is read in stretches, by some methods several times, and comes back in the same stretches, so that no more than
a stretch of each model is ever held. Numbers and changes are float32; sums over models and over a tensor are float64.
N models, n numbers of a stretch.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxlm.core.merging import Settings

PARALLEL = 0.9995  # cosine from which an arc is so flat that the straight line stands for it
BINS = 1 << 16  # magnitudes are sorted by the upper half of their bits, then by the lower


class Stretch(NamedTuple):
    """A stretch is so many numbers of one tensor, from the position `start` on; the tensor counts as flat."""

    start: int
    base_n: np.ndarray | None
    """The base's numbers as float32; None: there is no base."""
    models_Nn: np.ndarray
    """The models' numbers as float32; who reads a stretch may write over them."""


class Tensor(NamedTuple):
    """A tensor of all models, as a method reads it."""

    name: str
    size: int
    read: Callable[[], Iterator[Stretch]]
    """Gives the stretches in their order, anew with each call."""


Stretches = Iterator[np.ndarray]
"""The merged numbers of each stretch, float64 [n]."""
Keep = Callable[[int, np.ndarray], np.ndarray]
"""(first position, changes [n]) → which of them are kept. It is asked for stretch after stretch, in their order."""


class Method(NamedTuple):
    """A method merges the tensors of models."""

    merge: Callable[[Settings, Tensor], Stretches]
    needs_base: bool
    fewest: int
    """Models besides the base."""
    most: int | None = None
    settings: Mapping[str, Any] = {}
    """The settings that it has besides `method`, with their usual values; None: there is no usual one."""


def resolved(s: Settings, models: int, base: bool) -> Settings:
    """Returns the settings with the method's own values for those that aren't given.

    `models`: how many there are besides the base. ValueError: they don't fit the method, or its settings don't.
    """
    method = METHODS[s.method]
    if method.needs_base and not base:
        raise ValueError(f"base: {s.method} merges what models changed since their base; name that model")
    if base and not method.needs_base:
        raise ValueError(f"base: {s.method} has none; leave it out, or give it as one of the models")
    if models < method.fewest or models > (method.most or models):
        count = f"{method.fewest}" if method.fewest == method.most else f"{method.fewest} or more"
        raise ValueError(f"models: {s.method} merges {count}, and here are {models}; choose another method or models")
    values: dict[str, Any] = {}
    for name in ("weights", "t", "density", "gamma", "scale", "rescale", "seed"):
        given = getattr(s, name)
        if name not in method.settings:
            if given != getattr(Settings(), name):
                raise ValueError(f"{name}: {s.method} has no such setting; leave it out")
        elif given is None and method.settings[name] is None:
            raise ValueError(f"{name}: {s.method} has no usual value of it; give one, such as 0.5")
        elif given is None:
            values[name] = method.settings[name]
    if "weights" in method.settings:
        values["weights"] = s.weights or (1.0,) * models
        if len(values["weights"]) != models:
            raise ValueError(f"weights: {len(s.weights)} for {models} models; give one for each, besides the base")
        if s.method == "linear" and abs(sum(values["weights"])) < 1e-8:
            raise ValueError(f"weights: {s.weights} add up to 0, by which the sum would be divided; change one")
    return replace(s, **values)


def merge(s: Settings, tensor: Tensor) -> Stretches:
    """Yields the merged numbers of a tensor by settings that are `resolved`."""
    return METHODS[s.method].merge(s, tensor)


# ------------------------------------------------------------------------------------------- the models' own numbers


def weighted_sum(weights: Sequence[float], rows_Nn: np.ndarray) -> np.ndarray:
    """Returns Σ weight · row in float64 [n], one row at a time."""
    total = np.zeros(rows_Nn.shape[1])
    for weight, row in zip(weights, rows_Nn, strict=True):
        total += np.multiply(row, weight, dtype=np.float64)
    return total


def linear(s: Settings, tensor: Tensor) -> Stretches:
    """Yields Σ w θ / Σ w: with equal weights a uniform soup (Wortsman et al. 2022, arXiv:2203.05482)."""
    for stretch in tensor.read():
        yield weighted_sum(s.weights, stretch.models_Nn) / sum(s.weights)


def products(rows: Callable[[], Iterator[np.ndarray]], N: int) -> np.ndarray:
    """Returns the inner products [N, N] of N whole tensors, of which stretches are read."""
    out = np.zeros((N, N))
    for rows_Nn in rows():
        wide = rows_Nn.astype(np.float64)
        out += wide @ wide.T
    return out


def slerp(s: Settings, tensor: Tensor) -> Stretches:
    """Yields the point at `t` of the arc between two tensors (Shoemake 1985), each taken as one long vector.

    Where they are nearly parallel or opposite, or one is zero and so has no direction, it is that of the line.
    """
    assert s.t is not None
    (aa, ab), (_, bb) = products(lambda: (stretch.models_Nn for stretch in tensor.read()), 2)
    cosine = ab / math.sqrt(aa * bb) if aa * bb > 0 else 1.0
    if abs(cosine) > PARALLEL:
        weights = (1 - s.t, s.t)
    else:
        angle = math.acos(cosine)
        weights = (math.sin((1 - s.t) * angle) / math.sin(angle), math.sin(s.t * angle) / math.sin(angle))
    for stretch in tensor.read():
        yield weighted_sum(weights, stretch.models_Nn)


# --------------------------------------------------------------------------------------------- changes since the base


def changes(tensor: Tensor) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (first position, the base's numbers [n], what each model changed [N, n]) of each stretch."""
    for start, base_n, rows_Nn in tensor.read():
        assert base_n is not None
        rows_Nn -= base_n
        yield start, base_n, rows_Nn


def model_stock(s: Settings, tensor: Tensor) -> Stretches:
    """Yields base + t · (mean of the changes), t = N cos / (1 + (N − 1) cos) (Jang et al. 2024, arXiv:2403.19522).

    `cos` is the mean cosine of two models' changes of the tensor. Where it is below 0 the models share no direction and
    t is 0; the published formula would then go away from all of them.
    """
    N = len(next(iter(tensor.read())).models_Nn)
    dots = products(lambda: (changes_Nn for _, _, changes_Nn in changes(tensor)), N)
    norms = np.sqrt(dots.diagonal())
    cosines = [dots[i, j] / max(norms[i] * norms[j], 1e-300) for i in range(N) for j in range(i)]
    cosine = min(max(float(np.mean(cosines)), 0.0), 1.0)
    t = N * cosine / (1 + (N - 1) * cosine)
    for _, base_n, changes_Nn in changes(tensor):
        yield base_n + t * weighted_sum((1 / N,) * N, changes_Nn)


def elected_mean(weights: Sequence[float], rows_Nn: np.ndarray, divide: bool) -> np.ndarray:
    """Returns the weighted changes that have the sign of their sum, added up; with `divide` their weighted mean."""
    signs = np.where(weighted_sum(weights, rows_Nn) >= 0, np.float32(1), np.float32(-1))
    total, divisor = np.zeros(rows_Nn.shape[1]), np.zeros(rows_Nn.shape[1])
    for weight, row in zip(weights, rows_Nn, strict=True):
        along = row * signs
        agrees = along > 0 if weight > 0 else along < 0
        total += np.multiply(along * agrees, weight, dtype=np.float64)
        np.add(divisor, weight, out=divisor, where=agrees)
    total *= signs
    if not divide:
        return total
    divisor[divisor == 0] = 1  # no model changed the number
    return total / divisor


class Plan(NamedTuple):
    """A plan of merging changes says which are kept, and how they are added up."""

    prune: Callable[[Settings, Tensor], Callable[[], Sequence[Keep]]] | None = None
    """Returns a function that gives each model's `Keep` anew, for each reading of the tensor; None: all are kept."""
    elect: bool = False
    """Only changes of the sign of their sum are added up."""
    divide: bool = False
    """The sum is divided by the weights of those that were added up."""


def merge_changes(plan: Plan, s: Settings, tensor: Tensor) -> Stretches:
    """Yields base + scale · (sum or mean of the weighted changes that are kept)."""
    assert s.scale is not None
    keepers = plan.prune(s, tensor) if plan.prune is not None and s.density != 1 else None
    factors = _factors(s, tensor, keepers) if keepers is not None else np.ones(len(s.weights))
    keep = keepers() if keepers is not None else ()
    for start, base_n, changes_Nn in changes(tensor):
        for change, kept, factor in zip(changes_Nn, keep, factors, strict=False):
            change *= kept(start, change)
            change *= np.float32(factor)
        add = elected_mean(s.weights, changes_Nn, plan.divide) if plan.elect else weighted_sum(s.weights, changes_Nn)
        yield base_n + s.scale * add


def _factors(s: Settings, tensor: Tensor, keepers: Callable[[], Sequence[Keep]]) -> np.ndarray:
    """Returns what each model's kept changes are multiplied by."""
    if s.rescale == "density":
        assert s.density is not None
        return np.full(len(s.weights), 1 / s.density)
    if s.rescale in (None, "off"):
        return np.ones(len(s.weights))
    before, after, keep = np.zeros(len(s.weights)), np.zeros(len(s.weights)), keepers()
    for start, _, changes_Nn in changes(tensor):
        for i, change in enumerate(changes_Nn):
            magnitudes = np.abs(change).astype(np.float64)
            before[i] += magnitudes.sum()
            after[i] += magnitudes[keep[i](start, change)].sum()
    return np.divide(before, after, out=np.ones_like(before), where=after > 0)


# ----------------------------------------------------------------------------------------- which changes are kept


def random_kept(seed: int, model: int, name: str, start: int, count: int, share: float) -> np.ndarray:
    """Returns which of `count` positions from `start` on are kept: each with a probability of `share`.

    It is a pure function of the seed, the model's number, the tensor's name and the position.
    """
    digest = hashlib.sha256(f"{seed}\0{model}\0{name}".encode()).digest()
    key = np.frombuffer(digest, np.uint64, 2)
    draws = np.random.Philox(key=key, counter=start // 4)  # a step of the counter gives four numbers
    return draws.random_raw(start % 4 + count)[start % 4 :] < np.uint64(min(int(share * 2**64), 2**64 - 1))


def _at_random(s: Settings, tensor: Tensor) -> Callable[[], Sequence[Keep]]:
    """Keeps changes at random (DARE, Yu et al. 2024, arXiv:2311.03099)."""
    share = s.density
    assert share is not None

    def keeper(model: int) -> Keep:
        return lambda start, change: random_kept(s.seed, model, tensor.name, start, len(change), share)

    return lambda: [keeper(model) for model in range(len(s.weights))]


def _largest(s: Settings, tensor: Tensor) -> Callable[[], Sequence[Keep]]:
    """Keeps the changes of the greatest magnitude (TIES, Yadav et al. 2023, arXiv:2306.01708); at least one."""
    assert s.density is not None
    cuts = find_cuts(tensor, len(s.weights), [max(1, int(s.density * tensor.size))])
    return lambda: [_Top(cut) for [cut] in cuts]


def _middle(s: Settings, tensor: Tensor) -> Callable[[], Sequence[Keep]]:
    """Drops the share `gamma` of the greatest changes, then keeps the greatest (Davari & Belilovsky 2024,
    arXiv:2312.06795); fewer are dropped where else fewer than the share `density` were kept."""
    assert s.density is not None and s.gamma is not None
    keep = max(1, int(s.density * tensor.size))
    drop = min(int(s.gamma * tensor.size), tensor.size - keep)
    cuts = find_cuts(tensor, len(s.weights), [drop, drop + keep])

    def keeper(above: Cut, within: Cut) -> Keep:
        dropped, kept = _Top(above), _Top(within)
        return lambda start, change: kept(start, change) & ~dropped(start, change)

    return lambda: [keeper(above, within) for above, within in cuts]


class Cut(NamedTuple):
    """A cut tells so many greatest magnitudes of a tensor from the others: all above `bits`, and of those that equal
    them the `equal` first ones. Magnitudes are compared as the bits of their float32, which are in the same order."""

    bits: int
    equal: int


class _Top:
    """A `Keep` of what a cut holds."""

    def __init__(self, cut: Cut) -> None:
        self._bits, self._left = np.uint32(cut.bits), cut.equal

    def __call__(self, start: int, change: np.ndarray) -> np.ndarray:
        bits = _bits(change)
        kept = bits > self._bits
        if self._left:
            equal = np.flatnonzero(bits == self._bits)[: self._left]
            kept[equal] = True
            self._left -= len(equal)
        return kept


def _bits(change: np.ndarray) -> np.ndarray:
    return np.abs(change).view(np.uint32)


def find_cuts(tensor: Tensor, N: int, counts: Sequence[int]) -> list[list[Cut]]:
    """Returns, for each of N models, the cut of the so many greatest changes, exactly, for each of some counts.

    The tensor is read twice: what is held between are counts of the changes by half of their bits.
    """
    high = np.zeros((N, BINS), np.int64)
    for _, _, changes_Nn in changes(tensor):
        for i, change in enumerate(changes_Nn):
            high[i] += np.bincount(_bits(change) >> 16, minlength=BINS)
    bins, above = np.zeros((2, N, len(counts)), np.int64)
    for i in range(N):
        for k, count in enumerate(counts):
            bins[i, k], above[i, k] = _bin_of(high[i], count)
    low = np.zeros((N, len(counts), BINS), np.int64)
    for _, _, changes_Nn in changes(tensor):
        for i, change in enumerate(changes_Nn):
            bits = _bits(change)
            for k in range(len(counts)):
                low[i, k] += np.bincount(bits[bits >> 16 == bins[i, k]] & (BINS - 1), minlength=BINS)
    cuts: list[list[Cut]] = [[] for _ in range(N)]
    for i in range(N):
        for k, count in enumerate(counts):
            lower, greater = _bin_of(low[i, k], count - above[i, k])
            cuts[i].append(Cut(int(bins[i, k]) * BINS + lower, int(count - above[i, k] - greater)))
    return cuts


def _bin_of(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """Returns the bin of the number that is the `rank`-th from above, and how many numbers lie in bins above it.

    Rank 0 gives the highest bin that is not empty.
    """
    upward = counts[::-1].cumsum()
    back = int(np.searchsorted(upward, max(rank, 1)))
    return len(counts) - 1 - back, int(upward[back - 1]) if back else 0


# ----------------------------------------------------------------------------------------------------- the methods


def _of_changes(prune: Any = None, elect: bool = False, divide: bool = False, **settings: Any) -> Method:
    plan = Plan(prune, elect, divide)
    known = {"weights": (), "scale": 1.0} | settings
    return Method(lambda s, tensor: merge_changes(plan, s, tensor), True, 1, settings=known)


_DARE: dict[str, Any] = {"density": None, "rescale": "density", "seed": 0}
METHODS: dict[str, Method] = {
    "linear": Method(linear, False, 2, settings={"weights": ()}),
    "slerp": Method(slerp, False, 2, 2, {"t": 0.5}),
    "task_arithmetic": _of_changes(),  # Ilharco et al. 2023, arXiv:2212.04089
    "ties": _of_changes(_largest, True, True, density=0.2),
    "dare_linear": _of_changes(_at_random, **_DARE),
    "dare_ties": _of_changes(_at_random, True, **_DARE),
    "breadcrumbs": _of_changes(_middle, density=None, gamma=0.01),
    "model_stock": Method(model_stock, True, 2),
}
