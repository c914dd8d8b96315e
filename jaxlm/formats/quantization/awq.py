"""AWQ (llm-awq, AutoAWQ) stores four-bit codes with a zero point for each group of inputs, in several layouts.

`gemm`: `qweight` int32 [in, out/8], `qzeros` int32 [groups, out/8], `scales` [groups, out]; a word's nibbles, the
lowest first, are the outputs 0, 2, 4, 6, 1, 3, 5, 7. `gemv`: packed along the inputs, in order: `qweight` [out, in/8],
`qzeros` [out, …], `scales` [out, …], of which the last are filled up. `gemv_fast`: int16 words of four outputs each,
and in place of zero points the numbers that are added.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.formats.quantization.coded import Coded, Planned, Tensors
from jaxlm.formats.quantization.files import FLOAT, Module, Raw, Slices, Stored, groups_of, modules, pack, unpack
from jaxlm.formats.quantization.gptq import dequantized, half
from jaxlm.formats.safetensors import Files

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each nibble of a word stands for."""
BLOCK = 64  # inputs that `gemv_fast` interleaves


def find(q: Mapping[str, Any], files: Files) -> dict[str, Stored]:
    """Returns how each quantized matrix of a directory stands in it, by the name of the dense weight. ValueError: a
    layout that isn't read."""
    bits = q.get("bits") or q.get("w_bit") or BITS
    if bits != BITS:
        raise ValueError(f"config.json: quantization_config: bits is {bits!r}; AWQ is read with {BITS}")
    layout = str(q.get("version") or q.get("format") or "gemm").lower()
    if q.get("backend") == "llm-awq":
        layout = "gemv_fast"
    if layout not in LAYOUTS:
        raise ValueError(
            f"config.json: quantization_config: AWQ's layout {layout!r} is not read, only {', '.join(LAYOUTS)}; bring "
            "the unquantised weights"
        )
    group = q.get("group_size") or q.get("q_group_size") or 128
    return {f"{name}.weight": LAYOUTS[layout](Module(files, name), group) for name in modules(files, "qweight")}


def nibbles(words: np.ndarray) -> np.ndarray:
    """Returns the codes [n, out] of `gemm`'s words [n, out/8]."""
    codes = unpack(words, BITS, words.shape[1] * 8, 1).reshape(len(words), -1, 8)
    return codes[..., np.argsort(ORDER)].reshape(len(words), -1)


def _group(m: Module, last: str, ins: int, group: int) -> int:
    """Returns how many inputs share a scale. ValueError: the inputs aren't cut into such groups."""
    group = ins if group == -1 else group
    if ins % group:
        file = m.entry(last).file
        raise ValueError(
            f"{file}: {m.name}.{last} has {ins} inputs, not a multiple of the group_size {group} of "
            "quantization_config; check that config.json belongs to these weights"
        )
    return group


def _gemm(m: Module, group: int) -> Stored:
    ins, words = m.expect("qweight", [None, None], "i").shape
    outs, size = words * 8, _group(m, "qweight", ins, group)
    m.expect("scales", [ins // size, outs], "f")
    m.expect("qzeros", [ins // size, words], "i")
    name = m.name

    def numbers(raw: Raw, box: Slices) -> np.ndarray:
        r, c = box
        g, first = groups_of(c, size), r.start // 8
        word, at = slice(first, -(-r.stop // 8)), slice(r.start - first * 8, r.stop - first * 8)
        codes = nibbles(raw.whole(f"{name}.qweight")[c, word])[:, at]
        zeros = nibbles(raw.whole(f"{name}.qzeros")[:, word])[:, at]
        return dequantized(codes, zeros, raw.whole(f"{name}.scales")[:, r], g)

    return Stored((outs, ins), m.used_names(), numbers)


def _gemv(m: Module, group: int) -> Stored:
    outs, words = m.expect("qweight", [None, None], "i").shape
    ins = words * 8
    size = _group(m, "qweight", ins, group)
    least = -(-ins // size // 8)
    filled = max(least, m.expect("qzeros", [outs, None], "i").shape[1])
    m.expect("qzeros", [outs, filled], "i")
    m.expect("scales", [outs, filled * 8], "f")
    name = m.name

    def numbers(raw: Raw, box: Slices) -> np.ndarray:
        r, c = box
        g, first = groups_of(c, size), c.start // 8
        packed = raw.part(f"{name}.qweight", r, slice(first, -(-c.stop // 8)))
        codes = unpack(packed, BITS, c.stop - first * 8, 1)[:, c.start - first * 8 :].astype(FLOAT)
        zeros = unpack(raw.part(f"{name}.qzeros", r), BITS, filled * 8, 1).astype(FLOAT)
        return (codes - zeros[:, g]) * raw.part(f"{name}.scales", r).astype(FLOAT)[:, g]

    return Stored((outs, ins), m.used_names(), numbers)


def _gemv_fast(m: Module, group: int) -> Stored:
    rows, ins = m.expect("qweight", [None, None], "i").shape
    outs = rows * 4
    size = _group(m, "qweight", ins, group)
    filled = max(ins // size, m.expect("scales", [None, outs], "f").shape[0])
    m.expect("scales", [filled, outs], "f")
    m.expect("qzeros", [filled, outs], "f")
    if ins % BLOCK or m.entry("qweight").dtype.itemsize != 2:
        raise ValueError(
            f"{m.entry('qweight').file}: {m.name}.qweight is {m.entry('qweight').dtype} [{rows}, {ins}], not int16 of "
            f"a multiple of {BLOCK} inputs as AWQ's gemv_fast has it; check that config.json belongs to these weights"
        )
    name = m.name

    def numbers(raw: Raw, box: Slices) -> np.ndarray:
        r, c = box
        first, last = r.start // 4, -(-r.stop // 4)
        codes = _straightened(raw.part(f"{name}.qweight", slice(first, last)))[r.start - first * 4 : r.stop - first * 4]
        g = groups_of(c, size)
        scales, added = (raw.whole(f"{name}.{last}")[:, r].astype(FLOAT)[g].T for last in ("scales", "qzeros"))
        return codes[:, c].astype(FLOAT) * scales + added

    return Stored((outs, ins), m.used_names(), numbers)


def _straightened(words: np.ndarray) -> np.ndarray:
    """Returns the codes [out, in] of `gemv_fast`'s words [out/4, in].

    A stretch of 64 words is 64 inputs of four outputs, in which a word has one output's nibbles of four inputs. Inputs
    lie in runs of 32, in which pairs of neighbours of its four quarters follow each other, and in eights as in `gemm`.
    """
    rows, ins = words.shape
    codes = unpack(words.reshape(rows, ins // BLOCK, BLOCK, 1), BITS, 4, 3)  # [out/4, in/64, (4 outputs × 16), 4]
    codes = codes.reshape(rows, ins // BLOCK, 4, BLOCK).swapaxes(1, 2).reshape(rows * 4, ins)
    eights = codes.reshape(rows * 4, ins // 32, 4, 2, 4).swapaxes(3, 4)  # back from 0, 2, 4, 6, 1, 3, 5, 7
    return eights.reshape(rows * 4, ins // 32, 4, 4, 2).swapaxes(2, 3).reshape(rows * 4, ins)


LAYOUTS: dict[str, Callable[[Module, int], Stored]] = {
    "gemm": _gemm,
    "gemv": _gemv,
    "gemv_fast": _gemv_fast,
}


# ------------------------------------------------------------------------------------------------------------- writing


def tensors(c: Coded) -> Tensors:
    """Returns the tensors of a matrix in the layout `gemm`. ValueError: its format isn't AWQ's, or its dimensions don't
    fill whole words and groups."""
    if c.form.kind != "int4":
        raise ValueError(f"{c.name}: is {c.form.kind}, and AWQ's files hold int4; export as compressed-tensors")
    group = c.form.group or c.ins
    if c.outs % 8 or c.ins % group or c.is_conv1d:
        what = "is a Conv1D" if c.is_conv1d else f"has {c.outs} outputs and {c.ins} inputs"
        raise ValueError(
            f"{c.name}: {what}, and AWQ needs linear layers of multiples of 8 outputs and {group} inputs; "
            "export as gptq"
        )
    int32, words = np.dtype(np.int32), c.outs // 8
    return {
        "qweight": Planned(int32, (c.ins, words), lambda: _words(c.codes().T)),
        "qzeros": Planned(int32, (c.groups, words), lambda: _words(c.zeros().T)),
        "scales": Planned(np.dtype(np.float16), (c.groups, c.outs), lambda: half(c).T),
    }


def _words(codes: np.ndarray) -> np.ndarray:
    """Returns the words [n, out/8] of codes [n, out], in `gemm`'s order."""
    return pack(codes.reshape(len(codes), -1, 8)[..., ORDER].reshape(codes.shape), BITS, 1)


def written(few: Mapping[str, Coded], plain: Sequence[str]) -> dict[str, Any]:
    """Returns the quantization_config of these matrices, in a model that has also the modules `plain`. ValueError: they
    have groups of different sizes."""
    sizes = sorted({c.form.group for c in few.values()})
    if len(sizes) > 1:
        raise ValueError(
            f"format awq: groups have {sizes[0] or 'all'} inputs and {sizes[1]}, which its files can't say; export as "
            "compressed-tensors"
        )
    return dict(
        quant_method="awq", bits=BITS, group_size=sizes[0] or -1, zero_point=True, version="gemm",
        modules_to_not_convert=list(plain),
    )  # fmt: skip
