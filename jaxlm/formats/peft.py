"""Hugging Face PEFT's files of an adapter in and out: `adapter_config.json` and `adapter_model.safetensors`.

Read are LoRA (with rsLoRA, DoRA, and ranks and alphas of their own for some modules), AdaLoRA, IA³, VeRA, prompt tuning
and P-tuning, of which PEFT keeps the virtual tokens alone. A setting that would change the result and isn't known here
is refused by its name, and so is a tensor without a place.
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

from jaxlm.core import config, errors, spec, tree, weight_names
from jaxlm.core.weight_names import Name, Part, Tensor
from jaxlm.formats import safetensors
from jaxlm.formats.safetensors import read_json
from jaxlm.nn.family import Family
from jaxlm.weights import sites
from jaxlm.weights.adapters import ia3, low_rank, prompt
from jaxlm.weights.adapters.adapted import Adapted
from jaxlm.weights.sites import Site

STEM, ROOT = "adapter_model", "base_model.model."
SHOWN = 4  # names in an error


class Key(NamedTuple):
    """One of an adapter's weights in the file: what is appended to its module's name, and how it lies there."""

    ending: str
    kind: str
    """a: [R, inputs]; b: [outputs, R]; rank, outs: one number of each; scale: of outputs, or some modules' inputs."""
    column: bool = False
    """The file has a second dimension of one."""


LORA = dict(a=Key("lora_A.weight", "a"), b=Key("lora_B.weight", "b"), m=Key("lora_magnitude_vector", "outs"))
KEYS: dict[str, dict[str, Key]] = {
    **dict.fromkeys(("lora", "dora", "pissa"), LORA),
    "adalora": dict(a=Key("lora_A", "a"), b=Key("lora_B", "b"), e=Key("lora_E", "rank", True)),
    "vera": dict(e=Key("vera_lambda_d", "rank"), g=Key("vera_lambda_b", "outs")),
    "ia3": dict(by=Key("ia3_l", "scale", True)),
}
SHARED = {"a": "base_model.vera_A", "b": "base_model.vera_B"}
PROMPT = "prompt_embeddings"
TYPES = {"LORA": "lora", "ADALORA": "adalora", "IA3": "ia3", "VERA": "vera",
         "PROMPT_TUNING": "prompt", "P_TUNING": "prompt"}  # fmt: skip
# Settings that say how an adapter was made or where it goes, which its tensors say too.
TOLD = re.compile(
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

    @property
    def base(self) -> str:
        """The model that it was made for, as the file names it."""
        return str(self.values.get("base_model_name_or_path") or "")

    @property
    def method(self) -> Any:
        return "dora" if self.values.get("use_dora") else TYPES[self.values["peft_type"]]


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def open_files(folder: str | Path) -> Files:
    """Refuses what isn't known to give the same numbers here."""
    folder = Path(folder)
    values = read_json(folder / "adapter_config.json")
    file = f"{folder / 'adapter_config.json'}"
    kind = values.get("peft_type")
    if kind not in TYPES:
        raise ValueError(f"{file}: peft_type {kind!r} is not read{errors.nearest(str(kind), TYPES)}")
    usual = {"bias": "none", "num_transformer_submodules": 1}
    for name, value in values.items():
        if value and value != usual.get(name) and (name in usual or not TOLD.fullmatch(name)):
            raise ValueError(f"{file}: {name} {value!r} is not read; merge the adapter where it was made")
    return Files(folder, values, safetensors.open_files(folder, STEM))


def describe(files: Files, family: Family, c: Any) -> config.Adapter:
    """The settings under which its tensors have a place; what has none, or another shape, is named."""
    v, method = files.values, files.method
    if method == "prompt":
        tokens, width = _entry(files, PROMPT).shape
        if width != c.width:
            raise ValueError(f"{_file(files)}: {PROMPT} is {tokens} x {width}, and the base model is {c.width} wide")
        _no_others(files, {PROMPT})
        return config.Adapter("prompt", tokens=tokens)
    found = _found(files, family, c)
    targets = tuple(f"^{path}$" for path in sorted({p.path for f in found.values() for p in f.parts}))
    rank = max((files.tensors.entries[name].shape[0] for name, f in found.items() if f.key.kind == "a"), default=0)
    if method == "ia3":
        return config.Adapter(method, targets=targets)
    if method == "vera":
        rank = _entry(files, SHARED["a"], "; save it with save_projection=True").shape[0]
        return config.Adapter(method, targets=targets, rank=rank, dropout=float(v.get("vera_dropout", 0)))
    adapter = config.Adapter(method, targets=targets, rank=rank, dropout=float(v.get("lora_dropout", 0)))
    if method == "adalora":  # its scale is that of the rank it began with
        return dataclasses.replace(
            adapter, rank=int(v["init_r"]), alpha=float(v["lora_alpha"]), target_rank=int(v["target_r"]),
            orthogonal=float(v["orth_reg_weight"]),
        )  # fmt: skip
    grown = rank / int(v["r"])
    stabilized = bool(v.get("use_rslora"))
    alpha = float(v["lora_alpha"]) * (math.sqrt(grown) if stabilized else grown)
    return dataclasses.replace(adapter, alpha=alpha, rank_stabilized=stabilized)


class Found(NamedTuple):
    """A tensor of the file and the weights of the adapter that it holds."""

    name: str
    """Ours, such as `a`."""
    key: Key
    parts: tuple[Part, ...]
    """Of the base's weights: one layer of each that share the module."""
    entry: Name
    """Of the module's matrix."""


def _modules(every: Mapping[str, Site]) -> Iterator[tuple[str, tuple[Part, ...], Name]]:
    """(module, its parts of our weights, its entry) of every matrix."""
    specs: dict[str, Any] = {}
    for path, s in every.items():
        specs = tree.put(specs, path, s.spec)
    for file, t in weight_names.tensors({path: s.name for path, s in every.items()}, specs).items():
        yield file.removesuffix(".weight"), t.parts, t.entry


def _short(name: str, family: Family) -> str:
    """Without what names of a bare model lack."""
    for prefix in family.FILES.prefixes:
        name = name.removeprefix(prefix)
    return name


def _found(files: Files, family: Family, c: Any) -> dict[str, Found]:
    """Every tensor of the file with its place."""
    there = {_short(name.removeprefix(ROOT), family): name for name in files.tensors.entries}
    out: dict[str, Found] = {}
    every = {path: s for path, s in sites.matrices(family, c).items() if not s.experts}
    for module, parts, entry in _modules(every):
        for ours, key in KEYS[files.method].items():
            if (name := there.get(f"{_short(module, family)}.{key.ending}")) is not None:
                out[name] = Found(ours, key, parts, entry)
    _no_others(files, {*out, *(SHARED.values() if files.method == "vera" else ())})
    if not out:
        raise ValueError(f"{_file(files)}: holds nothing of an adapter; save it anew")
    return out


def _no_others(files: Files, known: set[str]) -> None:
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


def load(files: Files, adapted: Adapted, homes: Any) -> Any:
    """The adapter's weights, each device's share onto it. `homes`: where they rest, as `adapted.specs()["adapter"]`."""
    specs, where = adapted.specs()["adapter"], tree.flatten(homes)
    if adapted.c.method == "prompt":
        arrays = {"prompt/rows": np.asarray(files.tensors.read(PROMPT), np.float32)}
    else:
        arrays = _arrays(files, adapted, tree.flatten(specs, spec.is_spec))

    def put(path: str, s: spec.Spec) -> jax.Array:
        x = arrays[path].astype(s.dtype)
        return jax.make_array_from_callback(x.shape, where[path], lambda index: x[index])

    return tree.map_named(put, specs)


def _arrays(files: Files, adapted: Adapted, specs: Mapping[str, spec.Spec]) -> dict[str, np.ndarray]:
    # A module that the file leaves out in some layer does nothing there, nor do directions that it lacks.
    out = {path: np.full(s.shape, float(adapted.c.method == "ia3"), np.float32) for path, s in specs.items()}
    left_out = {(path, layer) for path, s in specs.items() for layer in range(s.shape[0]) if path.endswith("/m")}
    for name, f in _found(files, adapted.family, adapted.config).items():
        x = np.asarray(files.tensors.read(name), np.float32)
        rank = x.shape[0] if f.key.kind in ("a", "rank") else x.shape[-1]
        t = _tensor(f, adapted.every, rank)
        if x.size != math.prod(t.shape) or (x.ndim == 2 and x.shape != t.shape and not f.key.column):
            due = f"{list(x.shape)}, and {f.parts[0].path} of the base model makes it {list(t.shape)}"
            raise ValueError(f"{_file(files)}: {name} is {due}; check that the adapter was made for it")
        values = t.split(x)
        for part, value in zip(f.parts, values * len(f.parts) if len(values) == 1 else values, strict=True):
            if f.name == "b" and files.method in ("lora", "dora"):
                value = value * (_scale(files, name, rank) / low_rank.scale(adapted.c))
            path = f"{part.path}/{f.name}"
            out[path][part.index][tuple(slice(n) for n in value.shape)] = value
            left_out.discard((path, part.index[0]))
    if left_out:
        path, layer = min(left_out)
        raise ValueError(f"{_file(files)}: lacks {path.removesuffix('/m')} of layer {layer}, which DoRA must have")
    for ours, theirs in SHARED.items() if files.method == "vera" else ():
        path, x = f"shared/{ours}", np.asarray(files.tensors.read(theirs), np.float32).T
        if any(have < need for have, need in zip(x.shape, out[path].shape, strict=True)):
            need = out[path].shape[::-1]
            raise ValueError(f"{_file(files)}: {theirs} is {list(x.shape[::-1])}, too small for {list(need)}")
        out[path] = np.ascontiguousarray(x[tuple(slice(n) for n in out[path].shape)])
    return out


def _scale(files: Files, name: str, rank: int) -> float:
    """What the product of this module's matrices is multiplied by."""
    v, module = files.values, name.removeprefix(ROOT).rpartition(".lora_")[0]
    alphas = dict(v.get("alpha_pattern") or {})
    own = next((a for pattern, a in alphas.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)), v["lora_alpha"])
    return float(own) / (math.sqrt(rank) if v.get("use_rslora") else rank)


def _tensor(f: Found, every: Mapping[str, Site], rank: int) -> Tensor:
    """How the file's tensor is cut into our weights; what modules that are one in the file share is a single part."""
    members = [every[p.path] for p in f.parts]
    first, vector = members[0], partial(Name, f.key.ending, flat=True, axis=f.entry.axis)
    if f.key.kind == "a":
        part = Part(first.path, (), (*first.in_shape, rank))
        return Tensor((rank, math.prod(first.in_shape)), (part,), Name(f.key.ending, ins=first.ins))
    if f.key.kind == "rank":
        return Tensor((rank,), (Part(first.path, (), (rank,)),), vector())
    if f.key.kind == "scale" and ia3.of_inputs(first):
        return Tensor((math.prod(first.in_shape),), (Part(first.path, (), first.in_shape),), vector())
    outs = sum(math.prod(m.out_shape) for m in members)
    if f.key.kind == "b":
        parts = tuple(Part(m.path, (), (rank, *m.out_shape)) for m in members)
        return Tensor((outs, rank), parts, Name(f.key.ending, ins=1, axis=f.entry.axis))
    return Tensor((outs,), tuple(Part(m.path, (), m.out_shape) for m in members), vector())


# ------------------------------------------------------------------------------------------------------------- writing


def save(folder: str | Path, adapted: Adapted, own: Any, base: str) -> list[str]:
    """Write the adapter `own` for `base`, the model that PEFT will put it on; returns a line on each file."""
    folder = Path(folder)
    values, tensors = _prompt(own) if adapted.places else _layers(adapted, own)
    task = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM"}.get(adapted.family.kind)
    if adapted.places and task is None:
        task = "FEATURE_EXTRACTION"
    values |= dict(base_model_name_or_path=base, task_type=task, inference_mode=True, modules_to_save=None)
    shapes = {name: (np.dtype(np.float32), x.shape) for name, x in tensors.items()}
    safetensors.write(folder, shapes, lambda name: np.ascontiguousarray(tensors[name], np.float32), stem=STEM)
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    count = sum(x.size for x in tensors.values())
    return [f"{STEM}.safetensors: {len(tensors)} tensors, {count:,} parameters as float32",
            f"adapter_config.json: {values['peft_type']} for {base}"]  # fmt: skip


def _prompt(own: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What virtual tokens are, whatever made them."""
    rows = np.asarray(prompt.rows(own["prompt"]), np.float32)
    values = dict(peft_type="PROMPT_TUNING", num_virtual_tokens=rows.shape[0], token_dim=rows.shape[1],
                  num_transformer_submodules=1, prompt_tuning_init="RANDOM")  # fmt: skip
    return values, {PROMPT: rows}


def _layers(adapted: Adapted, own: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    c, flat = adapted.c, {path: np.asarray(x, np.float32) for path, x in tree.flatten(own).items()}
    if c.method not in KEYS:
        raise ValueError(f"--format peft: PEFT has no files for {c.method}; export the merged model as hf")
    every = {path: s for path, s in adapted.every.items() if not s.experts}
    tensors: dict[str, np.ndarray] = {}
    chosen: list[str] = []
    wide: dict[str, int] = {}  # modules of another rank than the others
    rank = 0
    for module, parts, entry in _modules(every):
        here = [p for p in parts if p.path in adapted.sites]
        if not here:
            continue
        chosen.append(module)
        layer = {p.path: {n: flat[f"{p.path}/{n}"][p.index] for n in KEYS[c.method] if f"{p.path}/{n}" in flat}
                 for p in here}  # fmt: skip
        if c.method == "pissa":  # what it began as counts with the other sign
            for p in here:
                a0, b0 = (flat[f"{p.path}/{n}"][p.index] for n in ("a0", "b0"))
                layer[p.path] = dict(a=np.concatenate([layer[p.path]["a"], a0], -1),
                                     b=np.concatenate([layer[p.path]["b"], -b0]))  # fmt: skip
        if len(parts) > 1:
            layer, ranks = _together(c.method, parts, layer, every)
            wide[module] = ranks
        for ours, key in KEYS[c.method].items():
            f = Found(ours, key, parts, entry)
            held = [layer[p.path][ours] for p in parts if ours in layer.get(p.path, {})]
            if not held:
                continue
            n = held[0].shape[-1] if key.kind in ("a", "rank") else held[0].shape[0]
            rank = n if key.kind == "a" and len(parts) == 1 else rank
            t = _tensor(f, every, n)
            x = t.join(held[:1] if len(t.parts) == 1 else held)
            inputs = key.kind == "scale" and ia3.of_inputs(every[parts[0].path])
            column = (1, -1) if inputs else (-1, 1)
            tensors[f"{ROOT}{module}.{key.ending}"] = x.reshape(column) if key.column else x
    values = _settings(adapted, rank, wide) | dict(target_modules=_targets(chosen, adapted))
    values["fan_in_fan_out"] = any(s.name.order == "in_out" for s in adapted.sites.values())
    if c.method == "ia3":
        ffn = [m for m, parts, _ in _modules(every) if m in chosen and ia3.of_inputs(every[parts[0].path])]
        values["feedforward_modules"] = _targets(ffn, adapted) if ffn else []
    if c.method == "vera":
        tensors |= {theirs: flat[f"shared/{ours}"].T for ours, theirs in SHARED.items()}
    return values, tensors


def _together(
    method: str, parts: tuple[Part, ...], layer: dict[str, dict[str, np.ndarray]], every: Mapping[str, Site]
) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """Weights that are one module in the file: their a's side by side, each of which meets its own b alone."""
    if method == "ia3":
        return {p.path: layer.get(p.path) or dict(by=np.ones(every[p.path].out_shape, np.float32)) for p in parts}, 0
    if method not in ("lora", "pissa"):
        raise ValueError(
            f"--format peft: {', '.join(p.path for p in parts)} are one module in published files, which PEFT has no "
            f"{method} for; export the merged model as hf"
        )
    sizes = {path: own["a"].shape[-1] for path, own in layer.items()}
    a, at, out = np.concatenate([own["a"] for own in layer.values()], -1), 0, {}
    for p in parts:
        b = np.zeros((a.shape[-1], *every[p.path].out_shape), np.float32)
        if p.path in layer:
            b[at : at + sizes[p.path]] = layer[p.path]["b"]
            at += sizes[p.path]
        out[p.path] = dict(a=a, b=b)
    return out, a.shape[-1]


def _settings(adapted: Adapted, rank: int, wide: Mapping[str, int]) -> dict[str, Any]:
    c = adapted.c
    if c.method == "ia3":
        return dict(peft_type="IA3")
    if c.method == "vera":
        return dict(peft_type="VERA", r=c.rank, vera_dropout=c.dropout, save_projection=True, projection_prng_key=0)
    if c.method == "adalora":
        return dict(
            peft_type="ADALORA", init_r=c.rank, target_r=c.target_rank, lora_alpha=c.alpha, total_step=1,
            lora_dropout=c.dropout, orth_reg_weight=c.orthogonal, rank_pattern=None, bias="none",
        )  # fmt: skip
    rank = rank or c.rank

    def alpha(n: int) -> float:
        """With which a module of rank `n` has the scale that ours have."""
        return low_rank.scale(c) * (math.sqrt(n) if c.rank_stabilized else n)

    ranks = {re.escape(module): n for module, n in wide.items() if n}
    return dict(
        peft_type="LORA", r=rank, lora_alpha=alpha(rank), lora_dropout=c.dropout, use_rslora=c.rank_stabilized,
        use_dora=c.method == "dora", bias="none", rank_pattern=ranks,
        alpha_pattern={module: alpha(n) for module, n in ranks.items()},
    )  # fmt: skip


def _targets(chosen: list[str], adapted: Adapted) -> list[str] | str:
    """For PEFT to find just these modules: the ends of their names where those are no others', else an expression."""
    every = {n.file.removesuffix(".weight") for n in adapted.family.names(adapted.config).values()}
    every |= {module for module, _, _ in _modules(adapted.every)}
    ends = sorted({module.rpartition(".")[2] for module in chosen})
    if {m for m in every if m.rpartition(".")[2] in ends and "{" not in m} <= set(chosen):
        return ends
    patterns = sorted({re.sub(r"\d+", r"\\d+", re.escape(module)) for module in chosen})
    return f"(.*\\.)?({'|'.join(patterns)})"
