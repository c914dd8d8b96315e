"""Reads GGUF files (llama.cpp's format) dequantized, the tokenizer included.

The `gguf` library parses and dequantizes; `gguf_names.py` has the names, `gguf_tokenizer.py` the tokenizer,
`gguf_write.py` the way out.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.core import weight_names
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.formats import gguf_names, gguf_tokenizer, huggingface, shards
from jaxlm.formats.gguf_metadata import Metadata
from jaxlm.formats.gguf_names import Place, Values
from jaxlm.nn.family import Family

PLAIN: dict[str, np.dtype] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "F64": np.dtype(np.float64)}
QUANTIZED = (
    *(
        "BF16",
        "Q8_0",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "MXFP4",
        "TQ1_0",
        "TQ2_0",
    ),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
FACTORS = "rope_freqs.weight"  # divisors of the rotation's frequencies, which become part of the configuration


def library() -> Any:
    """Returns the `gguf` package; raises ValueError where it isn't installed."""
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files need the gguf package: pip install 'jaxlm[interop]'") from None
    return gguf


# ------------------------------------------------------------------------------------------------------------- opening


class Entry(NamedTuple):
    """An entry describes a tensor as Hugging Face names and shapes it.

    `dtype` is that of what is read: float32 where the file has quantized numbers. `data` is a view of the mapped file:
    rows of bytes where quantized.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    place: Place
    kind: str
    data: np.ndarray


@dataclass(frozen=True)
class Files:
    """This object reads a GGUF file's tensors by the names and in the shapes they have in Hugging Face's files.

    `values` are the content of a config.json, made from the file's metadata, `fields`.
    """

    path: Path
    entries: Mapping[str, Entry]
    values: Values
    fields: Mapping[str, Any] = field(repr=False)

    def read(self, name: str, index: Sequence[slice] | None = None, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Reads a tensor in its `dtype`, or its part at `index` after a reshape to `shape` if given.

        It needs memory for the rows that hold the part.
        """
        e = self.entries[name]
        shape = e.shape if shape is None else shape
        index = [slice(0, size) for size in shape] if index is None else list(index)
        assert math.prod(shape) == math.prod(e.shape) and len(index) == len(shape), f"{name}: {e.shape} is not {shape}"
        whole = e.place.stem in e.place.architecture.transposed or e.data.ndim < 2
        first, last = (0, len(e.data)) if whole else self._rows(e, index, shape)
        part = e.place.read(_dequantized(e.kind, np.asarray(e.data[first:last])))
        if not whole:  # rows of all but the leading dimension are complete
            inner = math.prod(shape[1:])
            row = math.prod(e.shape[1:])
            skip = index[0].start * inner - first * row
            rows = index[0].stop - index[0].start
            part = part.reshape(-1)[skip : skip + rows * inner].reshape(rows, *shape[1:])
            return part[(slice(None), *index[1:])].astype(e.dtype, copy=False)
        return part.reshape(shape)[tuple(index)].astype(e.dtype, copy=False)

    @staticmethod
    def _rows(e: Entry, index: Sequence[slice], shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns (first, last) of the stored rows that hold the part at `index`, whole heads where rows are paired."""
        inner, row = math.prod(shape[1:]), math.prod(e.shape[1:])
        group = e.place.group
        first = index[0].start * inner // (row * group) * group
        last = -(-index[0].stop * inner // (row * group)) * group
        return first, last


def _dequantized(kind: str, data: np.ndarray) -> np.ndarray:
    """Returns numbers, as float32 where they were quantized."""
    if kind in PLAIN:
        return data
    quants = library().quants
    return quants.dequantize(np.ascontiguousarray(data), library().GGMLQuantizationType[kind])


def open_file(path: str | Path) -> Files:
    """Reads the metadata and the list of tensors; their numbers stay in the file.

    Raises a ValueError that names the file where it is damaged or holds what is not read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        reader = reader_type()(path)
        fields = Metadata({name: stored.contents() for name, stored in reader.fields.items()})
        tensors = {t.name: t for t in reader.tensors}
        shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}
        if fields.get("split.count", 1) > 1:
            raise ValueError("one of several parts; merge them first: llama-gguf-split --merge")
        factors = tensors.get(FACTORS)
        values = gguf_names.config(fields, shapes, None if factors is None else np.asarray(factors.data))
        entries = _entries(tensors, shapes, values)
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        why = str(error) if isinstance(error, ValueError) else f"damaged: {error!r}"
        why = "not a GGUF file; convert the model to one, or give its directory" if "magic" in why else why
        raise ValueError(f"{path}: {why}") from error
    return Files(path, entries, values, fields)


def _entries(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], values: Values) -> dict:
    a = gguf_names.ARCHITECTURES[gguf_names.architecture_of_model_type(values["model_type"])]
    out = {}
    for name, t in tensors.items():
        if name == FACTORS:
            continue
        kind = t.tensor_type.name
        if kind not in PLAIN and kind not in QUANTIZED:
            raise ValueError(
                f"{name} is stored as {kind}, which is not read; known are {', '.join((*PLAIN, *QUANTIZED))}"
            )
        template, shape, dtype = gguf_names.hf_name(a, name), shapes[name], PLAIN.get(kind, np.dtype(np.float32))
        if not template:
            raise ValueError(f"{name} is not a tensor of this architecture as known here")
        per_expert = "{expert}" in template
        for i in range(shape[0]) if per_expert else [0]:
            hf_name = template.format(expert=i)
            place = gguf_names.place_of(a, hf_name, values)
            assert place, hf_name
            part, data = (shape[1:], t.data[i]) if per_expert else (shape, t.data)
            if (place.group > 1 and place.group % 2) or part[0] % place.group:
                raise ValueError(f"{name} has {part[0]} rows, which heads of {place.group} don't share in pairs")
            part = part[::-1] if place.stem in a.transposed and len(part) == 2 else part
            out[hf_name] = Entry(dtype, part, place, kind, data)
    return out


def reader_type() -> type:
    """Returns the library's reader, which takes a short slice for a whole one, made to notice a truncated file."""
    gguf = library()

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined]
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"the file ends at byte {len(self.data):,}, before byte {end:,}; fetch it again")
            return super()._get(offset, dtype, count, override_order)

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            if self.byte_order != "I":
                raise ValueError("numbers of the other byte order are not read")
            for info in fields:
                name, kind = bytes(info.parts[1]).decode(), int(info.parts[4][0])
                if kind not in {int(k) for k in gguf.GGMLQuantizationType}:
                    raise ValueError(
                        f"{name} is stored as type {kind}, which the gguf package doesn't know; update it?"
                    )
            super()._build_tensors(start_offs, fields)

    return Reader


# ------------------------------------------------------------------------------------------------------------- reading


def describe(files: Files, models: Mapping[str, Family]) -> tuple[Family, Any]:
    """Returns the family and its Config."""
    family = huggingface.family_of(files.values, models)
    return family, family.from_hf(files.values)


def load(
    files: Files, family: Family, c: Any, specs: Any, shardings: Any, *, dtype: Any = np.float32,
    transform: Callable[[str, jax.Array], Any] | None = None,
) -> Any:  # fmt: skip
    """Loads the weights, each device's share straight onto it, in pieces: the host holds a few at a time.

    `transform` takes (path, weight) and returns what takes its place before the next one is read. Raises a ValueError
    that names the tensor where one is missing, left over or misshapen.
    """
    table = weight_names.tensors(family.names(c), specs)
    missing, extra = (sorted(a - b) for a, b in itertools.permutations((table.keys(), files.entries.keys())))
    for names, what in ((missing, "is missing"), (extra, "is not this model's")):
        if names:
            raise ValueError(f"{files.path}: {names[0]} {what}" + f" (and {len(names) - 1} more)" * (len(names) > 1))
    sources: dict[str, list[shards.Source]] = {}
    for name, entry in files.entries.items():
        if entry.shape != table[name].shape:
            due = f"{list(entry.shape)}, but the metadata make it {list(table[name].shape)}"
            raise ValueError(f"{files.path}: {entry.place.name} ({name}) is {due}")
        for part, view in zip(table[name].parts, table[name].views, strict=True):
            read = partial(files.read, name, shape=view.shape)
            sources.setdefault(part.path, []).append(shards.Source(part, view, read, entry.dtype))
    return shards.fill(specs, shardings, sources, dtype, transform)


class Text(NamedTuple):
    """A file holds these about text: the tokenizer, whether texts begin with the bos token, the chat template, and the
    tokens that end an answer besides eos."""

    tokenizer: Tokenizer
    add_bos: bool
    chat_template: str | None
    ends: tuple[int, ...] = ()


def text(files: Files) -> Text:
    """Reads the tokenizer and the chat template; raises a ValueError that names the file where it can't."""
    try:
        tokenizer = gguf_tokenizer.read(files.fields)
        template = files.fields.get("tokenizer.chat_template")
        ends = gguf_tokenizer.end_ids(files.fields)
        return Text(tokenizer, gguf_tokenizer.adds_bos(files.fields), template, ends)
    except ValueError as error:
        raise ValueError(f"{files.path}: {error}") from error
