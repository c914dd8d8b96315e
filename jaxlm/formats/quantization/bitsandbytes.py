"""bitsandbytes stores NF4 and FP4 in blocks of the flattened matrix, and int8 with the largest number of each row.

Four bits: `weight` uint8 [out·in/2, 1], the first code in the high half; `weight.absmax`, one number a block, and
`weight.quant_map`, what a code stands for; with a second quantization `weight.nested_absmax` and
`weight.nested_quant_map`; `weight.quant_state.bitsandbytes__nf4` has the shapes, as the bytes of a JSON object.
int8: `weight` [out, in] and `SCB` [out].
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.formats.quantization.files import FLOAT, Module, Raw, Slices, Stored, modules
from jaxlm.formats.safetensors import Files

STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")


def find(q: Mapping[str, Any], files: Files) -> dict[str, Stored]:
    """Returns how each quantized matrix of a directory stands in it, by the name of the dense weight."""
    found = {f"{name}.weight": _bytes(Module(files, name)) for name in modules(files, "SCB")}
    for state in STATES:
        found |= {f"{name}.weight": _nibbles(Module(files, name), state) for name in modules(files, state)}
    return found


def _bytes(m: Module) -> Stored:
    outs, ins = m.expect("weight", [None, None], "i").shape
    m.expect("SCB", [outs], "f")
    name = m.name

    def numbers(raw: Raw, box: Slices) -> np.ndarray:
        largest = raw.part(f"{name}.SCB", box[0]).astype(FLOAT)
        return raw.part(f"{name}.weight", *box).astype(FLOAT) * (largest / 127)[:, None]

    return Stored((outs, ins), m.used_names(), numbers, m.unread("weight_format"))


def _nibbles(m: Module, last: str) -> Stored:
    file = m.entry(last).file
    try:
        state = json.loads(m.files.read(f"{m.name}.{last}").tobytes())
        outs, ins = (int(n) for n in state["shape"])
        block, nested = int(state["blocksize"]), int(state.get("nested_blocksize", 0))
        offset = float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: {m.name}.{last} can't be read ({error!r}); fetch the files again") from None
    if outs < 1 or ins < 1 or block < 1 or nested < 0:
        raise ValueError(f"{file}: {m.name}.{last} has the shape {[outs, ins]} and blocks of {block}; fetch it again")
    packed = m.entry("weight")
    m.expect("weight", packed.shape, "u")
    blocks = -(-outs * ins // block)
    if math.prod(packed.shape) != -(-outs * ins // 2):
        m.expect("weight", [-(-outs * ins // 2), 1], "u")
    m.expect("weight.quant_map", [16], "f")
    twice = m.has("weight.nested_absmax")
    m.expect("weight.absmax", [blocks], "u" if twice else "f")
    if twice:
        m.expect("weight.nested_absmax", [-(-blocks // nested) if nested else None], "f")
        m.expect("weight.nested_quant_map", [256], "f")
    name = f"{m.name}.weight"

    def numbers(raw: Raw, box: Slices) -> np.ndarray:
        r, c = box
        start, stop = r.start * ins, r.stop * ins
        first = start // 2
        codes = raw.whole(name).reshape(-1)[first : -(-stop // 2)]
        codes = np.stack([codes >> 4, codes & 15], -1).reshape(-1)[start - 2 * first : stop - 2 * first]
        largest = raw.whole(f"{name}.absmax")
        if twice:
            coarse = raw.whole(f"{name}.nested_absmax").astype(FLOAT)[np.arange(blocks) // nested]
            largest = raw.whole(f"{name}.nested_quant_map").astype(FLOAT)[largest] * coarse + np.float32(offset)
        w = raw.whole(f"{name}.quant_map").astype(FLOAT)[codes] * largest[np.arange(start, stop) // block]
        return w.astype(FLOAT).reshape(-1, ins)[:, c]

    return Stored((outs, ins), m.used_names(), numbers)
