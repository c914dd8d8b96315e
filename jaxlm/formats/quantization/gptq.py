"""GPTQ's layout (AutoGPTQ, GPTQModel): codes are packed along the inputs, and each input names its group.

`qweight` int32 [in·bits/32, out], `qzeros` int32 [groups, out·bits/32], `scales` [groups, out], `g_idx` [in]. The first
version stores zero points less one, `gptq_v2` as they are.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.formats.quantization.coded import Coded, Planned, Tensors
from jaxlm.formats.quantization.files import (
    FLOAT,
    Module,
    Raw,
    Slices,
    Stored,
    groups_of,
    matches,
    modules,
    pack,
    packed_size,
    unpack,
)
from jaxlm.formats.safetensors import Files

LAYOUTS = {"gptq": 1, "gptq_v2": 2}
BITS = (2, 3, 4, 8)


class Settings(NamedTuple):
    """How one module is quantized."""

    bits: int
    group: int
    """How many inputs share a scale; -1: all."""
    version: int


def settings(q: Mapping[str, Any]) -> Settings:
    """Reads the settings that hold for every module. ValueError: a layout that isn't read."""
    layout = q.get("checkpoint_format") or q.get("format") or "gptq"
    if q.get("is_marlin_format"):
        layout = "marlin"
    if layout not in LAYOUTS:
        raise ValueError(
            f"config.json: quantization_config: GPTQ's layout {layout!r} is not read, only {' and '.join(LAYOUTS)}; "
            "bring the unquantised weights"
        )
    if q.get("rotation"):
        raise ValueError(
            f"config.json: quantization_config: rotation {q['rotation']!r} changes the model itself, which is not "
            "done here; bring the unquantised weights"
        )
    found = Settings(q.get("bits") or 4, q.get("group_size") or 128, LAYOUTS[layout])
    _check(found)
    return found


def _check(s: Settings) -> None:
    if s.bits not in BITS:
        raise ValueError(
            f"config.json: quantization_config: bits is {s.bits!r}; GPTQ is read with {', '.join(map(str, BITS))}"
        )


def _of_module(q: Mapping[str, Any], s: Settings, name: str) -> Settings:
    """Returns the settings of a module: those that `dynamic` names for it, else everyone's."""
    each = q.get("dynamic") or {}
    for pattern in each:
        if not pattern.startswith("-:") and matches(pattern.removeprefix("+:"), name):
            own = each[pattern] or {}
            s = s._replace(bits=own.get("bits") or s.bits, group=own.get("group_size") or s.group)
            _check(s)
            break
    return s


def find(q: Mapping[str, Any], files: Files) -> dict[str, Stored]:
    """Returns how each quantized matrix of a directory stands in it, by the name of the dense weight."""
    everywhere = settings(q)
    return {
        f"{name}.weight": _stored(Module(files, name), _of_module(q, everywhere, name))
        for name in modules(files, "qweight")
    }


def _stored(m: Module, s: Settings) -> Stored:
    packed = m.expect("qweight", [None, None], "i")
    width = 8 * packed.dtype.itemsize
    rows, outs = packed.shape
    ins = m.expect("g_idx", [None], "i").shape[0] if m.has("g_idx") else rows * width // s.bits
    m.expect("qweight", [packed_size(ins, s.bits, width), outs], "i")
    group = ins if s.group == -1 else s.group
    groups = -(-ins // group)
    m.expect("scales", [groups, outs], "f")
    m.expect("qzeros", [groups, packed_size(outs, s.bits, width)], "i")
    ordered, name = m.has("g_idx"), m.name

    def numbers(raw: Raw, box: Slices) -> np.ndarray:
        r, c = box
        g: Any = raw.whole(f"{name}.g_idx")[c] if ordered else groups_of(c, group)
        if g.size and not (g.min() >= 0 and g.max() < groups):
            file = m.entry("g_idx").file
            raise ValueError(f"{file}: {name}.g_idx names a group beyond the {groups} there are; fetch the files again")
        words = raw.whole(f"{name}.qweight")[:, r]
        if width % s.bits == 0:  # only the words that are asked for
            each = width // s.bits
            first = c.start // each
            words = words[first : -(-c.stop // each)]
            codes = unpack(words, s.bits, c.stop - first * each, 0)[c.start - first * each :]
        else:
            codes = unpack(words, s.bits, ins, 0)[c]
        zeros = _zeros(raw.whole(f"{name}.qzeros"), s, outs)[:, r]
        return dequantized(codes, zeros, raw.whole(f"{name}.scales")[:, r], g)

    return Stored((outs, ins), m.used_names(), numbers)


def dequantized(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Returns numbers [out, in] of codes [in, out], by zero points and scales [groups, out] of each input's group."""
    out = np.ascontiguousarray(codes.T).astype(FLOAT)  # turned while they are bytes
    out -= zeros.T.astype(FLOAT)[:, group]
    out *= scales.T.astype(FLOAT)[:, group]
    return out


def _zeros(packed: np.ndarray, s: Settings, outs: int) -> np.ndarray:
    """Returns the zero points [groups, out]. In the first version one is added to whole words, whose carries undo the
    borrows of a zero point 0."""
    width = 8 * packed.itemsize
    if s.version == 1 and width % s.bits == 0:
        ones = sum(1 << i for i in range(0, width, s.bits))
        packed = packed.view(f"u{packed.itemsize}") + np.array(ones, f"u{packed.itemsize}")
    zeros = unpack(packed, s.bits, outs, 1)
    if s.version == 1 and width % s.bits:
        zeros = (zeros + 1) & ((1 << s.bits) - 1)
    return zeros


# ------------------------------------------------------------------------------------------------------------- writing


def tensors(c: Coded) -> Tensors:
    """Returns the tensors of a matrix. ValueError: its format isn't GPTQ's, or its dimensions don't fill words."""
    bits, middle = _written(c)
    each = 32 // bits
    if c.ins % each or c.outs % each:
        raise ValueError(
            f"{c.name}: has {c.outs} outputs and {c.ins} inputs, and GPTQ needs multiples of {each}; export as "
            "compressed-tensors"
        )
    # The first version, which every reader knows, can't say that a zero point is 0.
    less = 0 if c.form.zero_points else 1

    def codes() -> np.ndarray:
        return pack(c.codes().astype(np.int16).T + (middle if bits == 8 else 0), bits, 0)

    def zeros() -> np.ndarray:
        found = c.zeros() if bits == 4 else np.full((c.outs, c.groups), middle)
        return pack(found.T - np.int16(less), bits, 1)

    int32, group = np.dtype(np.int32), c.form.group or c.ins
    return {
        "qweight": Planned(int32, (c.ins // each, c.outs), codes),
        "qzeros": Planned(int32, (c.groups, c.outs // each), zeros),
        "scales": Planned(np.dtype(np.float16), (c.groups, c.outs), lambda: half(c).T),
        "g_idx": Planned(int32, (c.ins,), lambda: (np.arange(c.ins) // group).astype(np.int32)),
    }


def _written(c: Coded) -> tuple[int, int]:
    if c.form.kind not in ("int4", "int8"):
        raise ValueError(f"{c.name}: is {c.form.kind}, and GPTQ has int4 and int8; export as compressed-tensors")
    return (4, 8) if c.form.kind == "int4" else (8, 128)


def half(c: Coded) -> np.ndarray:
    """Returns the scales [out, groups] as float16. ValueError: one is beyond its range."""
    scales = c.scales().astype(np.float32)
    with np.errstate(over="ignore"):
        rounded = scales.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise ValueError(f"{c.name}: has scales beyond the range of float16; export as compressed-tensors")
    return rounded


def written(few: Mapping[str, Coded], plain: Sequence[str]) -> dict[str, Any]:
    """Returns the quantization_config of these matrices, in a model that has also the modules `plain`."""
    forms = [c.form for c in few.values()]
    common = max(dict.fromkeys(forms), key=forms.count)
    versions = {c.form.zero_points for c in few.values()}
    if len(versions) > 1:
        raise ValueError(
            "format gptq: some matrices have zero points and some don't, which its files can't say; export as "
            "compressed-tensors"
        )
    dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in plain if "." in name}
    for c in few.values():
        if c.form != common:
            dynamic[f"+:^{re.escape(c.module)}$"] = dict(bits=_written(c)[0], group_size=c.form.group or -1)
    layout = "gptq_v2" if versions == {True} else "gptq"
    return dict(
        quant_method="gptq", bits=_written(next(c for c in few.values() if c.form == common))[0],
        group_size=common.group or -1, sym=not common.zero_points, desc_act=False, lm_head=False,
        checkpoint_format=layout, format=layout, pack_dtype="int32", true_sequential=True,
        **(dict(dynamic=dynamic) if dynamic else {}),
    )  # fmt: skip
