"""Encodes rows of numbers into llama.cpp's blocks of few bits: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K.

No block has more error than what llama.cpp's own encoder makes: the sum of squares, each times its column's importance
(`gguf_scales.py`). Q8_0 is llama.cpp's bit for bit. How blocks are laid out is stated in its ggml-common.h.

N numbers of a sub-block that share a scale, S sub-blocks of a super-block of 256, B blocks, R rows, C columns.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from jaxlm.formats import gguf_scales
from jaxlm.formats.gguf_scales import Array

LARGEST = 65504.0  # of the numbers that are taken: scales are stored as float16
CHUNK = 1 << 16  # numbers that are encoded at once, which stay in a core's cache
SUPER = 256  # numbers of a super-block
LEAST_IMPORTANCE = 1e-6  # of a column, as a share of the mean: one that was never used still gets near numbers


def encode(rows: Array, kind: str, importance: Array | None = None) -> Array:
    """Returns the bytes `[R, bytes]` of rows `[R, C]` as one of `KINDS`, whose `size` divides C.

    `importance` `[C]` says how much the squared error of each column counts, such as the mean square of the inputs that
    it is multiplied with; None: all the same. Raises ValueError, whose text goes on from the name of what is encoded,
    for numbers that aren't finite or beyond `LARGEST`, and for importance that isn't a weight of every column.
    """
    k, columns = KINDS[kind], rows.shape[1]
    assert columns % k.size == 0, f"{kind}: rows of {columns}"
    if not np.isfinite(rows).all():
        raise ValueError("holds NaN or infinity")
    if np.abs(rows).max(initial=0) > LARGEST:
        raise ValueError(f"holds numbers beyond {LARGEST:g}, the range of {kind}")
    weights = None if importance is None else _as_weights(importance, columns)
    each = max(1, CHUNK // columns)
    parts = [np.ascontiguousarray(rows[i : i + each], np.float32) for i in range(0, len(rows), each)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(lambda part: _encode(part, k, weights), parts))
    return np.concatenate([np.zeros((0, columns // k.size * k.nbytes), np.uint8), *made])


def _as_weights(importance: Array, columns: int) -> Array:
    if importance.shape != (columns,):
        raise ValueError(f"has importance of shape {importance.shape} for {columns} columns")
    if not (np.isfinite(importance).all() and (importance >= 0).all() and importance.any()):
        raise ValueError("has importance that is negative, not finite or zero for all columns")
    return np.maximum(importance, importance.mean(dtype=np.float64) * LEAST_IMPORTANCE).astype(np.float32)


def _encode(rows: Array, k: "Kind", importance: Array | None) -> Array:
    x = _blocks(rows, k)
    w = None if importance is None else _blocks(np.broadcast_to(importance, rows.shape), k)
    with np.errstate(all="ignore"):  # where a block's numbers are all zero or tiny, its scale is 0
        return k.pack(x, w, rows).reshape(len(rows), -1)


def _blocks(rows: Array, k: "Kind") -> Array:
    if k.size == SUPER:
        return np.ascontiguousarray(rows.reshape(-1, SUPER // k.shared, k.shared).transpose(2, 1, 0))
    return np.ascontiguousarray(rows.reshape(-1, k.size).T)


# ------------------------------------------------------------------------------------------------ blocks of 32 numbers


def _stored(*halves: Array) -> Array:
    """Returns the bytes `[B, 2 · count]` of float16 scales `[B]`."""
    return np.stack([h.astype(np.float16) for h in halves], 1).view(np.uint8)


def _nibbles(q: Array) -> Array:
    """Returns the lower four bits of codes `[B, 2, n]` as bytes `[B, n]`: those of the first half low."""
    return (q[:, 0] & 15) | (q[:, 1] & 15) << 4


def _mean_square_of_rows(rows: Array, blocks: int) -> Array:
    """Returns the mean square of the row that each block is of."""
    columns = np.ascontiguousarray(rows.T)
    return np.repeat((columns * columns).sum(0) / np.float32(rows.shape[1]), blocks // len(rows))


def _pack_symmetric(bits: int) -> "Pack":
    top = 1 << (bits - 1)

    def pack(x: Array, importance: Array | None, rows: Array) -> Array:
        if importance is None:
            largest = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
            found = [largest / np.float32(-top), gguf_scales.symmetric(x, np.ones_like(x), top)]
        else:
            w = gguf_scales.search_weights(x, importance, _mean_square_of_rows(rows, x.shape[1]))
            found = [gguf_scales.symmetric(x, w, top)]
        scale, _ = gguf_scales.chosen(x, importance, [(s, np.zeros_like(s)) for s in found], -top, top - 1)
        return _packed_32(gguf_scales.codes_of(x, scale, 0, -top, top - 1) + top, bits, scale)

    return pack


def _pack_affine(bits: int) -> "Pack":
    top = (1 << bits) - 1

    def pack(x: Array, importance: Array | None, rows: Array) -> Array:
        low = x.min(0)
        plain = ((x.max(0) - low) / np.float32(top), low)
        if importance is None:
            found = [plain, gguf_scales.affine(x, np.ones_like(x), top, -0.9, 0.05, 36)]
        else:
            w = gguf_scales.search_weights(x, importance, _mean_square_of_rows(rows, x.shape[1]))
            found = [gguf_scales.affine(x, w, top, -0.9, 0.05, 36), plain]
        scale, least = gguf_scales.chosen(x, importance, found, 0, top)
        return _packed_32(gguf_scales.codes_of(x, scale, least, 0, top), bits, scale, least)

    return pack


def _packed_32(codes: Array, bits: int, *scales: Array) -> Array:
    q = codes.astype(np.uint8).T
    fifth = [np.packbits(q >> 4, axis=1, bitorder="little")] if bits == 5 else []
    return np.concatenate([_stored(*scales), *fifth, _nibbles(q.reshape(-1, 2, 16))], 1)


def _pack_q8_0(x: Array, importance: Array | None, rows: Array) -> Array:
    scale = np.abs(x).max(0) / np.float32(127)
    scaled = x * gguf_scales.divided(np.float32(1), scale)
    whole = np.floor(np.abs(scaled))
    whole += np.abs(scaled) - whole >= 0.5  # halves go away from zero
    q = np.copysign(whole, scaled).astype(np.int8)
    return np.concatenate([_stored(scale), q.T.view(np.uint8)], 1)


# --------------------------------------------------------------------------------------------------- blocks of 256


def _pack_affine_k(bits: int, *search: float) -> "Pack":
    top = (1 << bits) - 1

    def pack(x: Array, importance: Array | None, rows: Array) -> Array:
        if importance is None:
            w = np.sqrt((x * x).sum(0) / np.float32(32)) + np.abs(x)
            scale, least = gguf_scales.affine(x, w, top, search[0], search[1], int(search[2]))
            (d, of), (m, least_of) = (gguf_scales.of_largest(a, 63) for a in (scale, -least))
        else:
            whole = x.transpose(1, 0, 2).reshape(SUPER, -1)
            mean = np.float32(2) * (whole * whole).sum(0) / np.float32(SUPER)
            w = gguf_scales.search_weights(x, importance, mean)
            scale, least = gguf_scales.affine(x, w, top, -0.9, 0.05, 36)
            (d, of), (m, least_of) = (gguf_scales.whole(a, w.sum(0), 63) for a in (scale, -least))
        blocks = gguf_scales.SuperBlocks(x, importance, (0, top), (0, 63), affine=True)
        s = blocks.improved(gguf_scales.Scales(gguf_scales.half(d), gguf_scales.half(m), of, least_of))
        q = blocks.best(s)[0].astype(np.uint8).transpose(2, 1, 0)  # [B, S, N]
        pairs = q.reshape(-1, 2, 32)
        fifth = []
        if bits == 5:  # bit i of byte j is that of number j of sub-block i
            fifth = [np.packbits(q >> 4, axis=1, bitorder="little")[:, 0]]
        parts = [_stored(s.d, s.m), _six_bits(s.of, s.least_of), *fifth, _nibbles(pairs).reshape(-1, SUPER // 2)]
        return np.concatenate(parts, 1)

    return pack


def _six_bits(of: Array, least_of: Array) -> Array:
    """Returns the bytes `[B, 12]` of eight scales and eight minima of six bits: the first four of each in a byte of
    its own, whose upper two bits are those of the last four, whose lower four bits share bytes."""
    a, b = of.astype(np.uint8).T, least_of.astype(np.uint8).T
    first = [x[:, :4] | (x[:, 4:] >> 4) << 6 for x in (a, b)]
    return np.concatenate([*first, (a[:, 4:] & 15) | (b[:, 4:] & 15) << 4], 1)


def _pack_q6_k(x: Array, importance: Array | None, rows: Array) -> Array:
    scale = gguf_scales.symmetric(x, x * x if importance is None else importance, 32)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(0)[None], 0)[0]
    largest = np.where(np.abs(largest) < gguf_scales.TINY, 0, largest)
    per = gguf_scales.divided(np.float32(-128), largest)
    d, of = gguf_scales.half(gguf_scales.divided(np.float32(1), per)), np.minimum(np.rint(per * scale), 127)
    blocks = gguf_scales.SuperBlocks(x, importance, (-32, 31), (-128, 127), affine=False)
    s = blocks.improved(gguf_scales.Scales(d, np.zeros_like(d), of, np.zeros_like(of)))
    q = (blocks.best(s)[0] + 32).astype(np.uint8).transpose(2, 1, 0).reshape(-1, 2, 4, 32)
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4
    high = q[:, :, 0] >> 4 | (q[:, :, 1] >> 4) << 2 | (q[:, :, 2] >> 4) << 4 | (q[:, :, 3] >> 4) << 6
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), s.of.astype(np.int8).T.view(np.uint8), _stored(s.d)]
    return np.concatenate(parts, 1)


Pack = Callable[[Array, Array | None, Array], Array]
"""(numbers, their importance or None, the rows that they are of) → bytes `[B, nbytes]`."""


class Kind(NamedTuple):
    """A Kind describes blocks and makes them."""

    size: int
    """Numbers of a block."""
    nbytes: int
    """Bytes of a block."""
    shared: int
    """Numbers that share a scale."""
    pack: Pack


KINDS = {
    "Q4_0": Kind(32, 18, 32, _pack_symmetric(4)),
    "Q4_1": Kind(32, 20, 32, _pack_affine(4)),
    "Q5_0": Kind(32, 22, 32, _pack_symmetric(5)),
    "Q5_1": Kind(32, 24, 32, _pack_affine(5)),
    "Q8_0": Kind(32, 34, 32, _pack_q8_0),
    "Q4_K": Kind(SUPER, 144, 32, _pack_affine_k(4, -1.0, 0.1, 20)),
    "Q5_K": Kind(SUPER, 176, 32, _pack_affine_k(5, -0.5, 0.1, 15)),
    "Q6_K": Kind(SUPER, 210, 16, _pack_q6_k),
}
