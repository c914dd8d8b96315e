"""GGUF files (llama.cpp's format) are read dequantized, and written as F16 or Q8_0, the tokenizer included.

The `gguf` library parses and packs; `gguf_names.py` has the names, `gguf_tokenizer.py` the tokenizer.
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
from jaxlm.formats.gguf_metadata import Metadata
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
IN_F32 = ("position_embd", "ffn_gate_inp")  # matrices that llama.cpp wants in float32
FACTORS = "rope_freqs.weight"  # divisors of the rotation's frequencies, which become part of the configuration
# Values of config.json that a GGUF file doesn't hold: dropout, and names that share an architecture.
NOT_STORED = {"model_type", "architectures", "resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"}


def _gguf() -> Any:
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
    quants = _gguf().quants
    return quants.dequantize(np.ascontiguousarray(data), _gguf().GGMLQuantizationType[kind])


def open_file(path: str | Path) -> Files:
    """Reads the metadata and the list of tensors; their numbers stay in the file.

    Raises a ValueError that names the file where it is damaged or holds what is not read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        reader = _reader()(path)
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


def _reader() -> type:
    """Returns the library's reader, which takes a short slice for a whole one, made to notice a truncated file."""
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
    """Writes a model as llama.cpp loads it: matrices in `kind` (f16 or q8_0), norms and biases in F32.

    Raises a ValueError where the format or llama.cpp can't express the model exactly.
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
        tokenizer_fields = gguf_tokenizer.write(text.tokenizer, values["vocab_size"], text.add_bos, text.ends)
        _add(writer, {f"tokenizer.ggml.{key}": value for key, value in tokenizer_fields.items()})
        writer.add_string("tokenizer.chat_template", text.chat_template or "")
    for tensor, s in stored.items():
        shape = s.shape
        if s.kind == "Q8_0":
            shape = gguf.quant_shape_to_byte_shape(s.shape, gguf.GGMLQuantizationType.Q8_0)
        dtype = PLAIN.get(s.kind, np.dtype(np.uint8))
        size = math.prod(shape) * dtype.itemsize
        writer.add_tensor_info(tensor, shape, dtype, size, gguf.GGMLQuantizationType[s.kind])
    if factors is not None:
        writer.add_tensor_info(FACTORS, factors.shape, factors.dtype, factors.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for s in stored.values():
            parts = [_packed(s, shards.collect(table[name], flat, np.dtype(np.float32))) for name in s.hf_names]
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
    """This says how a tensor is written: its kind of numbers, and its shape, outermost first.

    `hf_names` are the Hugging Face tensors in it: one, or those of all experts.
    """

    place: Place
    kind: str
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]


def _plan(kind: str, values: Values, table: Mapping[str, weight_names.Tensor]) -> dict[str, Stored]:
    """Returns how each tensor is written, by GGUF's names."""
    arch = gguf_names.architecture_of_model_type(values["model_type"])
    out: dict[str, Stored] = {}
    a = gguf_names.ARCHITECTURES[arch]
    for hf_name, tensor in table.items():
        place = gguf_names.place_of(a, hf_name, values)
        if place is None:
            raise ValueError(f"gguf: {hf_name} has no place in files of architecture {arch}")
        shape = tensor.shape[::-1] if place.stem in a.transposed else tensor.shape
        flat = len(shape) == 1 or place.stem.endswith(IN_F32)
        if not flat and kind == "q8_0" and shape[-1] % 32:
            raise ValueError(f"gguf: q8_0 needs rows of a multiple of 32; {place.name} has {shape[-1]}: choose f16")
        hf_names = (*(out[place.name].hf_names if place.name in out else ()), hf_name)
        stored_shape = shape if place.expert is None else (len(hf_names), *shape)
        out[place.name] = Stored(place, "F32" if flat else WRITTEN[kind][0], stored_shape, hf_names)
    return out


def _check(
    family: Family, values: Values, fields: Fields, stored: Mapping[str, Stored], factors: np.ndarray | None
) -> None:
    """Raises where the metadata don't say all that config.json would, by reading them as `open_file` does."""
    shapes = {name: s.shape for name, s in stored.items()}
    back = gguf_names.complete(family.to_hf(family.from_hf(gguf_names.config(fields, shapes, factors))))
    for name, ours in values.items():
        if name not in NOT_STORED and not _same(ours, back.get(name)):
            raise ValueError(f"gguf: {name} {ours} can't be told in a GGUF file, which would mean {back.get(name)}")


def _same(a: Any, b: Any) -> bool:
    """Compares two values, floats to float32's precision."""
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
