"""Says which kind of numbers each tensor has in llama.cpp's types of files, such as Q4_K_M: most matrices the kind that
the type is named after, some that matter more another one. The choices are those of its llama-quant.cpp."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from jaxlm.core.errors import nearest
from jaxlm.formats.gguf_quants import KINDS

FILE_TYPES = {
    "f16": ("F16", "MOSTLY_F16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q6_k": ("Q6_K", "MOSTLY_Q6_K"),
    "q5_k_m": ("Q5_K", "MOSTLY_Q5_K_M"),
    "q5_k_s": ("Q5_K", "MOSTLY_Q5_K_S"),
    "q5_1": ("Q5_1", "MOSTLY_Q5_1"),
    "q5_0": ("Q5_0", "MOSTLY_Q5_0"),
    "q4_k_m": ("Q4_K", "MOSTLY_Q4_K_M"),
    "q4_k_s": ("Q4_K", "MOSTLY_Q4_K_S"),
    "q4_1": ("Q4_1", "MOSTLY_Q4_1"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
"""The kind of most matrices, and what the file's metadata call it (`gguf.LlamaFileType`)."""
QUANTIZED = tuple(name for name in FILE_TYPES if name != "f16")
INSTEAD = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # of rows that 256 doesn't divide
IN_F32 = ("position_embd", "ffn_gate_inp")  # matrices that llama.cpp wants in float32


class Model(NamedTuple):
    """A Model says of a model what the choice depends on."""

    architecture: str
    layers: int
    experts: int
    """0: a dense model."""
    tied: bool
    """The table of embeddings is the head, too."""
    grouped: bool
    """Several heads share keys and values."""


class Choice(NamedTuple):
    """A Choice says which kind of numbers a tensor has."""

    kind: str
    wanted: str
    """The kind that it would have if its rows had the right length."""


def check(file_type: str) -> None:
    """Raises ValueError for a type of file that isn't written."""
    if file_type not in FILE_TYPES:
        raise ValueError(f"quantize: unknown {file_type!r}{nearest(file_type, FILE_TYPES)}")


def check_quantized(file_type: str) -> None:
    """Raises ValueError for what is no type of file of few bits."""
    if file_type not in QUANTIZED:
        raise ValueError(f"quantize: unknown {file_type!r}{nearest(file_type, QUANTIZED)}")


def choose(file_type: str, name: str, shape: tuple[int, ...], m: Model, weighted: bool) -> Choice:
    """Returns the kind of numbers of the tensor `name` of a shape, outermost first. `weighted`: there is importance."""
    stem = name.removesuffix(".weight")
    if len(shape) == 1 or stem.endswith(("_norm", *IN_F32)) or stem == name:
        return Choice("F32", "F32")
    if file_type == "f16":
        return Choice("F16", "F16")
    wanted = _wanted(file_type, stem, shape[-1], m, weighted)
    if shape[-1] % KINDS[wanted].size == 0:
        return Choice(wanted, wanted)
    other = INSTEAD.get(wanted, wanted)
    return Choice(other if shape[-1] % KINDS[other].size == 0 else "F16", wanted)


def _wanted(file_type: str, stem: str, columns: int, m: Model, weighted: bool) -> str:
    """Returns the kind of a matrix before its rows are looked at; `stem` is its name without `.weight`."""
    kind = FILE_TYPES[file_type][0]
    if stem == "output" or (m.tied and stem == "token_embd"):
        return "Q8_0" if kind == "Q8_0" or columns % KINDS[kind].size else "Q6_K"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if found is None:
        return kind
    layer, what = int(found[1]), found[2]
    eighth = layer < m.layers // 8
    more = eighth or layer >= 7 * m.layers // 8 or (layer - m.layers // 8) % 3 == 2
    if what in ("attn_v", "attn_qkv"):
        if m.experts == 8:
            return "Q8_0"
        if file_type in ("q4_k_m", "q5_k_m") and more:
            return "Q6_K"
        wide = m.architecture == "llama" and m.layers == 80 and m.grouped  # Llama 70B: values are few
        return "Q5_K" if (file_type == "q4_k_s" and layer < 4) or (wide and kind == "Q4_K") else kind
    if what == "attn_k" and m.experts == 8:
        return "Q8_0"
    if what == "attn_output" and m.experts == 8 and kind == "Q4_K":
        return "Q5_K"
    if what in ("ffn_down", "ffn_down_exps"):
        if file_type in ("q4_k_m", "q5_k_m") and more:
            return "Q6_K"
        if file_type == "q4_k_s" and eighth:
            return "Q5_K"
        if weighted and eighth:
            return {"q4_0": "Q4_1", "q5_0": "Q5_1"}.get(file_type, kind)
    return kind


def described(file_type: str, chosen: Mapping[str, tuple[Choice, tuple[int, ...]]]) -> list[str]:
    """Returns lines on how many tensors have which kind, and on those that have another because of their rows, for
    (choice, shape) by the names of tensors."""
    count = Counter(choice.kind for choice, _ in chosen.values())
    lines = [f"{file_type}: " + ", ".join(f"{n} tensors in {kind}" for kind, n in count.most_common())]
    others: dict[tuple[str, str, int], list[str]] = {}
    for name, (choice, shape) in chosen.items():
        if choice.kind != choice.wanted:
            others.setdefault((choice.kind, choice.wanted, shape[-1]), []).append(name)
    for (kind, wanted, columns), names in others.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"note: rows of {columns} don't fit {wanted}: {names[0]}{more} got {kind}, as llama.cpp does it")
    return lines
