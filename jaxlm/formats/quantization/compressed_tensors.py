"""The layouts of compressed-tensors (llm-compressor, vLLM): what a matrix is stored as is seen from its tensors.

pack-quantized: `weight_packed` int32 [out, in·bits/32], codes plus 2^(bits−1); `weight_scale` [out, groups],
`weight_shape` [2], `weight_zero_point` int32 packed along the outputs, `weight_g_idx` [in]. int-, float- and
naive-quantized: `weight` of int8 or fp8. nvfp4- and mxfp4-pack-quantized: `weight_packed` uint8 [out, in/2].
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm.formats.quantization.coded import Coded, Form, Planned, Tensors
from jaxlm.formats.quantization.files import (
    FLOAT,
    Module,
    Raw,
    Slices,
    Stored,
    matches,
    modules,
    pack,
    packed_size,
    unpack,
)
from jaxlm.formats.quantization.fp8 import block_of
from jaxlm.formats.quantization.mxfp4 import low_first, powers
from jaxlm.formats.quantization.scaled import scaled
from jaxlm.formats.safetensors import Files

PACKED = "pack-quantized"
LAYOUTS = (
    PACKED, "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense",
)  # fmt: skip
NUMBERS_OF = tuple(f"{of}_{what}" for of in ("input", "output") for what in ("scale", "zero_point", "global_scale"))
"""What says how inputs and outputs are rounded, which they aren't here."""
WORD = 32


def find(q: Mapping[str, Any], files: Files) -> dict[str, Stored]:
    """Returns how each quantized matrix of a directory stands in it, by the name of the dense weight. ValueError: a
    layout that isn't read."""
    for layout in {q.get("format"), *(group.get("format") for group in _groups(q))} - {None}:
        if layout not in LAYOUTS:
            raise ValueError(
                f"config.json: quantization_config: the format {layout!r} of compressed-tensors is not read, only "
                f"{', '.join(LAYOUTS)}; bring the unquantised weights"
            )
    for key in ("sparsity_config", "transform_config"):
        other = q.get(key) or {}
        if other.get("config_groups") or other.get("format", "dense") != "dense":
            raise ValueError(
                f"config.json: quantization_config: {key} ({other.get('format', 'online transforms')}) is not read; "
                "bring weights without it"
            )
    found = {}
    for name in modules(files, "weight_packed"):
        m = Module(files, name)
        read = _packed_floats if m.entry("weight_packed").dtype == np.uint8 else _packed
        found[f"{name}.weight"] = read(m, scheme(q, name))
    for name in modules(files, "weight_scale"):
        if f"{name}.weight" not in found:
            found[f"{name}.weight"] = _plain(Module(files, name), scheme(q, name), q.get("quantization_status"))
    return {
        dense: stored._replace(unread=Module(files, dense.removesuffix(".weight")).unread(*NUMBERS_OF))
        for dense, stored in found.items()
    }


def _groups(q: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the groups of a config.json; of a preset it has the name and the targets alone, and no settings."""
    groups = q.get("config_groups") or {}
    return [groups[name] for name in groups if isinstance(groups[name], Mapping)]


def scheme(q: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns what config.json says of a module's weights: a target that is its name comes before a pattern, and that
    before a class. Empty: it says nothing."""
    found: list[tuple[int, Mapping[str, Any]]] = []
    for group in _groups(q):
        for target in group.get("targets") or ():
            if target == name:
                rank = 0
            elif target.startswith("re:"):
                if not matches(target.removeprefix("re:"), name):
                    continue
                rank = 1
            elif "." in target:  # another module
                continue
            else:
                rank = 2
            found.append((rank, group.get("weights") or {}))
    return min(found, key=lambda item: item[0])[1] if found else {}


def _plain(m: Module, s: Mapping[str, Any], status: str | None) -> Stored:
    """Describes int8 or fp8 numbers with scales."""
    entry = m.entry("weight")
    if entry.dtype.kind == "f" or str(entry.dtype) == "bfloat16":
        raise ValueError(
            f"{entry.file}: {m.name}.weight is {entry.dtype} beside a weight_scale, so it is still to be rounded "
            f"(quantization_status {status!r}); save the model compressed"
        )
    zero = "weight_zero_point" if m.has("weight_zero_point") else ""
    order = "weight_g_idx" if m.has("weight_g_idx") else ""
    block = block_of(s.get("block_structure"), "block_structure")
    return scaled(m, "weight", "weight_scale", block, zero, order)


def _packed_floats(m: Module, s: Mapping[str, Any]) -> Stored:
    """Describes NVFP4, which has a scale of all beside those of groups, and MXFP4, whose scales are powers of two."""
    outs, half = m.expect("weight_packed", [None, None], "u").shape
    ins, kind = 2 * half, m.entry("weight_scale").dtype
    groups = m.expect("weight_scale", [outs, None], "f8eu").shape[1]
    if not groups or ins % groups:
        m.expect("weight_scale", [outs, -(-ins // (s.get("group_size") or 16))], "f8eu")
    size, whole = ins // groups, m.has("weight_global_scale")
    if whole:
        m.expect("weight_global_scale", m.entry("weight_global_scale").shape, "f")
    name = m.name

    def numbers(raw: Raw, box: Slices) -> np.ndarray:
        r, c = box
        first = c.start // 2
        packed = raw.part(f"{name}.weight_packed", r, slice(first, -(-c.stop // 2)))
        scale = raw.part(f"{name}.weight_scale", r)
        scale = powers(scale) if kind == np.uint8 else scale.astype(FLOAT)
        if whole:
            scale = scale / raw.whole(f"{name}.weight_global_scale").astype(FLOAT).reshape(())
        codes = low_first(packed)[:, c.start - 2 * first : c.stop - 2 * first]
        return codes * scale[:, np.arange(c.start, c.stop) // size]

    return Stored((outs, ins), m.used_names(), numbers)


def _packed(m: Module, s: Mapping[str, Any]) -> Stored:
    """Describes whole numbers of 1 to 8 bits in words."""
    outs, words = m.expect("weight_packed", [None, None], "i").shape
    m.expect("weight_shape", [2], "i")
    shape = tuple(int(n) for n in m.files.read(f"{m.name}.weight_shape"))
    ins = shape[1]
    bits, dense = _bits(m, words, ins, s)
    if shape[0] != outs:
        raise ValueError(
            f"{m.entry('weight_packed').file}: {m.name}.weight_shape is {list(shape)}, but weight_packed has {outs} "
            "outputs; fetch the files again"
        )
    scales = m.expect("weight_scale", m.entry("weight_scale").shape, "f").shape
    groups = scales[-1] if len(scales) == 2 else 1
    if scales not in ((1,), (), (1, groups), (outs, groups), (outs,)) or groups < 1:
        m.expect("weight_scale", [outs, None], "f")
    size = s.get("group_size") or -1
    size = size if size > 0 and -(-ins // size) == groups else -(-ins // groups)
    ordered = m.has("weight_g_idx")
    if ordered:
        m.expect("weight_g_idx", [ins], "i")
    zeros = _zero_points(m, bits, outs, groups, scales)
    name, middle = m.name, 1 << bits - 1

    def grouped(x: np.ndarray, r: slice, group: np.ndarray) -> np.ndarray:
        """Returns a number for each of a box of numbers of all outputs, or of one, and of groups."""
        x = x.astype(FLOAT)
        if x.size == 1:
            return x.reshape(())
        x = x.reshape(-1, groups)
        return (x[r] if len(x) > 1 else x)[:, group]

    def numbers(raw: Raw, box: Slices) -> np.ndarray:
        r, c = box
        group = raw.whole(f"{name}.weight_g_idx")[c] if ordered else np.arange(c.start, c.stop) // size
        codes = _codes(raw.part(f"{name}.weight_packed", r), bits, ins, dense)[:, c].astype(FLOAT) - middle
        if zeros is not None:
            codes -= grouped(zeros(raw), r, group)
        return codes * grouped(raw.whole(f"{name}.weight_scale"), r, group)

    return Stored((outs, ins), m.used_names(), numbers)


def _bits(m: Module, words: int, ins: int, s: Mapping[str, Any]) -> tuple[int, bool]:
    """Returns how many bits a code has, and whether codes lie across words: early files leave the last bits of a word
    unused where 32 is no multiple of a code's bits."""
    fits = {bits: True for bits in range(1, 9) if packed_size(ins, bits) == words}
    fits = {bits: False for bits in (3, 5, 6, 7) if -(-ins // (WORD // bits)) == words and bits not in fits} | fits
    said = s.get("num_bits")
    if said in fits:
        return said, fits[said]
    if said is None and len(fits) == 1:
        return next(iter(fits.items()))
    raise ValueError(
        f"{m.entry('weight_packed').file}: {m.name}.weight_packed has {words} words for {ins} inputs, which don't hold "
        f"{'as many' if said is None else said} bits each as quantization_config says; check that config.json belongs "
        "to these weights"
    )


def _codes(packed: np.ndarray, bits: int, ins: int, dense: bool) -> np.ndarray:
    if dense or WORD % bits == 0:
        return unpack(packed, bits, ins, 1)
    each = WORD // bits
    shifts = (np.arange(each) * bits).astype(np.uint32)
    codes = (np.ascontiguousarray(packed).view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.reshape(len(packed), -1)[:, :ins].astype(np.uint8)


def _zero_points(m: Module, bits: int, outs: int, groups: int, scales: tuple[int, ...]) -> Any:
    """Returns what reads the zero points as signed numbers of the scales' shape; None: there are none."""
    if not m.has("weight_zero_point"):
        return None
    full, shape = f"{m.name}.weight_zero_point", m.entry("weight_zero_point").shape
    if m.entry("weight_zero_point").dtype != np.int32 or shape == scales:
        m.expect("weight_zero_point", scales, "i")
        return lambda raw: raw.whole(full)
    rows = packed_size(outs, bits)
    dense = shape[0] == rows
    m.expect("weight_zero_point", [rows if dense else -(-outs // (WORD // bits)), groups], "i")
    return lambda raw: _codes(raw.whole(full).T, bits, outs, dense).T.astype(np.int16) - (1 << bits - 1)


# ------------------------------------------------------------------------------------------------------------- writing


def tensors(c: Coded) -> Tensors:
    """Returns the tensors of a matrix: whole numbers pack-quantized, or int-quantized where inputs are rounded
    too, fp8 naive- or float-quantized, and MXFP4."""
    kind, scales = c.form.kind, c.scales
    if c.is_conv1d:
        raise ValueError(f"{c.name}: is a Conv1D, and compressed-tensors quantizes linear layers; export as gptq")
    if kind == "mxfp4":
        if c.ins % c.form.group:
            raise ValueError(f"{c.name}: has {c.ins} inputs, no multiple of MXFP4's {c.form.group}; export as hf")

        def pairs() -> np.ndarray:
            codes = c.codes()
            return codes[:, 0::2] | codes[:, 1::2] << 4

        byte = np.dtype(np.uint8)
        return {
            "weight_packed": Planned(byte, (c.outs, c.ins // 2), pairs),
            "weight_scale": Planned(byte, (c.outs, c.groups), scales),
        }
    scale_kind = np.dtype(ml_dtypes.bfloat16) if kind == "int4" else FLOAT
    if kind == "fp8":
        rows = -(-c.outs // c.form.block) if c.form.block else c.outs
        return {
            "weight": Planned(np.dtype(ml_dtypes.float8_e4m3fn), (c.outs, c.ins), c.codes),
            "weight_scale": Planned(scale_kind, (rows, c.groups), scales),
        }
    if c.form.dynamic:
        return {
            "weight": Planned(np.dtype(np.int8), (c.outs, c.ins), c.codes),
            "weight_scale": Planned(scale_kind, (c.outs, c.groups), scales),
        }
    bits = 4 if kind == "int4" else 8
    if c.form.group and c.ins % c.form.group:
        raise ValueError(
            f"{c.name}: has {c.ins} inputs, no multiple of the group {c.form.group}, which readers of "
            "compressed-tensors need; compress with groups that divide it, or export as hf"
        )

    def packed() -> np.ndarray:
        return pack(c.codes().astype(np.int16) + (0 if bits == 4 else 128), bits, 1)

    words, int32 = packed_size(c.ins, bits), np.dtype(np.int32)
    shape = np.array([c.outs, c.ins], np.int64)
    out = {
        "weight_packed": Planned(int32, (c.outs, words), packed),
        "weight_scale": Planned(scale_kind, (c.outs, c.groups), scales),
        "weight_shape": Planned(shape.dtype, (2,), lambda: shape),
    }
    if c.form.zero_points:
        rows = packed_size(c.outs, bits)
        out["weight_zero_point"] = Planned(int32, (rows, c.groups), lambda: pack(c.zeros(), bits, 0))
    return out


FORMATS = {"int4": PACKED, "int8": PACKED, "fp8": "naive-quantized", "mxfp4": "mxfp4-pack-quantized"}
OF_DYNAMIC = {"int8": "int-quantized", "fp8": "float-quantized"}


def _format(form: Form) -> str:
    return (OF_DYNAMIC if form.dynamic else FORMATS)[form.kind]


def written(few: Mapping[str, Coded], plain: Sequence[str]) -> dict[str, Any]:
    """Returns the quantization_config of these matrices, in a model that has also the modules `plain`: of a group for
    each form, of which the last and commonest means all that aren't named before."""
    forms = [c.form for c in few.values()]
    order = sorted(dict.fromkeys(forms), key=forms.count)
    groups: dict[str, Any] = {}
    for i, form in enumerate(order):
        targets = ["Linear"] if form == order[-1] else [c.module for c in few.values() if c.form == form]
        groups[f"group_{i}"] = dict(
            targets=targets, weights=_arguments(form), input_activations=_inputs(form), output_activations=None,
            format=_format(form),
        )  # fmt: skip
    layouts = {_format(form) for form in order}
    return dict(
        quant_method="compressed-tensors", format=layouts.pop() if len(layouts) == 1 else "mixed-precision",
        quantization_status="compressed", config_groups=groups, ignore=list(plain), kv_cache_scheme=None,
        global_compression_ratio=None,
    )  # fmt: skip


def _arguments(form: Form) -> dict[str, Any]:
    strategy = "block" if form.block else "group" if form.group else "channel"
    return dict(
        num_bits=8 if form.kind in ("int8", "fp8") else 4, type="float" if form.kind in ("fp8", "mxfp4") else "int",
        symmetric=not form.zero_points, strategy=strategy, group_size=form.group or None,
        block_structure=[form.block, form.block] if form.block else None, dynamic=False, actorder=None,
        observer="minmax", observer_kwargs={},
    )  # fmt: skip


def _inputs(form: Form) -> dict[str, Any] | None:
    """Returns how inputs are rounded: each token's by its own scale, which is found when it is read; None: they are
    not."""
    if not form.dynamic:
        return None
    own = dict(strategy="token", dynamic=True, symmetric=True, group_size=None, block_structure=None)
    return _arguments(form) | own | dict(observer=None)
