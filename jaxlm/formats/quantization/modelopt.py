"""NVIDIA's Model Optimizer stores fp8 with `weight_scale`, and NVFP4 as `weight` uint8 [out, in/2] with `weight_scale`
e4m3 [out, in/16] and a factor of all, `weight_scale_2`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.formats.quantization.files import FLOAT, Module, Raw, Slices, Stored, modules
from jaxlm.formats.quantization.mxfp4 import low_first
from jaxlm.formats.quantization.scaled import scaled
from jaxlm.formats.safetensors import Files

UNREAD = ("input_scale", "output_scale")
ALGORITHMS = ("FP8", "NVFP4", "MIXED_PRECISION")


def find(q: Mapping[str, Any], files: Files) -> dict[str, Stored]:
    """Returns how each quantized matrix of a directory stands in it, by the name of the dense weight. ValueError: an
    algorithm whose layout isn't read."""
    algorithm = q.get("quant_algo") or (q.get("quantization") or {}).get("quant_algo")
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"config.json: quantization_config: quant_algo {algorithm!r} of modelopt is not read, only "
            f"{', '.join(ALGORITHMS)}; bring the unquantised weights"
        )
    found = {}
    for name in modules(files, "weight_scale"):
        m = Module(files, name)
        four = m.entry("weight").dtype == np.uint8
        found[f"{name}.weight"] = (_nvfp4(m) if four else scaled(m, "weight", "weight_scale"))._replace(
            unread=m.unread(*UNREAD)
        )
    return found


def _nvfp4(m: Module) -> Stored:
    outs, half = m.expect("weight", [None, None], "u").shape
    ins, size, name = 2 * half, 16, m.name
    m.expect("weight_scale", [outs, -(-ins // size)], "8f")
    m.expect("weight_scale_2", m.entry("weight_scale_2").shape, "f")

    def numbers(raw: Raw, box: Slices) -> np.ndarray:
        r, c = box
        first = c.start // 2
        codes = low_first(raw.part(f"{name}.weight", r, slice(first, -(-c.stop // 2))))
        scale = raw.part(f"{name}.weight_scale", r).astype(FLOAT)
        scale = scale * raw.whole(f"{name}.weight_scale_2").astype(FLOAT).reshape(())
        at = slice(c.start - 2 * first, c.stop - 2 * first)
        return codes[:, at] * scale[:, np.arange(c.start, c.stop) // size]

    return Stored((outs, ins), m.used_names(), numbers)
