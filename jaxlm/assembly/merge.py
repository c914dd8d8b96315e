"""Models of one shape on disk become one Hugging Face directory.

Tensors are read in stretches of all models, by position, and written one by one, so that memory holds a tensor of the
result and some megabytes besides, however many models there are.
"""

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.assembly import convert, run_directory, task_heads
from jaxlm.assembly.model_source import Source, describe
from jaxlm.assembly.open_model import read_each, specs_of
from jaxlm.assembly.task_heads import Export
from jaxlm.core import config, config_io, tree, weight_names
from jaxlm.core.merging import Settings
from jaxlm.core.spec import is_spec
from jaxlm.core.weight_names import Tensor
from jaxlm.formats import gguf_tokenizer, huggingface, model_card, safetensors
from jaxlm.weights import merging
from jaxlm.weights.merging import Stretch

HELD = 1 << 18  # numbers that are held of all models together
HEADS = ("architectures", "id2label", "problem_type")  # what config.json says of the head of a task
MAY_DIFFER = ("positions", "dropout")  # a limit where there is no table of positions; training alone


class Opened(NamedTuple):
    """An opened model is described, and its tensors can be read by the names that published files have."""

    source: Source
    form: Export
    """How published files have it."""
    table: Mapping[str, Tensor]
    files: safetensors.Files
    names: Mapping[str, str]
    """What its files call each tensor of the table."""

    def entry(self, name: str) -> safetensors.Entry:
        """Returns where a tensor stands."""
        return self.files.entries[self.names[name]]

    @property
    def size(self) -> int:
        """Returns the bytes of all tensors."""
        entries = map(self.entry, self.table)
        return sum(e.dtype.itemsize * math.prod(e.shape) for e in entries)


class Merged(NamedTuple):
    """This record says what was written and how."""

    path: Path
    settings: Settings
    notes: list[str]
    models: list[tuple[str, str, int]]
    """Place, part in the merge and bytes of each model; the base first, if there is one."""
    size: int
    """The bytes that were written."""
    seconds: float

    def table(self) -> str:
        """Returns a table of the models, and of what was made of them, with bytes and seconds."""
        rows = [(place, part, f"{size:,} bytes") for place, part, size in self.models]
        rows.append((str(self.path), self.settings.method, f"{self.size:,} bytes in {self.seconds:.1f} s"))
        wide, narrow = (max(len(row[i]) for row in rows) for i in range(2))
        return "\n".join(f"{a:{wide}}  {b:{narrow}}  {c}" for a, b, c in rows)


def merge(
    models: Sequence[str | Path],
    out: str | Path,
    settings: Settings,
    base: str | Path | None = None,
    *,
    dtype: str | None = None,
    any_tokenizer: bool = False,
) -> Merged:
    """Merges models into a new Hugging Face directory, whose tokenizer and settings are the base's, or the first
    model's where the method has no base.

    dtype: float32, bfloat16 or float16; None: that of each tensor there. any_tokenizer: merge models whose tokenizers
    differ. ValueError: a setting doesn't fit, a model can't be read, or one differs in shape or meaning from the first;
    nothing is left then.
    """
    began = time.perf_counter()
    config_io.check(settings)
    if dtype is not None and dtype not in huggingface.EXPORTED:
        raise ValueError(f"dtype: {dtype!r} is not written; choose one of {', '.join(huggingface.EXPORTED)}")
    folder = convert.fresh(out, "out")
    s = merging.resolved(settings, len(models), base is not None)
    places = [str(place) for place in ([] if base is None else [base]) + list(models)]
    sources = [_mergeable(place) for place in places]
    notes = _check_alike(sources, any_tokenizer)
    with run_directory.removed_if_refused(folder, (BaseException,)):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".runs-", dir=folder) as scratch:
            opened = [_open(source, Path(scratch) / f"{i}.safetensors") for i, source in enumerate(sources)]
            sizes = [o.size for o in opened]
            notes += _write(s, opened, base is not None, folder, dtype, places)
    parts = ["base"] * (base is not None)
    parts += [f"weight {weight:g}" for weight in s.weights] or [""] * len(models)
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Merged(folder, s, notes, list(zip(places, parts, sizes, strict=True)), written, time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------------------- models


def _mergeable(place: str) -> Source:
    if place.endswith(".gguf"):
        raise ValueError(f"{place}: GGUF files aren't merged; make a run directory of it: jaxlm import {place} RUN")
    source = describe(place)
    if source.adapter != config.Adapter():
        raise ValueError(f"{place}: has an adapter; merge it into its model first: jaxlm export {place} MERGED")
    if source.adapted.compressed:
        raise ValueError(f"{place}: is compressed; make it whole first: jaxlm export {place} WHOLE")
    if source.run is not None and "packnet" in source.run.continual.methods:
        raise ValueError(f"{place}: its tasks own weights (packnet), which no merge keeps; merge other models")
    return source


def _check_alike(sources: Sequence[Source], any_tokenizer: bool) -> list[str]:
    """Returns lines on what differs and may. ValueError: a model differs from the first in shape or meaning."""
    first, *others = sources
    notes, form = [], published(first)
    known = form.config
    for other in others:
        theirs = published(other)
        c = theirs.config
        if type(c) is not type(known):
            kinds = f"{c.model_type or type(c).__module__} and {known.model_type or type(known).__module__}"
            raise ValueError(f"models: {other.path} and {first.path} are of different architectures, {kinds}")
        differing = [f.name for f in dataclasses.fields(c) if getattr(c, f.name) != getattr(known, f.name)]
        differing.sort(key=lambda name: name != "vocab")
        for name in differing:
            line = f"{name} is {getattr(c, name)!r} in {other.path} and {getattr(known, name)!r} in {first.path}"
            if name == "vocab":
                raise ValueError(
                    f"models: {line}, so rows of the embeddings stand for different tokens; give both one vocabulary "
                    "first (transformers: model.resize_token_embeddings)"
                )
            if name not in MAY_DIFFER:
                raise ValueError(f"models: {line}; only models of one shape and meaning are merged")
            notes.append(f"note: {line}, which is kept")
        for name in HEADS:
            if (value := theirs.values.get(name)) != (ours := form.values.get(name)):
                line = f"{name} is {value!r} in {other.path} and {ours!r} in {first.path}"
                raise ValueError(f"models: {line}; only models of one shape and meaning are merged")
        if not any_tokenizer and (why := _other_text(first, other)) is not None:
            raise ValueError(
                f"models: the tokenizers of {other.path} and {first.path} differ: {why}; merge models of one "
                "tokenizer, or give `any_tokenizer` if you know that their tokens mean the same"
            )
        if "default" in other.templates and "default" not in first.templates:
            notes.append(f"note: {first.path} has no chat template, so there is none, though {other.path} has one")
    return notes


def _other_text(a: Source, b: Source) -> str | None:
    """Returns how the tokenizers of two models differ; None: they don't, or one model has none."""
    if a.tokens is None or b.tokens is None or a.tokens.fingerprint == b.tokens.fingerprint:
        return None
    sizes = [source.tokens.vocab_size for source in (b, a)]
    if sizes[0] != sizes[1]:
        return f"{sizes[0]:,} and {sizes[1]:,} tokens"
    for i in range(sizes[0]):
        if (theirs := b.tokens.piece(i)) != (ours := a.tokens.piece(i)):
            return f"token {i} is {theirs!r} and {ours!r}"
    text = gguf_tokenizer.different_text(a.tokens, b.tokens)
    return None if text is None else f"they read {text!r} differently"


def published(source: Source) -> Export:
    """Returns how published files have the model."""
    return convert.published_form(source, source.config, specs_of(source))


def _open(source: Source, scratch: Path) -> Opened:
    """Opens the tensors of a model. Those of a run are written to the file `scratch` first, weight by weight: its
    checkpoint holds all layers in one piece."""
    form = published(source)
    table = weight_names.tensors(form.names, form.specs)
    if source.run is None:
        files = huggingface.open_for(source.path, table, source.family)
        ignore: Sequence[str] = ()
        if source.head is not None:
            _, ignore = task_heads.names_in(source.family, source.config, source.head)
        names = huggingface.match_names(files, table, source.family, form.names, form.specs, ignore)
        return Opened(source, form, table, files, names)
    dtypes = tree.flatten(form.specs, is_spec)
    shapes = {name: (np.dtype(dtypes[t.parts[0].path].dtype), t.shape) for name, t in table.items()}
    files = safetensors.allocate(scratch, shapes)
    held: dict[str, list[Any]] = {}
    for name, tensor in table.items():
        for part, view in zip(tensor.parts, tensor.views, strict=True):
            held.setdefault(part.path, []).append((name, part, view))
    for path, weight in read_each(source, specs_of(source)):
        numbers = np.asarray(weight)
        for name, part, view in held.get(path, ()):
            room = safetensors.place(files, name).reshape(view.shape)
            room[view.index].transpose(view.order)[...] = numbers[part.index]
            del room  # with the pages of the file
        del weight, numbers  # before the next one is read
    return Opened(source, form, table, files, {name: name for name in table})


# ------------------------------------------------------------------------------------------------------------- tensors


def _write(
    s: Settings, opened: Sequence[Opened], has_base: bool, folder: Path, dtype: str | None, places: Sequence[str]
) -> list[str]:
    """Writes the merged model; returns lines on what was written."""
    first = opened[0]
    kinds = {name: huggingface.export_dtype(dtype or str(first.entry(name).dtype), name) for name in first.table}
    tensors = {name: (kinds[name], tensor.shape) for name, tensor in first.table.items()}
    base, models = (places[0], list(places[1:])) if has_base else (None, list(places))
    named = {"base": base and model_card.name_of(base), "models": [model_card.name_of(place) for place in models]}
    about = named | dataclasses.asdict(s)
    (folder / "merge.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    write = partial(
        huggingface.write, folder, first.source.family, first.form.values, tensors,
        lambda name: _merged(s, opened, has_base, name, *tensors[name]), about=_about(s, base, models, opened),
        generates=first.source.family.generates and convert.task_head(first.source) is None,
    )  # fmt: skip
    notes = convert.with_sidecars(first.source, folder, write, first.form.left_out)
    return [*notes, "merge.json: the models and the settings"]


def _merged(
    s: Settings, opened: Sequence[Opened], has_base: bool, name: str, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    """Returns a merged tensor."""
    size = math.prod(shape)
    out = np.empty(size, dtype)
    tensor = merging.Tensor(name, size, partial(_stretches, opened, has_base, name, size))
    at = 0
    for numbers in merging.merge(s, tensor):
        with np.errstate(over="ignore"):
            part = numbers.astype(np.float32).astype(dtype)
        if not np.isfinite(part).all():
            raise ValueError(f"{name}: holds numbers beyond the range of {dtype}; give bfloat16 or float32 as `dtype`")
        out[at : at + len(part)] = part
        at += len(part)
    assert at == size, f"{name}: {at} of {size} numbers"
    return out.reshape(shape)


def _stretches(opened: Sequence[Opened], has_base: bool, name: str, size: int) -> Iterator[Stretch]:
    """Yields the stretches of a tensor of all models. ValueError: a model's numbers aren't all finite."""
    length = max(1, HELD // len(opened))
    for start in range(0, size, length):
        end = min(start + length, size)
        rows = np.empty((len(opened), end - start), np.float32)
        for row, model in zip(rows, opened, strict=True):
            with np.errstate(over="ignore"):
                row[:] = model.files.read(model.names[name], [slice(start, end)], (size,))
            if not np.isfinite(row).all():
                file = model.entry(name).file if model.source.run is None else model.source.path
                raise ValueError(f"{file}: {name} holds NaN or infinity; a merged model would too, so mend or leave it")
        yield Stretch(start, rows[0] if has_base else None, rows[has_base:])


def _about(s: Settings, base: str | None, models: Sequence[str], opened: Sequence[Opened]) -> model_card.About:
    """Returns what was merged and how, for the model's card. No path of this machine is in it."""
    settings = [f"{name} {getattr(s, name)}" for name in merging.METHODS[s.method].settings if name != "weights"]
    lines = [f"Merged with the method {s.method}" + f" ({', '.join(settings)})" * bool(settings) + ":", ""]
    parts = ([] if base is None else ["base"]) + ([f"weight {weight:g}" for weight in s.weights] or [""] * len(models))
    licences = [o.source.licence for o in opened]
    places = [*([] if base is None else [base]), *models]
    for place, part, licence in zip(places, parts, licences, strict=True):
        said = [model_card.name_of(place), part, f"licence {licence}" if licence else "no licence stated"]
        lines.append(f"- {', '.join(filter(None, said))}")
    lines += ["", "The licences of all of them hold for it."]
    one = licences[0] if len(set(licences)) == 1 else ""
    return model_card.About("\n".join(lines), model_card.name_of(places[0]), one)
