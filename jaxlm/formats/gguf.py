"""GGUF files, llama.cpp's format: read with their quantizations undone, written as F16 or Q8_0, tokenizer and all.

The `gguf` library parses and packs; `gguf_names.py` says what stands where, `gguf_tokenizer.py` does the tokenizer.
"""

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.core import tree, weight_names
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.formats import gguf_names, gguf_tokenizer, huggingface, shards
from jaxlm.formats.gguf_names import Fields, Place, Values
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
WRITTEN = {"f16": ("F16", "MOSTLY_F16"), "q8_0": ("Q8_0", "MOSTLY_Q8_0")}
IN_F32 = ("position_embd", "ffn_gate_inp")  # matrices that llama.cpp wants in full
FACTORS = "rope_freqs.weight"  # divisors of the rotation's frequencies, which become part of the configuration
# Values of config.json that a GGUF file doesn't hold: dropout, and names that share an architecture.
SILENT = {"model_type", "architectures", "resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"}


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files need the gguf package: pip install 'jaxlm[interop]'") from None
    return gguf


# ------------------------------------------------------------------------------------------------------------- opening


class Entry(NamedTuple):
    """A tensor as Hugging Face names and shapes it."""

    dtype: np.dtype
    """Of what is read: float32 where the file has quantized numbers."""
    shape: tuple[int, ...]
    place: Place
    kind: str
    data: np.ndarray
    """As stored: rows of bytes where quantized; a view of the mapped file."""


@dataclass(frozen=True)
class Files:
    """A GGUF file, its tensors by the names and in the shapes they have in Hugging Face's files."""

    path: Path
    entries: Mapping[str, Entry]
    values: Values
    """What config.json would say."""
    fields: Mapping[str, Any] = field(repr=False)
    """The metadata."""

    def read(self, name: str, index: Sequence[slice] | None = None, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor in its `dtype`, or the part at `index`, seen as of another `shape` where one is given.

        Needs memory for the rows that hold the part.
        """
        e = self.entries[name]
        shape = e.shape if shape is None else shape
        index = [slice(0, size) for size in shape] if index is None else list(index)
        assert math.prod(shape) == math.prod(e.shape) and len(index) == len(shape), f"{name}: {e.shape} is not {shape}"
        whole = e.place.stem in e.place.a.turned or e.data.ndim < 2
        first, last = (0, len(e.data)) if whole else self._rows(e, index, shape)
        part = e.place.read(_plain(e.kind, np.asarray(e.data[first:last])))
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
        """Rows of the stored tensor that hold a leading stretch of the view; whole heads where rows stand in pairs."""
        inner, row = math.prod(shape[1:]), math.prod(e.shape[1:])
        group = e.place.group
        first = index[0].start * inner // (row * group) * group
        last = -(-index[0].stop * inner // (row * group)) * group
        return first, last


def _plain(kind: str, data: np.ndarray) -> np.ndarray:
    """Stored numbers as numbers, float32 where they were quantized."""
    if kind in PLAIN:
        return data
    quants = _gguf().quants
    return quants.dequantize(np.ascontiguousarray(data), _gguf().GGMLQuantizationType[kind])


def open_file(path: str | Path) -> Files:
    """Read the metadata and see what tensors there are; their numbers stay in the file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        reader = _reader()(path)
        fields = {name: found.contents() for name, found in reader.fields.items()}
        tensors = {t.name: t for t in reader.tensors}
        shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}
        if fields.get("split.count", 1) > 1:
            raise ValueError("one of several parts; merge them first: llama-gguf-split --merge")
        factors = tensors.get(FACTORS)
        values = gguf_names.config(fields, shapes, None if factors is None else np.asarray(factors.data))
        entries = _entries(tensors, shapes, values)
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        why = str(error) if isinstance(error, ValueError) else f"damaged: {error!r}"
        raise ValueError(f"{path}: {why}") from error
    return Files(path, entries, values, fields)


def _entries(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], values: Values) -> dict:
    a = gguf_names.ARCHITECTURES[gguf_names.of_model_type(values["model_type"])]
    out = {}
    for name, t in tensors.items():
        if name == FACTORS:
            continue
        kind = t.tensor_type.name
        if kind not in PLAIN and kind not in QUANTIZED:
            raise ValueError(
                f"{name} is stored as {kind}, which is not read; known are {', '.join((*PLAIN, *QUANTIZED))}"
            )
        theirs, shape, dtype = gguf_names.theirs(a, name), shapes[name], PLAIN.get(kind, np.dtype(np.float32))
        if not theirs:
            raise ValueError(f"{name} is not a tensor of this architecture as known here")
        several = "{expert}" in theirs
        for i in range(shape[0]) if several else [0]:
            file = theirs.format(expert=i)
            place = gguf_names.place(a, file, values)
            assert place, file
            own, data = (shape[1:], t.data[i]) if several else (shape, t.data)
            if (place.group > 1 and place.group % 2) or own[0] % place.group:
                raise ValueError(f"{name} has {own[0]} rows, which heads of {place.group} don't share in pairs")
            own = own[::-1] if place.stem in a.turned and len(own) == 2 else own
            out[file] = Entry(dtype, own, place, kind, data)
    return out


def _reader() -> type:
    """The library's reader, which takes a short slice for a whole one, made to notice where a file ends too early."""
    gguf = _gguf()

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined]
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"the file ends at byte {len(self.data):,}, before byte {end:,}; fetch it again")
            return super()._get(offset, dtype, count, override_order)

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            if self.byte_order != "I":
                raise ValueError("numbers of the other byte order are not read")
            for found in fields:
                name, kind = bytes(found.parts[1]).decode(), int(found.parts[4][0])
                if kind not in {int(k) for k in gguf.GGMLQuantizationType}:
                    raise ValueError(
                        f"{name} is stored as type {kind}, which the gguf package doesn't know; update it?"
                    )
            super()._build_tensors(start_offs, fields)

    return Reader


# ------------------------------------------------------------------------------------------------------------- reading


def describe(files: Files, models: Mapping[str, Family]) -> tuple[Family, Any]:
    """The family and its Config."""
    family = huggingface.family_of(files.values, models)
    return family, family.from_hf(files.values)


def load(
    files: Files, family: Family, c: Any, specs: Any, shardings: Any, *, dtype: Any = np.float32,
    each: Callable[[str, jax.Array], Any] | None = None,
) -> Any:  # fmt: skip
    """The weights, each device's share straight onto it, in pieces: the host holds a few at a time. `each`: (path,
    weight) → what takes its place before the next one is read."""
    table = weight_names.tensors(family.names(c), specs)
    missing, extra = (sorted(a - b) for a, b in itertools.permutations((table.keys(), files.entries.keys())))
    for found, what in ((missing, "is missing"), (extra, "is not this model's")):
        if found:
            raise ValueError(f"{files.path}: {found[0]} {what}" + f" (and {len(found) - 1} more)" * (len(found) > 1))
    sources: dict[str, list[shards.Source]] = {}
    for name, entry in files.entries.items():
        if entry.shape != table[name].shape:
            due = f"{list(entry.shape)}, but the metadata make it {list(table[name].shape)}"
            raise ValueError(f"{files.path}: {entry.place.name} ({name}) is {due}")
        for part, view in zip(table[name].parts, table[name].views, strict=True):
            read = partial(files.read, name, shape=view.shape)
            sources.setdefault(part.path, []).append(shards.Source(part, view, read, entry.dtype))
    return shards.fill(specs, shardings, sources, dtype, each)


class Text(NamedTuple):
    """What a file says of text."""

    tokenizer: Tokenizer
    add_bos: bool
    """Whether texts begin with the bos token."""
    chat_template: str | None


def text(files: Files) -> Text:
    try:
        found = gguf_tokenizer.read(files.fields)
        return Text(found, gguf_tokenizer.adds_bos(files.fields), files.fields.get("tokenizer.chat_template"))
    except ValueError as error:
        raise ValueError(f"{files.path}: {error}") from error


# ------------------------------------------------------------------------------------------------------------- writing


def save(
    path: str | Path,
    family: Family,
    c: Any,
    specs: Any,
    params: Any,
    *,
    kind: str = "f16",
    text: Text | None = None,
    name: str = "",
) -> Path:
    """Write a model as llama.cpp loads it: matrices in `kind` (f16 or q8_0), norms and biases in F32.

    A model that the format or llama.cpp can't express exactly is refused.
    """
    gguf, path = _gguf(), Path(path)
    if kind not in WRITTEN:
        raise ValueError(f"gguf: kind {kind!r} is not written, only {', '.join(WRITTEN)}")
    if path.exists():
        raise ValueError(f"{path} exists already; choose another name or remove it")
    flat = tree.flatten(params)
    for weight, w in flat.items():
        if not isinstance(w, jax.Array):
            what = type(w).__name__
            raise ValueError(f"{weight}: is {what}, not plain numbers; merge adapters and dequantise before export")
    values = gguf_names.complete(family.to_hf(c))
    fields, factors = gguf_names.metadata(values)
    table = weight_names.tensors(family.names(c), specs)
    stored = _plan(kind, values, table)
    _check(family, values, fields, stored, factors)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, fields.pop("general.architecture"))
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[WRITTEN[kind][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add(writer, fields)
    if text is not None:
        found = gguf_tokenizer.write(text.tokenizer, values["vocab_size"], text.add_bos)
        _add(writer, {f"tokenizer.ggml.{key}": value for key, value in found.items()})
        writer.add_string("tokenizer.chat_template", text.chat_template or "")
    for tensor, s in stored.items():
        byte = gguf.quant_shape_to_byte_shape(s.shape, gguf.GGMLQuantizationType.Q8_0) if s.kind == "Q8_0" else s.shape
        dtype = PLAIN.get(s.kind, np.dtype(np.uint8))
        size = math.prod(byte) * dtype.itemsize
        writer.add_tensor_info(tensor, byte, dtype, size, gguf.GGMLQuantizationType[s.kind])
    if factors is not None:
        writer.add_tensor_info(FACTORS, factors.shape, factors.dtype, factors.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for s in stored.values():
            parts = [_packed(s, shards.collect(table[file], flat, np.dtype(np.float32))) for file in s.files]
            writer.write_tensor_data(parts[0] if s.place.expert is None else np.stack(parts))
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.close()
        partial.replace(path)
    finally:
        for file in writer.fout or ():  # the library leaves it open after an error
            file.close()
        partial.unlink(missing_ok=True)
    return path


class Stored(NamedTuple):
    """How a tensor is written."""

    place: Place
    kind: str
    shape: tuple[int, ...]
    """As stored, outermost first."""
    files: tuple[str, ...]
    """The Hugging Face tensors in it: one, or those of all experts."""


def _plan(kind: str, values: Values, table: Mapping[str, weight_names.Tensor]) -> dict[str, Stored]:
    """By GGUF's names."""
    arch = gguf_names.of_model_type(values["model_type"])
    out: dict[str, Stored] = {}
    a = gguf_names.ARCHITECTURES[arch]
    for file, tensor in table.items():
        place = gguf_names.place(a, file, values)
        if place is None:
            raise ValueError(f"gguf: {file} has no place in files of architecture {arch}")
        shape = tensor.shape[::-1] if place.stem in a.turned else tensor.shape
        flat = len(shape) == 1 or place.stem.endswith(IN_F32)
        if not flat and kind == "q8_0" and shape[-1] % 32:
            raise ValueError(f"gguf: q8_0 needs rows of a multiple of 32; {place.name} has {shape[-1]}: choose f16")
        files = (*(out[place.name].files if place.name in out else ()), file)
        whole = shape if place.expert is None else (len(files), *shape)
        out[place.name] = Stored(place, "F32" if flat else WRITTEN[kind][0], whole, files)
    return out


def _check(
    family: Family, values: Values, fields: Fields, stored: Mapping[str, Stored], factors: np.ndarray | None
) -> None:
    """Whether the metadata say all that config.json would, by reading them as `open_file` does."""
    shapes = {name: s.shape for name, s in stored.items()}
    back = gguf_names.complete(family.to_hf(family.from_hf(gguf_names.config(fields, shapes, factors))))
    for name, ours in values.items():
        if name not in SILENT and not _same(ours, back.get(name)):
            raise ValueError(f"gguf: {name} {ours} can't be told in a GGUF file, which would mean {back.get(name)}")


def _same(a: Any, b: Any) -> bool:
    """Equal, floats to float32's precision."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, float) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=1e-5)
    return a == b


def _add(writer: Any, fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)


def _packed(s: Stored, w: np.ndarray) -> np.ndarray:
    w = np.ascontiguousarray(s.place.write(w))
    if s.kind == "F16":
        with np.errstate(over="ignore"):
            out = w.astype(np.float16)
        if np.isinf(out).sum() > np.isinf(w).sum():
            raise ValueError(f"gguf: {s.place.name} holds numbers beyond the range of F16")
        return out
    gguf = _gguf()
    return gguf.quants.quantize(w, gguf.GGMLQuantizationType[s.kind])
