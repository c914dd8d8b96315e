"""Matrices of int8 or fp8 numbers with scales: one for all, one for each output, or one for each group or block."""

import math
from typing import Any

import numpy as np

from jaxlm.formats.quantization.files import FLOAT, Module, Raw, Slices, Stored
from jaxlm.formats.quantization.mxfp4 import powers


def scaled(m: Module, weight: str, scale: str, block: Any = None, zero: str = "", order: str = "") -> Stored:
    """Returns how a matrix of int8 or fp8 numbers [*lead, out, in] with scales stands in files.

    The scales are one number, or of shape [*lead, out], [*lead, out, 1], [*lead, out, groups] or, with `block`
    (outputs, inputs), one for each block. Bytes are powers of two as MXFP8 has them. `zero`: the last name of zero
    points of the same shape; `order`: that of the group of each input. ValueError: the scales are of another shape.
    """
    dense = m.entry(weight).shape
    entry = m.expect(weight, [None] * min(max(len(dense), 2), 3), "8i")
    *lead, outs, ins = entry.shape
    shape = m.entry(scale).shape
    kind = m.expect(scale, shape, "f8eu").dtype
    single = math.prod(shape) == 1
    rows, columns = (outs, ins) if single else _sides(m, scale, entry.shape, shape, block)
    if zero:
        m.expect(zero, shape, "i8f")
    if order:
        m.expect(order, [ins], "i")
    names = {part: f"{m.name}.{part}" for part in (weight, scale, zero, order) if part}

    def spread(raw: Raw, part: str, box: Slices) -> np.ndarray:
        """Returns a number for each of the box, or one for all."""
        x = raw.whole(names[part])
        x = powers(x) if part == scale and kind == np.uint8 else x.astype(FLOAT)
        if single:
            return x.reshape(())
        *first, r, c = box
        group = raw.whole(names[order])[c] if order else np.arange(c.start, c.stop) // columns
        x = x.reshape(*lead, -1, shape[-1] if len(shape) == len(dense) else 1)[tuple(first)]
        return x[..., np.arange(r.start, r.stop) // rows, :][..., group]

    def numbers(raw: Raw, box: Slices) -> np.ndarray:
        w = raw.part(names[weight], *box).astype(FLOAT)
        if zero:
            w -= spread(raw, zero, box)
        return w * spread(raw, scale, box)

    return Stored(entry.shape, m.used_names(), numbers)


def _sides(m: Module, scale: str, dense: tuple[int, ...], shape: tuple[int, ...], block: Any) -> tuple[int, int]:
    """Returns how many outputs and how many inputs share a scale."""
    *lead, outs, ins = dense
    if block is not None:
        if shape == (*lead, -(-outs // block[0]), -(-ins // block[1])):
            return block[0], block[1]
    elif shape in ((*lead, outs), (*lead, outs, 1)):
        return 1, ins
    elif len(shape) == len(dense) and shape[:-1] in ((*lead, outs), (*lead, 1)) and ins % shape[-1] == 0:
        return (1 if shape[-2] == outs else outs), ins // shape[-1]
    due = "one, or one for each output or group" if block is None else f"one for each block of {block[0]} × {block[1]}"
    raise ValueError(
        f"{m.entry(scale).file}: {m.name}.{scale} has {list(shape)} scales for {list(dense)}, where {due} are due by "
        "quantization_config; check that config.json belongs to these weights"
    )
