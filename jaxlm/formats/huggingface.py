"""A Hugging Face directory is read and written here: `config.json`, safetensors, and (by `hf_sidecars`) their sidecars.

Weights go from the file to their shards, and back, in pieces of a few megabytes: neither a whole layer stack nor a
whole tensor is ever assembled for all devices. Nothing in such a directory is run: `auto_map` and pickles are refused.
"""

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import tree, weight_names
from jaxlm.core.errors import misspelt
from jaxlm.core.published_config import PublishedConfig
from jaxlm.core.spec import is_spec
from jaxlm.formats import hf_sidecars, model_card, multimodal, quantization, safetensors, shards
from jaxlm.formats.quantization import QuantizedFiles
from jaxlm.formats.safetensors import Files, read_json
from jaxlm.nn.family import Family, Outputs
from jaxlm.nn.leaf import is_leaf

MAX_NAMES = 4  # tensors that an error names
EXPORTED = ("float32", "bfloat16", "float16")

# ------------------------------------------------------------------------------------------------------------- opening


def read_config(directory: str | Path) -> PublishedConfig:
    """Reads `config.json`; raises a ValueError where there is none."""
    folder = Path(directory)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: has no config.json, so it is no Hugging Face model directory")
    return PublishedConfig(read_json(folder / "config.json"), str(folder / "config.json"))


def family_of(values: Mapping[str, Any], models: Mapping[str, Family]) -> Family:
    """Returns the family that reads files of this `model_type`; raises a ValueError where there is none."""
    kind, known = values.get("model_type"), {t: f for f in models.values() for t in f.MODEL_TYPES}
    if not isinstance(kind, str) or kind not in known:
        every = [*known, *multimodal.WRAPPERS]
        hint = misspelt(str(kind), every)
        near = f"{f'{hint}, ' if hint else '; '}known: {', '.join(sorted(every))}"
        note = "; its own code (auto_map) is never run" if "auto_map" in values else ""
        raise ValueError(f"config.json: model_type {kind!r} is not read here{near}{note}")
    return known[kind]


def open_tensors(directory: str | Path) -> Files:
    """Opens the tensors of a directory: of a multimodal model those of its text model, as in files of its own, and of
    quantized weights the numbers that they stand for."""
    files = safetensors.open_files(directory)
    if not (Path(directory) / "config.json").is_file():
        return files
    values = read_config(directory)
    files = multimodal.text_tensors(files) if multimodal.is_wrapper(values) else files
    quantized = quantization.settings(values, directory)
    return quantization.opened(files, quantized) if quantized else files


def open_for(directory: str | Path, table: Mapping[str, weight_names.Tensor], family: Family) -> Files:
    """Opens the tensors of a directory for a model's table of them. Quantized matrices stand as [out, in] in files of
    every method; those that the table has as [in, out] are turned."""
    files = open_tensors(directory)
    if not isinstance(files, QuantizedFiles):
        return files
    spell = _spelling(files, family.FILES.prefixes)
    return files.turn([spell(name) for name, tensor in table.items() if tensor.entry.order == "in_out"])


def left_out(directory: str | Path, c: Any) -> list[str]:
    """Returns lines on what of a directory's files isn't read, or not as it is."""
    values = read_config(directory)
    lines = [multimodal.left_out(directory, values["model_type"], c)] if multimodal.is_wrapper(values) else []
    quantized = quantization.settings(values, directory)
    return lines + ([f"{directory}: {quantization.note(quantized)}"] if quantized else [])


def describe(directory: str | Path, models: Mapping[str, Family]) -> tuple[Family, Any]:
    """Returns the family and its Config. Where its files may have more or less than config.json says, they decide.

    Raises a ValueError that names the key where one is missing or unusable.
    """
    values = read_config(directory)
    if quantized := quantization.settings(values, directory):
        quantization.method(quantized)  # refuses those that aren't read
    if multimodal.is_wrapper(values):
        here = any(Path(directory).glob("*.safetensors"))
        values = multimodal.text_config(values, open_tensors(directory) if here else None)
    family = family_of(values, models)
    try:
        c = family.from_hf(values)
    except KeyError as error:
        raise ValueError(
            f"{directory}/config.json: lacks {error.args[0]}, which {values['model_type']} needs"
        ) from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{directory}/config.json: a value is not what it should be ({error})") from error
    if any(Path(directory).glob("*.safetensors")):
        c = family.FILES.infer_from_files(c, open_tensors(directory).entries)
    return family, c


# ------------------------------------------------------------------------------------------------------------- loading


def load(
    directory: str | Path,
    family: Family,
    c: Any,
    specs: Any,
    shardings: Any,
    *,
    dtype: Any = jnp.float32,
    names: Mapping[str, weight_names.Name] | None = None,
    ignore: Iterable[str] = (),
    transform: Callable[[str, jax.Array], Any] | None = None,
) -> Any:
    """Loads the weights of a directory, each device's share straight onto it.

    `names` says where they stand; None: as the family does for models without a task's head. Tensors that match a
    pattern of `ignore` are left out. `transform` takes (path, weight) and returns what takes its place before the next
    one is read. The host holds a piece or two; every process reads what its own devices need.
    Raises a ValueError that names the tensors where they don't fit the model.
    """
    entries = family.names(c) if names is None else names
    table = weight_names.tensors(entries, specs)
    files = open_for(directory, table, family)
    found = match_names(files, table, family, entries, specs, ignore)
    sources: dict[str, list[shards.Source]] = {}
    for name, tensor in table.items():
        for part, view in zip(tensor.parts, tensor.views, strict=True):
            read = partial(files.read, found[name], shape=view.shape)
            source = shards.Source(part, view, read, files.entries[found[name]].dtype)
            sources.setdefault(part.path, []).append(source)
    return shards.fill(specs, shardings, sources, dtype, transform)


# ------------------------------------------------------------------------------------------------------- a task's head


def read_outputs(values: Mapping[str, Any]) -> Outputs:
    """Returns what config.json says of the outputs of a task's head; where it names none they are LABEL_0, LABEL_1 …

    ValueError: it says it twice, or leaves one out.
    """
    stated, count = values.get("id2label"), values.get("num_labels")
    if not stated:
        return Outputs(tuple(f"LABEL_{i}" for i in range(count or 2)), values.get("problem_type") or "")
    if sorted(stated, key=str) != sorted(map(str, range(len(stated)))):
        raise ValueError(f"id2label has the keys {', '.join(map(str, stated))}; give one for each output, from 0 on")
    labels = tuple(str(stated[str(i)]) for i in range(len(stated)))
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(f"id2label has the label {twice!r} twice; give each output a name of its own")
    if count is not None and count != len(labels):
        raise ValueError(f"num_labels is {count}, and id2label names {len(labels)} outputs; correct one of them")
    return Outputs(labels, values.get("problem_type") or "")


def output_values(out: Outputs) -> dict[str, Any]:
    """Returns what config.json says of the outputs of a task's head."""
    named = {str(i): label for i, label in enumerate(out.labels)}
    values: dict[str, Any] = dict(id2label=named, label2id={label: i for i, label in enumerate(out.labels)})
    return values | ({"problem_type": out.problem_type} if out.problem_type else {})


# ------------------------------------------------------------------------------------------- do the files fit the model


def match_names(
    files: Files,
    table: Mapping[str, weight_names.Tensor],
    family: Family,
    entries: Mapping[str, weight_names.Name],
    specs: Any,
    ignore: Iterable[str] = (),
) -> dict[str, str]:
    """Returns the name in these files of each of the table's tensors.

    Raises a ValueError for tensors that are missing, left over or misshapen.
    """
    spell = _spelling(files, family.FILES.prefixes)
    copies = {spell(name): spell(original) for name, original in _copies(family, entries, specs).items()}
    # Early files may hold any one of the copies, which then stands for the original.
    stand_in = {of: name for name, of in copies.items() if name in files.entries and of not in files.entries}
    names = {name: stand_in.get(spell(name), spell(name)) for name in table}
    patterns = [re.compile(p) for p in (*family.FILES.ignored, *ignore)]
    missing = [name for name in names.values() if name not in files.entries]
    extra = [
        name
        for name in sorted(files.entries.keys() - names.values() - copies.keys())
        if not any(p.fullmatch(name) for p in patterns)
        and not (isinstance(files, QuantizedFiles) and files.is_zero_bias(name))
    ]
    if missing or extra:
        what = [_listed(missing, "missing")] if missing else []
        what += [_listed(extra, "not this model's")] if extra else []
        raise ValueError(f"{files.directory}: {' and '.join(what)}; check that config.json belongs to these weights")
    for name, tensor in table.items():
        entry = files.entries[names[name]]
        if entry.shape != tensor.shape:
            due = f"{list(entry.shape)}, but config.json makes it {list(tensor.shape)}"
            raise ValueError(f"{entry.file}: {names[name]} is {due}")
        if not jnp.issubdtype(entry.dtype, jnp.floating):
            due = f"{entry.dtype} numbers where floats are due; bring the unquantised weights"
            raise ValueError(f"{entry.file}: {names[name]} holds {due}")
    for name, of in ((name, stand_in.get(of, of)) for name, of in copies.items()):
        if name in files.entries and not _equal(files, name, of):
            head = "head" in entries and name.endswith(entries["head"].file)
            why = "though config.json ties them; set tie_word_embeddings to false there"
            if not head:
                why = "which are one tensor in this model as it is read here; fetch or export its files again"
            raise ValueError(f"{files.entries[name].file}: {name} differs from {of}, {why}")
    return names


def _spelling(files: Files, prefixes: tuple[str, ...]) -> Callable[[str], str]:
    """Returns a function from a name in the table to the one in these files: of a bare, a larger or an older model."""
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in files.entries)), "")
    old = {
        ".LayerNorm.weight": ".LayerNorm.gamma",
        ".LayerNorm.bias": ".LayerNorm.beta",
    }  # names of files that were converted from TensorFlow
    if not any(name.endswith(tuple(old.values())) for name in files.entries):
        old = {}

    def spell(name: str) -> str:
        own_prefix = next((p for p in prefixes if p and name.startswith(p)), "")
        if not prefix:
            name = name.removeprefix(own_prefix)
        name = next((name.removesuffix(new) + early for new, early in old.items() if name.endswith(new)), name)
        return prefix + name if prefix and not own_prefix and prefix + name in files.entries else name

    return spell


def _listed(names: list[str], what: str) -> str:
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{len(names)} tensor{'s are' * (len(names) > 1) or ' is'} {what} ({', '.join(names[:MAX_NAMES])}{rest})"


def _copies(family: Family, entries: Mapping[str, weight_names.Name], specs: Any) -> dict[str, str]:
    """Returns the tensors that a file may hold though the model has them once, and which one each must equal.

    A head that the specs lack is the embedding; a family states others in its `FILES.tied`.
    """
    own = {name.file for name in entries.values()}
    tied = {name: of for name, of in family.FILES.tied.items() if name not in own}
    if "head" in entries and "head" not in specs and "embed" in specs:
        tied[entries["head"].file] = entries["embed"].file
    return tied


def _equal(files: Files, a: str, b: str) -> bool:
    entry, other = files.entries[a], files.entries[b]
    if (entry.shape, entry.dtype) != (other.shape, other.dtype):
        return False
    pieces = shards.cut([slice(0, size) for size in entry.shape], shards.PIECE // entry.dtype.itemsize)
    return all(files.read(a, piece).tobytes() == files.read(b, piece).tobytes() for piece in pieces)


# -------------------------------------------------------------------------------------------------------------- saving


def save(
    directory: str | Path,
    family: Family,
    c: Any,
    specs: Any,
    params: Any,
    *,
    dtype: Any,
    names: Mapping[str, weight_names.Name] | None = None,
    values: Mapping[str, Any] | None = None,
    extra_files_from: str | Path | None = None,
    generation: hf_sidecars.Generation | None = None,
    card: bool = True,
    about: model_card.About | None = None,
    max_bytes: int = 5_000_000_000,
    layout: str | None = None,
) -> list[str]:
    """Writes a directory that transformers and `load` read; returns a line on each thing that was written.

    `names` and `values` (of config.json) are those of a model with a task's head; None: the family's own.
    `dtype`: float32, bfloat16 or float16, or a dict that says it for each tensor of the file (see `dtypes`).
    `extra_files_from`: a directory or a run's tokenizer folder whose tokenizer and settings come along.
    `about`: what the model card says of its making. `config.json` comes last: after a kill there is no model here.
    `layout`: the method of `quantization.WRITERS` by which matrices that are leaves of few bits are laid out.
    """
    flat = _weights(specs, params, leaves=layout is not None)
    entries = family.names(c) if names is None else names
    table = weight_names.tensors(entries, specs)
    made = family.to_hf(c) if values is None else values
    few: dict[str, quantization.Coded] = {}
    planned: quantization.Tensors = {}
    if layout is not None:
        few = quantization.coded(table, flat, is_leaf)
        writer = quantization.WRITERS[layout]
        planned = {f"{x.module}.{last}": t for x in few.values() for last, t in writer.tensors(x).items()}
        made = {**made, "quantization_config": writer.written(few, _plain_modules(table, entries, few))}
    kinds = {name: export_dtype(dtype, name) for name in table if name not in few}
    common = max(sorted(set(kinds.values()), key=str), key=list(kinds.values()).count)
    tensors = {name: (kind, table[name].shape) for name, kind in kinds.items()}
    return write(
        directory, family, made, tensors | {name: (t.dtype, t.shape) for name, t in planned.items()},
        lambda name: planned[name].make() if name in planned else _tensor(name, table[name], flat, kinds[name]),
        count=sum(math.prod(tensor.shape) for tensor in table.values()), dtype=common,
        generates=family.generates and values is None,
        extra_files_from=extra_files_from, generation=generation, card=card, about=about, max_bytes=max_bytes,
    )  # fmt: skip


def _plain_modules(
    table: Mapping[str, weight_names.Tensor], entries: Mapping[str, weight_names.Name], few: Collection[str]
) -> list[str]:
    """Returns the names of the linear modules that aren't in few bits; the head is one, tied or not."""
    linear = [name for name, tensor in table.items() if tensor.entry.ins is not None and name.endswith(".weight")]
    heads = [entries["head"].file] if "head" in entries else []
    return [name.removesuffix(".weight") for name in dict.fromkeys([*heads, *linear]) if name not in few]


def write(
    directory: str | Path,
    family: Family,
    values: Mapping[str, Any],
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
    *,
    generates: bool,
    extra_files_from: str | Path | None = None,
    generation: hf_sidecars.Generation | None = None,
    card: bool = True,
    about: model_card.About | None = None,
    max_bytes: int = 5_000_000_000,
    count: int | None = None,
    dtype: np.dtype | None = None,
) -> list[str]:
    """Writes a directory as `save` does, of tensors of these dtypes and shapes, each of which `read` gives by its name
    when its turn comes; returns a line on each thing that was written.

    `values` are those of config.json; `generates`: the model may have settings of generation. `count` and `dtype`: of
    the weights, where they aren't those of the tensors.
    """
    folder = Path(directory)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder}: holds a config.json already; choose another directory or remove it")
    settings = generation or hf_sidecars.known_settings(extra_files_from)
    kinds = [dtype for dtype, _ in tensors.values()]
    common = dtype or max(sorted(set(kinds), key=str), key=kinds.count)
    written = safetensors.write(folder, tensors, read, max_bytes=max_bytes)
    count = sum(math.prod(shape) for _, shape in tensors.values()) if count is None else count
    files = written[0].name if len(written) == 1 else f"{len(written) - 1} shards"
    notes = [f"{files}: {len(tensors)} tensors, {count:,} parameters as {common}"]
    notes += hf_sidecars.copy_tokenizer(folder, extra_files_from, family.kind)
    if settings is not None and generates:
        source = None if generation else extra_files_from
        notes += hf_sidecars.write_generation(folder, settings, source)
    # transformers' own default of pad_token_id may lie beyond the vocabulary.
    ids = {"pad_token_id": None} if settings is None else hf_sidecars.token_ids(settings)
    values = {**ids, **values, "dtype": str(common)}
    if card:
        model_card.write(folder, values, count, about or model_card.About())
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    partial_file = folder / f".config.json.{os.getpid()}.partial"
    partial_file.write_text(text, "utf-8")
    partial_file.replace(folder / "config.json")
    return notes


def _tensor(name: str, tensor: weight_names.Tensor, flat: Mapping[str, jax.Array], dtype: np.dtype) -> np.ndarray:
    try:
        return shards.collect(tensor, flat, dtype)
    except OverflowError:
        raise ValueError(f"{name}: holds numbers beyond the range of {dtype}; export as bfloat16 or float32") from None


def dtypes(directory: str | Path) -> dict[str, str]:
    """Returns the dtype of each tensor of a directory, for `save` to write the same."""
    return {name: str(entry.dtype) for name, entry in open_tensors(directory).entries.items()}


def export_dtype(dtype: Any, name: str) -> np.dtype:
    """Returns the dtype that a tensor is written in; `dtype` as for `save`. ValueError: it is none that is written."""
    if isinstance(dtype, Mapping):  # a name that it lacks was spelled otherwise there: take the commonest dtype
        dtype = dtype.get(name) or max(dtype.values(), key=list(dtype.values()).count)
    if (dtype if isinstance(dtype, str) else str(np.dtype(dtype))) not in EXPORTED:
        raise ValueError(f"dtype {dtype!r} is not written; choose one of {', '.join(EXPORTED)}")
    return np.dtype(dtype)


def _weights(specs: Any, params: Any, leaves: bool = False) -> dict[str, Any]:
    flat, due = tree.flatten(params), tree.flatten(specs, is_spec)
    if extra := sorted(flat.keys() - due.keys()):
        raise ValueError(f"{', '.join(extra)}: no place for it in this family's published files; leave it out")
    if missing := sorted(due.keys() - flat.keys()):
        raise ValueError(f"{', '.join(missing)}: no such weights to export")
    for path, w in flat.items():
        if leaves and is_leaf(w):
            continue
        if not isinstance(w, jax.Array):
            raise ValueError(
                f"{path}: is {type(w).__name__}, not plain numbers; merge adapters and dequantise before export"
            )
        if not w.is_fully_addressable:
            raise ValueError(f"{path}: is spread over several processes; export from the checkpoint with one process")
        assert w.shape == due[path].shape, f"{path}: {w.shape} is not {due[path].shape}"
    return flat
