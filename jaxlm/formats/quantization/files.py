"""Tensors of a few bits are read as the dense weights that they stand for, a part at a time.

A quantized directory keeps a matrix as several tensors (codes, scales, zero points …). `QuantizedFiles` shows each as
one tensor of float32 under the name of the dense weight, so that whoever reads weights needs to know of none of them.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from jaxlm.formats.safetensors import Entry, Files

KEPT = 256 << 20  # bytes of tensors that are kept because pieces of them are read one after the other
FLOAT = np.dtype(np.float32)

Slices = tuple[slice, ...]


class Raw:
    """Reads a directory's own tensors: a part at a time, or whole where the layout forbids parts.

    Whole tensors that were read last are kept.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self._kept: OrderedDict[str, np.ndarray] = OrderedDict()

    def part(self, name: str, *index: slice) -> np.ndarray:
        """Reads a tensor at an index of its first dimensions."""
        shape = self.files.entries[name].shape
        return self.files.read(name, [*index, *(slice(0, size) for size in shape[len(index) :])])

    def whole(self, name: str) -> np.ndarray:
        """Reads a tensor."""
        if name not in self._kept:
            self._kept[name] = self.files.read(name)
            while len(self._kept) > 1 and sum(x.nbytes for x in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(name)
        return self._kept[name]


class Stored(NamedTuple):
    """Says how a quantized matrix stands in files."""

    shape: tuple[int, ...]
    """That of the dense matrix: [out, in] as PyTorch's Linear has it, or [experts, out, in]."""
    tensors: tuple[str, ...]
    """The tensors that it is made of, by name."""
    numbers: Callable[[Raw, Slices], np.ndarray]
    """Returns the float32 numbers at an index into `shape`."""
    unread: tuple[str, ...] = ()
    """Tensors beside it that say how inputs and outputs are rounded, which isn't done here."""
    turned: bool = False
    """The matrix is wanted as [in, out]."""


@dataclass(frozen=True)
class QuantizedFiles(Files):
    """These files have a dense entry for each quantized matrix in place of its tensors."""

    stored: Mapping[str, Stored]
    raw: Raw = field(compare=False)

    def read(self, name: str, index: Sequence[slice] | None = None, shape: tuple[int, ...] | None = None) -> np.ndarray:
        if name not in self.stored:
            return super().read(name, index, shape)
        stored = self.stored[name]
        own = self.entries[name].shape
        shape = own if shape is None else shape
        index = [slice(0, size) for size in shape] if index is None else list(index)
        if len(shape) < len(own):  # one after the other, as they lie in memory
            assert len(shape) == 1, f"{name}: {own} is not {shape}"
            row = math.prod(own[1:])
            first = index[0].start // row
            rows = [slice(first, -(-index[0].stop // row)), *(slice(0, size) for size in own[1:])]
            return self.read(name, rows).reshape(-1)[index[0].start - first * row : index[0].stop - first * row]
        wanted = _indices(own, shape, index)
        box = tuple(slice(int(i[0]), int(i[-1]) + 1) if len(i) else slice(0, 0) for i in wanted)
        numbers = stored.numbers(self.raw, (*box[:-2], box[-1], box[-2]) if stored.turned else box)
        numbers = numbers.swapaxes(-1, -2) if stored.turned else numbers
        for axis, (i, b) in enumerate(zip(wanted, box, strict=True)):
            if len(i) != b.stop - b.start:
                numbers = numbers.take(i - b.start, axis)
        return np.ascontiguousarray(numbers, FLOAT).reshape([s.stop - s.start for s in index])

    def is_zero_bias(self, name: str) -> bool:
        """Returns whether a tensor is the bias of a quantized matrix and all zeros, as AutoGPTQ adds to those without
        one."""
        of = f"{name.removesuffix('.bias')}.weight"
        return name.endswith(".bias") and of in self.stored and not super().read(name).any()

    def turn(self, names: Sequence[str]) -> "QuantizedFiles":
        """Returns the files with these of the quantized matrices as [in, out]."""
        stored, entries = dict(self.stored), dict(self.entries)
        for name in (n for n in names if n in stored):
            stored[name] = stored[name]._replace(turned=True)
            *lead, outs, ins = stored[name].shape
            entries[name] = entries[name]._replace(shape=(*lead, ins, outs))
        return replace(self, stored=stored, entries=entries)


def _indices(own: Sequence[int], shape: Sequence[int], index: Sequence[slice]) -> list[np.ndarray]:
    """Returns which indices of each dimension of `own` an index into a reshape of it asks for. Each dimension is one or
    several whole ones of `shape`."""
    out, at = [], 0
    for position, size in enumerate(own):
        first, made = at, 1
        last = position == len(own) - 1
        while at < len(shape) and (made < size or last):
            made *= shape[at]
            at += 1
        assert made == size, f"{tuple(own)} is not cut along its dimensions by {tuple(shape)}"
        numbers = np.arange(size).reshape(shape[first:at])[tuple(index[first:at])]
        out.append(numbers.reshape(-1))
    return out


def dense(files: Files, found: Mapping[str, Stored]) -> QuantizedFiles:
    """Returns the files with a dense entry for each of these matrices in place of its tensors."""
    gone = {name for stored in found.values() for name in (*stored.tensors, *stored.unread)}
    entries = {name: entry for name, entry in files.entries.items() if name not in gone}
    for name, stored in found.items():
        entries[name] = Entry(files.entries[stored.tensors[0]].file, FLOAT, stored.shape, -1)
    return QuantizedFiles(files.directory, entries, found, Raw(files))


# ------------------------------------------------------------------------------------- what the methods' files share


class Module:
    """A module's tensors in a directory, of which those that it needs are asked for by their last names."""

    def __init__(self, files: Files, name: str) -> None:
        self.files, self.name = files, name
        self._used: list[str] = []

    def has(self, last: str) -> bool:
        """Returns whether there is a tensor of this last name."""
        return f"{self.name}.{last}" in self.files.entries

    def entry(self, last: str) -> Entry:
        """Returns the entry of a tensor, which is used from now on. ValueError: there is none."""
        full = f"{self.name}.{last}"
        if full not in self.files.entries:
            where = self.files.entries[self._used[0]].file if self._used else self.files.directory
            raise ValueError(f"{where}: {self.name} has no {last} beside its {self._others()}; fetch the files again")
        if full not in self._used:
            self._used.append(full)
        return self.files.entries[full]

    def expect(self, last: str, shape: Sequence[int | None], kinds: str) -> Entry:
        """Returns the entry of a tensor. ValueError: it is of another shape (None: any size), or of another kind of
        numbers than these letters of NumPy."""
        entry = self.entry(last)
        fits = len(entry.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, entry.shape, strict=True))
        if not fits or _kind(entry.dtype) not in kinds:
            due = f"[{', '.join('any' if n is None else str(n) for n in shape)}]"
            words = " or ".join(_KINDS[k] for k in kinds)
            raise ValueError(
                f"{entry.file}: {self.name}.{last} is {entry.dtype} {list(entry.shape)}, but {words} {due} are due by "
                "quantization_config; check that config.json belongs to these weights"
            )
        return entry

    def used_names(self) -> tuple[str, ...]:
        """Returns the full names of the tensors that were asked for."""
        return tuple(self._used)

    def unread(self, *lasts: str) -> tuple[str, ...]:
        """Returns the names of those of these tensors that there are."""
        return tuple(f"{self.name}.{last}" for last in lasts if self.has(last))

    def _others(self) -> str:
        known = [name.removeprefix(f"{self.name}.") for name in self._used]
        return " and ".join(known) or "other tensors"


_KINDS = {"i": "integers", "u": "bytes", "f": "floats", "8": "fp8 numbers", "e": "powers of two"}


def _kind(dtype: np.dtype) -> str:
    name = str(dtype)
    if name.startswith("float8_e8m0"):
        return "e"
    if name.startswith("float8"):
        return "8"
    return "f" if name == "bfloat16" else dtype.kind


def modules(files: Files, last: str) -> list[str]:
    """Returns the names of the modules that have a tensor of this last name."""
    end = f".{last}"
    return [name.removesuffix(end) for name in files.entries if name.endswith(end)]


def matches(pattern: str, name: str) -> bool:
    """Returns whether a regular expression of a config.json fits the beginning of a name. ValueError: it is none."""
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"config.json: quantization_config: {pattern!r} is no regular expression ({error})") from None


# --------------------------------------------------------------------------------------------------------------- codes


def unpack(words: np.ndarray, bits: int, count: int, axis: int) -> np.ndarray:
    """Returns the first `count` codes of `bits` bits along an axis of packed integers, the lowest bits first; a code
    may lie across two words."""
    words = np.moveaxis(words, axis, -1)
    width = 8 * words.itemsize
    if width % bits == 0:
        unsigned = np.ascontiguousarray(words).view(f"u{words.itemsize}")
        shifts = np.arange(0, width, bits).astype(unsigned.dtype)
        codes = ((unsigned[..., None] >> shifts) & unsigned.dtype.type((1 << bits) - 1)).astype(np.uint8)
    else:
        each = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
        whole = each.shape[-1] // bits
        each = each[..., : whole * bits].reshape(*each.shape[:-1], whole, bits)
        codes = (each << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
    codes = codes.reshape(*words.shape[:-1], -1)[..., :count]
    return np.moveaxis(codes, -1, axis)


def pack(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Returns int32 words of codes of `bits` bits (a divisor of 32) along an axis, the lowest bits first; the last word
    is filled up with zeros."""
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    each = 32 // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)])
    codes = codes.reshape(*codes.shape[:-1], -1, each) << np.arange(0, 32, bits, dtype=np.uint32)
    words = codes.sum(-1, dtype=np.uint32).view(np.int32)  # their bits are apart
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))


def groups_of(columns: slice, size: int) -> np.ndarray:
    """Returns which group of `size` neighbours each column of a stretch belongs to."""
    return np.arange(columns.start, columns.stop) // size


def packed_size(count: int, bits: int, width: int = 32) -> int:
    """Returns how many words of `width` bits hold codes that lie without gaps."""
    return math.ceil(count * bits / width)
