"""Hugging Face PEFT's files of an adapter are read and written here: `adapter_config.json` and
`adapter_model.safetensors`.

What a method's files look like is a part of its record (`weights/adapters/peft_format.py`). Of virtual tokens PEFT
keeps the embeddings alone, whatever made them. A setting that would change the result and isn't known here is refused
by its name, and so is a tensor without a place.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.core import config, spec, tree, weight_names
from jaxlm.core.weight_names import Name, Part, Tensor
from jaxlm.formats import multimodal, peft_initial, safetensors
from jaxlm.formats.safetensors import read_json
from jaxlm.nn.family import Family
from jaxlm.weights import matrices
from jaxlm.weights.adapters import METHODS
from jaxlm.weights.adapters.adapted import Adapted
from jaxlm.weights.adapters.method import Method
from jaxlm.weights.adapters.peft_format import Layer, PeftFormat, PeftTensor
from jaxlm.weights.matrices import Matrix

STEM, ROOT = "adapter_model", "base_model.model."
PROMPT = "prompt_embeddings"
COPY = "base_layer.weight"
"""How the copy of the base's own table ends that PEFT keeps beside an adapter on it."""
SHOWN = 4  # names in an error
ROUNDING = 2.0**-7  # of a table that one of both sides keeps in bfloat16
# Settings that say how an adapter was made or where it goes, which its tensors say too.
HARMLESS = re.compile(
    r"peft_type|task_type|peft_version|base_model_name_or_path|revision|inference_mode|auto_mapping|target_modules|"
    r"exclude_modules|feedforward_modules|fan_in_fan_out|layers_to_transform|layers_pattern|init_\w+|\w*_init|"
    r"prompt_tuning_init_text|tokenizer_\w+|rank_pattern|alpha_pattern|r|lora_alpha|use_rslora|use_dora|\w*dropout|"
    r"target_r|tinit|tfinal|deltaT|beta1|beta2|orth_reg_weight|total_step|projection_prng_key|save_projection|d_initial|"
    r"num_\w+|token_dim|encoder_\w+|megatron_core|qalora_group_size|(loftq|eva|corda|lora_ga)_config|runtime_config|"
    r"ensure_weight_tying|low_cpu_mem_usage"
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class Files:
    """An adapter's directory; of its tensors only the headers have been read."""

    folder: Path
    values: dict[str, Any]
    tensors: safetensors.Files
    begun: str = ""
    """What LoRA's matrices began as, where the base has lost it, see `peft_initial`; empty: the base is as it was.
    The adapter is read as what it adds to the base as it was: an update of twice the rank."""

    @property
    def base(self) -> str:
        """The model that it was made for, as the file names it."""
        return str(self.values.get("base_model_name_or_path") or "")

    @property
    def method(self) -> Method[Any]:
        """The method whose files these are."""
        kind = self.values["peft_type"]
        return next(m for m in METHODS.values() if m.peft and kind in m.peft.reads and m.peft.variant(self.values))

    @property
    def format(self) -> PeftFormat[Any]:
        made = self.method.peft
        assert made is not None
        return made


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def open_files(folder: str | Path) -> Files:
    """Opens a directory, and refuses what isn't known to give the same numbers here."""
    folder = Path(folder)
    values = read_json(folder / "adapter_config.json")
    file = f"{folder / 'adapter_config.json'}"
    kind, known = values.get("peft_type"), [name for m in METHODS.values() if m.peft for name in m.peft.reads]
    if kind not in known:
        raise ValueError(f"{file}: peft_type {kind!r} is not read; known: {', '.join(known)}")
    usual = {"bias": "none", "num_transformer_submodules": 1}
    for name, value in values.items():
        if value and value != usual.get(name) and (name in usual or not HARMLESS.fullmatch(name)):
            raise ValueError(f"{file}: {name} {value!r} is not read; merge the adapter where it was made")
    begun = peft_initial.kind(values.get("init_lora_weights"), file)
    return Files(folder, values, safetensors.open_files(folder, STEM), begun)


def describe(files: Files, family: Family, c: Any) -> config.Adapter:
    """Returns the settings under which its tensors have a place; what has none, or another shape, is named."""
    if files.method.virtual_tokens is not None:
        tokens, width = _entry(files, PROMPT).shape
        if width != c.width:
            raise ValueError(f"{_file(files)}: {PROMPT} is {tokens} x {width}, and the base model is {c.width} wide")
        _refuse_others(files, {PROMPT})
        return files.format.config(files.values, (), tokens)
    placed = _placed(files, family, c)
    targets = tuple(f"^{path}$" for path in sorted({p.path for t in placed.values() for p in t.parts}))
    rank = max((files.tensors.entries[name].shape[0] for name, t in placed.items() if t.key.kind == "a"), default=0)
    if files.format.shared:
        rank = _entry(files, files.format.shared["a"], files.format.shared_remedy).shape[0]
    return files.format.config(files.values, targets, 2 * rank if files.begun else rank)


class Placed(NamedTuple):
    """A tensor of the file and the weights of the adapter that it holds."""

    name: str
    """The weight's name here, such as `a`."""
    key: PeftTensor
    module: Tensor
    """The module's own matrix in the base's files."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Returns the parts of the base's weights: one layer of each that share the module."""
        return self.module.parts

    @property
    def entry(self) -> Name:
        """Returns the entry of the module's matrix."""
        return self.module.entry


def _modules(matrices: Mapping[str, Matrix]) -> Iterator[tuple[str, Tensor]]:
    """Yields (module, its own tensor in the base's files) of every matrix."""
    specs: dict[str, Any] = {}
    for path, m in matrices.items():
        specs = tree.put(specs, path, m.spec)
    for file, t in weight_names.tensors({path: m.name for path, m in matrices.items()}, specs).items():
        yield file.removesuffix(".weight"), t


def _short(name: str, family: Family) -> str:
    """Returns a name without what names of a bare model lack; of a multimodal model's that of its text model."""
    name = multimodal.text_name(name)
    for prefix in family.FILES.prefixes:
        name = name.removeprefix(prefix)
    return name


def _candidates(family: Family, c: Any) -> dict[str, Matrix]:
    """Returns the matrices that PEFT's files can have adapters of: those of the layers but experts, the table of
    embeddings and the head."""
    every = matrices.matrices(family, c) | matrices.tables(family, c)
    return {path: m for path, m in every.items() if not m.experts}


def _tensors_of(form: PeftFormat[Any], m: Matrix) -> Mapping[str, PeftTensor]:
    return form.on_table if m.spec.role == "table" and m.path == matrices.TABLE else form.tensors


def _placed(files: Files, family: Family, c: Any) -> dict[str, Placed]:
    """Returns every tensor of the file with its place."""
    stored = {_short(name.removeprefix(ROOT), family): name for name in files.tensors.entries}
    out: dict[str, Placed] = {}
    candidates = _candidates(family, c)
    for module, t in _modules(candidates):
        for ours, key in _tensors_of(files.format, candidates[t.parts[0].path]).items():
            if (name := stored.get(f"{_short(module, family)}.{key.ending}")) is not None:
                out[name] = Placed(ours, key, t)
    _refuse_others(files, {*out, *files.format.shared.values(), *_copies(files, family, c)})
    if not out:
        raise ValueError(f"{_file(files)}: holds nothing of an adapter; save it anew")
    return out


def _copies(files: Files, family: Family, c: Any) -> dict[str, str]:
    """Returns the tensors of the file that are copies of the base's table and head, with the paths of these."""
    stored = {_short(name.removeprefix(ROOT), family): name for name in files.tensors.entries}
    found = {path: stored.get(f"{_short(module, family)}.{COPY}")
             for module, t in _modules(matrices.tables(family, c)) for path in [t.parts[0].path]}  # fmt: skip
    return {name: path for path, name in found.items() if name}


def _refuse_others(files: Files, known: set[str]) -> None:
    if others := sorted(files.tensors.entries.keys() - known):
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise ValueError(
            f"{_file(files)}: {', '.join(others[:SHOWN])}{more} fit{'s' * (len(others) == 1)} no weight of the base "
            f"model; check that the adapter was made for it (it names {files.base or 'none'})"
        )


def _entry(files: Files, name: str, remedy: str = "") -> safetensors.Entry:
    if name not in files.tensors.entries:
        raise ValueError(f"{_file(files)}: lacks {name}{remedy}")
    return files.tensors.entries[name]


def _file(files: Files) -> Path:
    return next((entry.file for entry in files.tensors.entries.values()), files.folder)


def load(files: Files, adapted: Adapted, shardings: Any, base: Any) -> Any:
    """Returns the adapter's weights, each device's share onto it, where `shardings`, a tree as
    `adapted.specs()["adapter"]`, says. `base`: the weights of the base model."""
    specs, where = adapted.specs()["adapter"], tree.flatten(shardings)
    if adapted.method.virtual_tokens is not None:
        arrays = {"prompt/rows": np.asarray(files.tensors.read(PROMPT), np.float32)}
    else:
        arrays = _arrays(files, adapted, tree.flatten(specs, spec.is_spec), base)

    def put(path: str, s: spec.Spec) -> jax.Array:
        x = arrays[path].astype(s.dtype)
        return jax.make_array_from_callback(x.shape, where[path], lambda index: x[index])

    return tree.map_named(put, specs)


def _arrays(files: Files, adapted: Adapted, specs: Mapping[str, spec.Spec], base: Any) -> dict[str, np.ndarray]:
    # A module that the file leaves out in some layer does nothing there, nor do directions that it lacks.
    form = files.format
    out = {path: np.full(s.shape, form.left_out, np.float32) for path, s in specs.items()}
    missing: set[tuple[Any, ...]] = {
        (path, layer) for path, s in specs.items() for layer in range(s.shape[0])
        if path.rpartition("/")[2] in form.required
    }  # fmt: skip
    every, candidates = _placed(files, adapted.family, adapted.config), _candidates(adapted.family, adapted.config)
    for name, path in _copies(files, adapted.family, adapted.config).items():
        _check_copy(files, name, base[matrices.stored_at(path, base)])
    first = _first_values(files, adapted, every, base) if files.begun else {}
    for name, placed in every.items():
        x = np.asarray(files.tensors.read(name), np.float32)
        rank = x.shape[0] if placed.key.kind in ("a", "rank") else x.shape[-1]
        x = np.concatenate([x, first[name]], 0 if placed.key.kind == "a" else 1) if name in first else x
        t = _tensor(placed, candidates, rank * 2 if name in first else rank)
        if x.size != math.prod(t.shape) or (x.ndim == 2 and x.shape != t.shape and not placed.key.column):
            due = f"{list(x.shape)}, and {placed.parts[0].path} of the base model makes it {list(t.shape)}"
            raise ValueError(f"{_file(files)}: {name} is {due}; check that the adapter was made for it")
        values = t.split(x)
        for part, value in zip(placed.parts, values * len(placed.parts) if len(values) == 1 else values, strict=True):
            if placed.name == "b" and form.b_factor is not None:
                module = name.removeprefix(ROOT).rpartition(".lora_")[0]
                value = value * form.b_factor(adapted.c, files.values, module, rank)
            path = f"{part.path}/{placed.name}"
            out[path][part.index][tuple(slice(n) for n in value.shape)] = value
            missing.discard((path, *part.index))
    if missing:
        path, layer = min(missing)
        target, _, name = path.rpartition("/")
        raise ValueError(f"{_file(files)}: lacks {form.tensors[name].ending} of {target} in layer {layer}")
    for ours, theirs in form.shared.items():
        path, x = f"shared/{ours}", np.asarray(files.tensors.read(theirs), np.float32).T
        if any(have < need for have, need in zip(x.shape, out[path].shape, strict=True)):
            need = out[path].shape[::-1]
            raise ValueError(f"{_file(files)}: {theirs} is {list(x.shape[::-1])}, too small for {list(need)}")
        out[path] = np.ascontiguousarray(x[tuple(slice(n) for n in out[path].shape)])
    return out


def _check_copy(files: Files, name: str, table: Any) -> None:
    """Refuses a copy of the base's table that is another one: PEFT would put it in the base's place."""
    x, w = np.asarray(files.tensors.read(name), np.float32), peft_initial.whole(table, name, "such")
    if x.shape != w.shape or not np.allclose(x, w, rtol=ROUNDING, atol=ROUNDING * np.abs(w).mean()):
        raise ValueError(
            f"{_file(files)}: {name} is another table than the base model's; merge the adapter where it was made"
        )


def _whole(base: Any, path: str, name: str) -> np.ndarray:
    w = base[matrices.stored_at(path, base)] if path in (matrices.TABLE, matrices.HEAD) else tree.at(base, path)
    return peft_initial.whole(w, path, name)


def _first_values(
    files: Files, adapted: Adapted, every: Mapping[str, Placed], base: Any
) -> dict[str, np.ndarray]:  # fmt: skip
    """Returns what each matrix of the file began as, by its name, such that it counts against what it is now."""
    c: Any = adapted.c
    form, out = files.format, {}
    for name, placed in every.items():
        if placed.key.kind != "a":
            continue
        if placed.key in form.on_table.values():
            raise ValueError(
                f"{_file(files)}: {name}: {files.begun} of a table is not read; merge it where it was made"
            )
        t, rank = placed.module, files.tensors.entries[name].shape[0]
        w = t.join([_whole(base, p.path, files.begun)[p.index] for p in t.parts])
        w = w if t.entry.order == "out_in" else w.T
        module = name.removeprefix(ROOT).rpartition(".lora_")[0]
        factor = 1.0 if form.b_factor is None else form.b_factor(adapted.c, files.values, module, rank)
        try:
            a, b = peft_initial.COMPUTED[files.begun](w, rank, factor * c.scale)
        except ValueError as error:
            raise ValueError(f"{_file(files)}: {name}: {files.begun}: {error}; merge it where it was made") from None
        stem = name.removesuffix(form.tensors["a"].ending)
        out[name], out[stem + form.tensors["b"].ending] = a, -b
    return out


def _tensor(placed: Placed, matrices: Mapping[str, Matrix], rank: int) -> Tensor:
    """Returns how the file's tensor is cut into our weights; what modules that are one in the file share is a single
    part."""
    members, key = [matrices[p.path] for p in placed.parts], placed.key
    first, vector = members[0], partial(Name, key.ending, flat=True, axis=placed.entry.axis)
    if key.kind == "a":
        part = Part(first.path, (), (*first.in_shape, rank))
        return Tensor((rank, math.prod(first.in_shape)), (part,), Name(key.ending, ins=first.ins))
    if key.kind == "rank":
        return Tensor((rank,), (Part(first.path, (), (rank,)),), vector())
    if key.scales_inputs(first):
        return Tensor((math.prod(first.in_shape),), (Part(first.path, (), first.in_shape),), vector())
    outs = sum(math.prod(m.out_shape) for m in members)
    if key.kind == "b":
        parts = tuple(Part(m.path, (), (rank, *m.out_shape)) for m in members)
        return Tensor((outs, rank), parts, Name(key.ending, ins=1, axis=placed.entry.axis))
    return Tensor((outs,), tuple(Part(m.path, (), m.out_shape) for m in members), vector())


# ------------------------------------------------------------------------------------------------------------- writing


def save(folder: str | Path, adapted: Adapted, weights: Any, base: str) -> list[str]:
    """Writes an adapter's weights for `base`, the model that PEFT will put it on; returns a line on each file."""
    folder, form = Path(folder), adapted.method.peft
    if form is None:
        raise ValueError(f"format peft: PEFT has no files for {adapted.name}; export the merged model as hf")
    values, tensors = _prompt(adapted, form, weights) or _layers(adapted, form, weights)
    task = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM"}.get(adapted.family.kind)
    if adapted.num_virtual_tokens and task is None:
        task = "FEATURE_EXTRACTION"
    values |= dict(base_model_name_or_path=base, task_type=task, inference_mode=True, modules_to_save=None)
    shapes = {name: (np.dtype(np.float32), x.shape) for name, x in tensors.items()}
    safetensors.write(folder, shapes, lambda name: np.ascontiguousarray(tensors[name], np.float32), stem=STEM)
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    count = sum(x.size for x in tensors.values())
    return [f"{STEM}.safetensors: {len(tensors)} tensors, {count:,} parameters as float32",
            f"adapter_config.json: {values['peft_type']} for {base}"]  # fmt: skip


def _prompt(
    adapted: Adapted, form: PeftFormat[Any], weights: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Returns settings and tensors of virtual tokens; None: the method has none."""
    if adapted.method.virtual_tokens is None:
        return None
    rows = np.asarray(adapted.method.virtual_tokens.rows(weights["prompt"]), np.float32)
    return form.settings(adapted.c, rows.shape[0], {}) | dict(token_dim=rows.shape[1]), {PROMPT: rows}


def _layers(
    adapted: Adapted, form: PeftFormat[Any], weights: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:  # fmt: skip
    """Returns settings and tensors of an adapter of the layers' matrices."""
    flat = {path: np.asarray(x, np.float32) for path, x in tree.flatten(weights).items()}
    candidates = _candidates(adapted.family, adapted.config)
    tensors: dict[str, np.ndarray] = {}
    chosen: list[str] = []
    other_ranks: dict[str, int] = {}
    rank = 0
    targets = adapted.targets | adapted.tables
    for module, own in _modules(candidates):
        parts = own.parts
        if not any(p.path in targets for p in parts):
            continue
        chosen.append(module)
        layers = {p.path: _layer(flat, form, p) for p in parts if p.path in targets}
        if len(parts) > 1:
            if form.fused is None:
                raise ValueError(
                    f"format peft: {', '.join(p.path for p in parts)} are one module in published files, which PEFT "
                    f"has no {adapted.name} for; export the merged model as hf"
                )
            layers, other_ranks[module] = form.fused([candidates[p.path] for p in parts], layers)
        for ours, key in _tensors_of(form, candidates[parts[0].path]).items():
            arrays = [layers[p.path][ours] for p in parts if ours in layers.get(p.path, {})]
            if not arrays:
                continue
            n = arrays[0].shape[-1] if key.kind in ("a", "rank") else arrays[0].shape[0]
            rank = n if key.kind == "a" and len(parts) == 1 else rank
            t = _tensor(Placed(ours, key, own), candidates, n)
            x = t.join(arrays[:1] if len(t.parts) == 1 else arrays)
            column = (1, -1) if key.scales_inputs(candidates[parts[0].path]) else (-1, 1)
            tensors[f"{ROOT}{module}.{key.ending}"] = x.reshape(column) if key.column else x
    values = form.settings(adapted.c, rank, other_ranks) | dict(target_modules=_targets(chosen, adapted))
    values["fan_in_fan_out"] = any(m.name.order == "in_out" for m in targets.values())
    if form.inputs_setting:
        scaled = {p.path for p in candidates.values() if any(k.scales_inputs(p) for k in form.tensors.values())}
        inputs = [m for m, t in _modules(candidates) if m in chosen and t.parts[0].path in scaled]
        values[form.inputs_setting] = _targets(inputs, adapted) if inputs else []
    return values, tensors | {theirs: flat[f"shared/{ours}"].T for ours, theirs in form.shared.items()}


def _layer(flat: Mapping[str, np.ndarray], form: PeftFormat[Any], part: Part) -> Layer:
    """Returns the adapter's weights of one layer as the file has them."""
    prefix = f"{part.path}/"
    return form.on_plain_base(
        {path.removeprefix(prefix): x[part.index] for path, x in flat.items() if path.startswith(prefix)}
    )


def _targets(chosen: list[str], adapted: Adapted) -> list[str] | str:
    """Returns what PEFT finds just these modules by: the ends of their names where those are no others', else an
    expression."""
    every = {n.file.removesuffix(".weight") for n in adapted.family.names(adapted.config).values()}
    every |= {module for module, _ in _modules(adapted.matrices)}
    ends = sorted({module.rpartition(".")[2] for module in chosen})
    if {m for m in every if m.rpartition(".")[2] in ends and "{" not in m} <= set(chosen):
        return ends
    patterns = sorted({re.sub(r"\d+", r"\\d+", re.escape(module)) for module in chosen})
    return f"(.*\\.)?({'|'.join(patterns)})"
