"""Writes GGUF files as llama.cpp loads them: matrices in F16 or in blocks of few bits, the tokenizer included."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.core import tree, weight_names
from jaxlm.formats import gguf, gguf_file_types, gguf_names, gguf_quants, gguf_tokenizer, shards
from jaxlm.formats.gguf import FACTORS, Text
from jaxlm.formats.gguf_file_types import Choice
from jaxlm.formats.gguf_names import Fields, Place, Values
from jaxlm.nn.family import Family

# Values of config.json that a GGUF file doesn't hold: dropout, and names that share an architecture.
NOT_STORED = {"model_type", "architectures", "resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"}


class Stored(NamedTuple):
    """This says how a tensor is written: its kind of numbers, and its shape, outermost first.

    `hf_names` are the Hugging Face tensors in it: one, or those of all experts.
    """

    place: Place
    choice: Choice
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]

    @property
    def kind(self) -> str:
        return self.choice.kind


def save(
    path: str | Path,
    family: Family,
    c: Any,
    specs: Any,
    params: Any,
    *,
    file_type: str = "f16",
    importance: Mapping[str, np.ndarray] | None = None,
    text: Text | None = None,
    name: str = "",
) -> list[str]:
    """Writes a model as llama.cpp loads it, and returns lines on the kinds of numbers that its tensors have: matrices
    those of `file_type` (one of `FILE_TYPES`), norms and biases F32.

    `importance` says by GGUF's names of tensors how much the squared error of each column counts, `[columns]`, or
    `[experts, columns]`: the mean squares of inputs. Raises a ValueError where the format or llama.cpp can't express
    the model exactly, and for numbers that aren't finite.
    """
    gguf_file_types.check(file_type)
    library, path = gguf.library(), Path(path)
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
    stored = _plan(file_type, values, table, importance)
    _check(family, values, fields, stored, factors)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    writer = library.GGUFWriter(partial, fields.pop("general.architecture"))
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(library.LlamaFileType[gguf_file_types.FILE_TYPES[file_type][1]])
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    _add(writer, fields)
    if text is not None:
        tokenizer_fields = gguf_tokenizer.write(text.tokenizer, values["vocab_size"], text.add_bos, text.ends)
        _add(writer, {f"tokenizer.ggml.{key}": value for key, value in tokenizer_fields.items()})
        writer.add_string("tokenizer.chat_template", text.chat_template or "")
    for tensor, s in stored.items():
        raw = library.GGMLQuantizationType[s.kind]
        shape = library.quant_shape_to_byte_shape(s.shape, raw) if s.kind in gguf_quants.KINDS else s.shape
        dtype = gguf.PLAIN.get(s.kind, np.dtype(np.uint8))
        writer.add_tensor_info(tensor, shape, dtype, math.prod(shape) * dtype.itemsize, raw)
    if factors is not None:
        writer.add_tensor_info(FACTORS, factors.shape, factors.dtype, factors.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, s in stored.items():
            weights = (importance or {}).get(tensor)
            parts = []
            for i, hf_name in enumerate(s.hf_names):
                own = weights[i] if weights is not None and s.place.expert is not None else weights
                parts.append(_packed(s, shards.collect(table[hf_name], flat, np.dtype(np.float32)), own))
            writer.write_tensor_data(parts[0] if s.place.expert is None else np.stack(parts))
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.close()
        partial.replace(path)
    finally:
        for file in writer.fout or ():  # the library leaves it open after an error
            file.close()
        partial.unlink(missing_ok=True)
    return gguf_file_types.described(file_type, {tensor: (s.choice, s.shape) for tensor, s in stored.items()})


def importance_of(family: Family, c: Any, specs: Any, mean_squares: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns importance by GGUF's names of tensors, for the mean squares `[layers, inputs]` of the inputs of some of
    the model's weights, by their paths."""
    values = gguf_names.complete(family.to_hf(c))
    a = gguf_names.ARCHITECTURES[gguf_names.architecture_of_model_type(values["model_type"])]
    out = {}
    for hf_name, tensor in weight_names.tensors(family.names(c), specs).items():
        place = gguf_names.place_of(a, hf_name, values)
        if place is None or any(part.path not in mean_squares for part in tensor.parts):
            continue
        ins, parts = tensor.entry.ins or 0, []
        for part in tensor.parts:  # what is said of an input holds for all outputs
            found = mean_squares[part.path][part.index].reshape(*part.shape[:ins], *(1,) * (len(part.shape) - ins))
            parts.append(np.broadcast_to(found, part.shape).astype(np.float32))
        out[place.name] = place.write(tensor.join(parts))[0]
    return out


def _plan(
    file_type: str,
    values: Values,
    table: Mapping[str, weight_names.Tensor],
    importance: Mapping[str, np.ndarray] | None,
) -> dict[str, Stored]:
    """Returns how each tensor is written, by GGUF's names."""
    arch = gguf_names.architecture_of_model_type(values["model_type"])
    a = gguf_names.ARCHITECTURES[arch]
    found: dict[str, list[tuple[Place, tuple[int, ...], str]]] = {}
    for hf_name, tensor in table.items():
        place = gguf_names.place_of(a, hf_name, values)
        if place is None:
            raise ValueError(f"gguf: {hf_name} has no place in files of architecture {arch}")
        shape = tensor.shape[::-1] if place.stem in a.transposed else tensor.shape
        found.setdefault(place.name, []).append((place, shape, hf_name))
    heads = values.get("num_attention_heads")
    experts = max(len(parts) for parts in found.values())
    m = gguf_file_types.Model(
        a.name or arch,
        values["num_hidden_layers" if "num_hidden_layers" in values else "n_layer"],
        experts if experts > 1 else 0,
        "output.weight" not in found,
        values.get("num_key_value_heads", heads) != heads,
    )
    out = {}
    for name, parts in found.items():
        place, shape, _ = parts[0]
        choice = gguf_file_types.choose(file_type, name, shape, m, importance is not None)
        stored_shape = shape if place.expert is None else (len(parts), *shape)
        out[name] = Stored(place, choice, stored_shape, tuple(hf_name for *_, hf_name in parts))
    for name, weights in (importance or {}).items():
        if name not in out:
            raise ValueError(f"importance: {name} is no tensor of this model; take one that was measured with it")
        s = out[name].shape
        if weights.shape != (*s[:-2], s[-1]):
            raise ValueError(f"importance: of {name} has shape {weights.shape}, not {(*s[:-2], s[-1])}")
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


def _packed(s: Stored, w: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    w = np.ascontiguousarray(s.place.write(w))
    if s.kind == "F32":
        return w
    if s.kind == "F16":
        with np.errstate(over="ignore"):
            out = w.astype(np.float16)
        if np.isinf(out).sum() > np.isinf(w).sum():
            raise ValueError(f"gguf: {s.place.name} holds numbers beyond the range of F16")
        return out
    try:
        return gguf_quants.encode(w, s.kind, importance)
    except ValueError as error:
        raise ValueError(f"gguf: {s.place.name} {error}") from None
