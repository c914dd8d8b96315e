"""Finds the scales of llama.cpp's blocks of few bits: first by its own searches, then better ones from there.

The first are the weighted least-squares searches over codes of its ggml-quants.c, whose sums run in the same order, so
that scales are the same bit for bit. Each later step is taken only where the squared error of the numbers that are
really stored, each times its column's importance, becomes less.

N numbers of a sub-block that share a scale, S sub-blocks of a super-block, B blocks. Arrays are `[N, B]` or
`[N, S, B]`, so that one operation does the same to the numbers of all blocks. Numbers are float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROUNDS = 2  # of improving
TINY = np.float32(1e-15)  # magnitudes that llama.cpp takes for zero

Array = np.ndarray


# ------------------------------------------------------------------------------------------------ llama.cpp's searches


def divided(x: Array | np.floating, by: Array) -> Array:
    """Returns x / by; 0 where that divides by 0."""
    return np.where(by != 0, x / np.where(by != 0, by, np.float32(1)), np.float32(0))


def codes_of(x: Array, scale: Array, least: Array | float, low: int, high: int) -> Array:
    """Returns the codes of the nearest numbers least + scale · code; 0 where the scale is 0."""
    return np.clip(np.rint(divided(x - least, scale)), low, high)


def loss_of(x: Array, w: Array | None, scale: Array, least: Array | float, codes: Array) -> Array:
    """Returns the weighted squared error of each sub-block."""
    off = codes * scale
    off += least
    off -= x
    off *= off
    if w is not None:
        off *= w
    return off.sum(0)


def affine(x: Array, w: Array, top: int, first: float, step: float, steps: int) -> tuple[Array, Array]:
    """Returns (scale, least), for numbers as least + scale · code with codes 0 to `top`, and least not above 0.

    Codes are tried for which the span is `top` + `first`, + `step` more each time, counted from the best least so far;
    the best scale and least are solved for.
    """
    least, high = np.minimum(x.min(0), 0), x.max(0)
    total, sum_x = w.sum(0), (w * x).sum(0)
    per = divided(np.float32(top), high - least)
    scale = divided(np.float32(1), per)
    best = loss_of(x, w, scale, least, np.clip(np.rint((x - least) * per), 0, top))
    for i in range(steps + 1):
        top_now = np.float32(first) + np.float32(step) * np.float32(i) + np.float32(top)
        q = x - least
        q *= divided(top_now, high - least)
        np.rint(q, out=q)
        np.clip(q, 0, top, out=q)
        wq = w * q
        sum_q, sum_qx = wq.sum(0), (wq * x).sum(0)
        wq *= q
        sum_qq = wq.sum(0)
        det = total * sum_qq - sum_q * sum_q
        s = divided(total * sum_qx - sum_x * sum_q, det)
        m = divided(sum_qq * sum_x - sum_q * sum_qx, det)
        s, m = np.where(m > 0, divided(sum_qx, sum_qq), s), np.minimum(m, 0)
        loss = loss_of(x, w, s, m, q)
        better = (det > 0) & (loss < best)
        best, scale, least = np.where(better, loss, best), np.where(better, s, scale), np.where(better, m, least)
    return scale, least


def symmetric(x: Array, w: Array, top: int) -> Array:
    """Returns the scale, for numbers as scale · code with codes -`top` to `top` - 1; it may be negative.

    The number of the largest magnitude is given codes around -`top`; each time the best scale is solved for.
    """
    largest = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    largest = np.where(np.abs(largest) < TINY, 0, largest)
    scale = best = np.zeros_like(largest)
    for i in (0, *range(-9, 0), *range(1, 10)):
        q = x * divided(-(np.float32(top) + np.float32(0.1) * np.float32(i)), largest)
        np.rint(q, out=q)
        np.clip(q, -top, top - 1, out=q)
        wq = w * q
        sum_qx = (w * x * q).sum(0)
        wq *= q
        sum_qq = wq.sum(0)
        better = sum_qq > 0 if i == 0 else (sum_qq > 0) & (sum_qx * sum_qx > best * sum_qq)
        s = divided(sum_qx, sum_qq)
        scale, best = np.where(better, s, scale), np.where(better, s * sum_qx, best)
    return scale


def whole(x: Array, w: Array, top: int) -> tuple[Array, Array]:
    """Returns (unit `[B]`, codes 0 to `top` `[S, B]`), for numbers of 0 or more `[S, B]` as unit · code: the best of
    nine units, then code by code while that has less error."""
    largest = x.max(0)
    largest = np.where(largest < TINY, 0, largest)
    per = divided(np.float32(top), largest)
    best = loss_of(x, w, divided(np.float32(1), per), 0, np.rint(per * x))
    for i in (*range(-4, 0), *range(1, 5)):
        tried = divided(np.float32(0.1) * np.float32(i) + np.float32(top), largest)
        loss = loss_of(x, w, divided(np.float32(1), tried), 0, np.minimum(np.rint(tried * x), top))
        better = loss < best
        best, per = np.where(better, loss, best), np.where(better, tried, per)
    q = np.minimum(np.rint(per * x), top)
    sum_qx, sum_qq = (w * x * q).sum(0), (w * q * q).sum(0)
    for _ in range(5):
        for j in range(len(x)):
            wx = w[j] * x[j]
            less_qx, less_qq = sum_qx - wx * q[j], sum_qq - w[j] * q[j] * q[j]
            new = np.minimum(np.rint(divided(x[j] * less_qq, less_qx)), top)
            more_qx, more_qq = less_qx + wx * new, less_qq + w[j] * new * new
            better = (less_qx > 0) & (less_qq > 0) & (new != q[j])
            better &= more_qx * more_qx * sum_qq > sum_qx * sum_qx * more_qq
            q[j] = np.where(better, new, q[j])
            sum_qx, sum_qq = np.where(better, more_qx, sum_qx), np.where(better, more_qq, sum_qq)
    return divided(sum_qx, sum_qq), q


def search_weights(x: Array, importance: Array, mean_square: Array) -> Array:
    """Returns llama.cpp's weights: importance, more for large numbers."""
    return importance * np.sqrt(mean_square + x * x)


def of_largest(x: Array, top: int) -> tuple[Array, Array]:
    """Returns (unit `[B]`, codes 0 to `top` `[S, B]`), of which the largest number has `top`."""
    largest = x.max(0)
    return largest / np.float32(top), np.minimum(np.rint(divided(np.float32(top), largest) * x), top)


# ------------------------------------------------------------------------------------------------------------ improving


def half(x: Array) -> Array:
    """Rounds to float16 and back."""
    return x.astype(np.float16).astype(np.float32)


def chosen(x: Array, w: Array | None, tried: Sequence[tuple[Array, Array]], low: int, high: int) -> tuple[Array, Array]:
    """Returns the (scale, least) of float16's numbers that have the least error, of those that are tried and of what
    is solved for from their codes."""

    def stored(scale: Array, least: Array) -> tuple[Array, Array]:
        q = codes_of(x, scale, least, low, high)
        return q, loss_of(x, w, scale, least, q)

    affine = any(least.any() for _, least in tried)
    scale, least = (half(a) for a in tried[0])
    q, best = stored(scale, least)

    def take(s: Array, m: Array) -> None:
        nonlocal scale, least, q, best
        s, m = half(s), half(m)
        codes, loss = stored(s, m)
        better = loss < best
        best, scale, least = np.where(better, loss, best), np.where(better, s, scale), np.where(better, m, least)
        q = np.where(better, codes, q)

    for s, m in tried[1:]:
        take(s, m)
    v = np.float32(1) if w is None else w
    for _ in range(ROUNDS):
        vq = v * q
        sum_qx, sum_qq = (vq * x).sum(0), (vq * q).sum(0)
        if affine:
            sum_q, sum_x = vq.sum(0), (v * x).sum(0)
            total = np.float32(len(x)) if w is None else w.sum(0)
            det = total * sum_qq - sum_q * sum_q
            found = det > 0
            s, m = divided(total * sum_qx - sum_x * sum_q, det), divided(sum_qq * sum_x - sum_q * sum_qx, det)
            take(np.where(found, s, scale), np.where(found, m, least))
        else:
            take(divided(sum_qx, sum_qq), least)
    return scale, least


class Scales(NamedTuple):
    """These are the stored scales of super-blocks: a number is d · of · code - m · least_of."""

    d: Array
    """`[B]`, float16's numbers, as `m`."""
    m: Array
    of: Array
    """`[S, B]`, whole numbers, as `least_of`."""
    least_of: Array


class SuperBlocks(NamedTuple):
    """SuperBlocks hold numbers, their weights, and the ranges of codes and of whole scales."""

    x: Array
    w: Array | None
    codes: tuple[int, int]
    whole: tuple[int, int]
    affine: bool

    def best(self, s: Scales) -> tuple[Array, Array]:
        """Returns the nearest codes and each sub-block's error `[S, B]`."""
        scale, least = s.d * s.of, -(s.m * s.least_of)
        q = codes_of(self.x, scale, least, *self.codes)
        return q, loss_of(self.x, self.w, scale, least, q)

    def improved(self, s: Scales) -> Scales:
        """Returns scales with no more error: the neighbours of each whole number are tried, then d and m solved for."""
        _, loss = self.best(s)
        steps = [(a, b) for a in (-1, 0, 1) for b in ((-1, 0, 1) if self.affine else (0,)) if (a, b) != (0, 0)]
        for _ in range(ROUNDS):
            of, least_of = s.of, s.least_of
            for a, b in steps:
                tried = s._replace(
                    of=np.clip(s.of + a, *self.whole), least_of=np.clip(s.least_of + b, 0, self.whole[1])
                )
                _, found = self.best(tried)
                better = found < loss
                loss = np.where(better, found, loss)
                of, least_of = np.where(better, tried.of, of), np.where(better, tried.least_of, least_of)
            s = s._replace(of=of, least_of=least_of)
            q, loss = self.best(s)
            tried = self._solved(s, q)
            _, found = self.best(tried)
            better = found.sum(0) < loss.sum(0)
            s = s._replace(d=np.where(better, tried.d, s.d), m=np.where(better, tried.m, s.m))
            loss = np.where(better, found, loss)
        return s

    def _solved(self, s: Scales, q: Array) -> Scales:
        """Returns the d and m that are best for codes, rounded to float16."""
        a, b = s.of * q, -s.least_of
        w = np.ones_like(self.x) if self.w is None else self.w
        wa = w * a
        aa, ax = (wa * a).sum((0, 1)), (wa * self.x).sum((0, 1))
        if not self.affine:
            return s._replace(d=half(divided(ax, aa)))
        ab, bb = (wa.sum(0) * b).sum(0), (w.sum(0) * b * b).sum(0)
        bx = ((w * self.x).sum(0) * b).sum(0)
        det = aa * bb - ab * ab
        both = det > 1e-5 * aa * bb
        d = np.where(both, divided(ax * bb - bx * ab, det), divided(ax - s.m * ab, aa))
        m = np.where(both, divided(aa * bx - ab * ax, det), s.m)
        return s._replace(d=half(d), m=half(np.maximum(m, 0)))
