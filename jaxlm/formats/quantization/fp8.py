"""Weights of fp8 with scales, as DeepSeek, AutoFP8, FBGEMM and transformers write them: `weight` beside
`weight_scale_inv`, one scale for each block of 128 × 128, or `weight_scale`, one for the matrix or for each output.

Both are factors, whatever their names say.
"""

from collections.abc import Mapping
from typing import Any

from jaxlm.formats.quantization.files import Module, Stored, modules
from jaxlm.formats.quantization.scaled import scaled
from jaxlm.formats.safetensors import Files

SCALES = ("weight_scale_inv", "weight_scale")
ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub", "output_scale")
"""Scales of what comes in and goes out, which stays as it is here."""


def find(q: Mapping[str, Any], files: Files) -> dict[str, Stored]:
    """Returns how each quantized matrix of a directory stands in it, by the name of the dense weight."""
    block = block_of(q.get("weight_block_size"), "weight_block_size")
    found = {}
    for last in SCALES:
        for name in modules(files, last):
            m = Module(files, name)
            found[f"{name}.weight"] = scaled(m, "weight", last, block)._replace(unread=m.unread(*ACTIVATIONS))
    for full in [name for name in files.entries if name.endswith("_proj_scale_inv")]:  # all experts in one tensor
        dense, last = full.removesuffix("_scale_inv"), full.rpartition(".")[2]
        m = Module(files, full.rpartition(".")[0])
        found[dense] = scaled(m, last.removesuffix("_scale_inv"), last, block)
    return found


def block_of(value: Any, key: str) -> tuple[int, int] | None:
    """Returns the outputs and inputs of a block. ValueError: the value is no block."""
    if value is None:
        return None
    if isinstance(value, str):
        value = [int(n) if n.isdecimal() else 0 for n in value.split("x")]
    whole = isinstance(value, list | tuple) and all(isinstance(n, int) and n > 0 for n in value)
    if not whole or len(value) != 2:
        raise ValueError(f"config.json: quantization_config: {key} is {value!r}; it must be two whole numbers above 0")
    return value[0], value[1]
