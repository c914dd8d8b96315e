"""MXFP4 as GPT-OSS has it: experts' four-bit floats in blocks of 32 inputs, each of which has a power of two.

`NAME_blocks` uint8 [experts, out, in/32, 16], two codes in a byte, the first in its low half; `NAME_scales` uint8
[experts, out, in/32], of which 127 is 1.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.formats.quantization.files import FLOAT, Raw, Slices, Stored
from jaxlm.formats.safetensors import Files
from jaxlm.weights.few_bits import FP4

BLOCK = 32
NUMBERS = np.array([*FP4, *(-x for x in FP4)], FLOAT)
"""The number of each code."""


def powers(exponents: np.ndarray) -> np.ndarray:
    """Returns 2 to the power of `exponents` − 127 as float32; 255 is NaN (OCP 2023)."""
    e = exponents.view(np.uint8)
    return np.where(e == 255, np.float32(np.nan), np.ldexp(np.float32(1), e.astype(np.int32) - 127))


def low_first(packed: np.ndarray) -> np.ndarray:
    """Returns the numbers of bytes of two codes along the last dimension, of which the first is in the low half."""
    codes = np.stack([packed & 15, packed >> 4], -1)
    return NUMBERS[codes.reshape(*packed.shape[:-1], -1)]


def find(q: Mapping[str, Any], files: Files) -> dict[str, Stored]:
    """Returns how each quantized matrix of a directory stands in it, by the name of the dense weight."""
    return {
        name.removesuffix("_blocks"): _stored(files, name.removesuffix("_blocks"))
        for name in files.entries
        if name.endswith("_blocks")
    }


def _stored(files: Files, name: str) -> Stored:
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    entry = files.entries[blocks]
    if scales not in files.entries:
        raise ValueError(f"{entry.file}: {blocks} has no {scales} beside it; fetch the files again")
    *lead, groups, half = entry.shape
    if half != BLOCK // 2 or len(lead) < 2 or files.entries[scales].shape != (*lead, groups):
        shapes = f"{list(entry.shape)} and {scales} {list(files.entries[scales].shape)}"
        raise ValueError(f"{entry.file}: {blocks} is {shapes}, which are no MXFP4 matrices; fetch the files again")

    def numbers(raw: Raw, box: Slices) -> np.ndarray:
        *rows, c = box
        g = slice(c.start // BLOCK, -(-c.stop // BLOCK))
        found = low_first(raw.part(blocks, *rows, g)) * powers(raw.part(scales, *rows, g))[..., None]
        first = g.start * BLOCK
        return found.reshape(*found.shape[:-2], -1)[..., c.start - first : c.stop - first]

    return Stored((*lead, groups * BLOCK), (blocks, scales), numbers)
