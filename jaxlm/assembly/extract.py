"""Makes an adapter of low rank, in Hugging Face PEFT's files, of what a training changed in a model: the singular
vectors of each matrix's difference, by themselves or as recorded inputs see them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly import calibrated_program, convert, run_directory, unit_scores
from jaxlm.assembly.open_model import Place, Pretrained, open_model
from jaxlm.core import config, config_io, spec, tree
from jaxlm.core.extraction import Extraction
from jaxlm.formats import peft
from jaxlm.runtime import mesh
from jaxlm.weights.adapters.adapted import Adapted
from jaxlm.weights.adapters.lora import Lora
from jaxlm.weights.compress import low_rank
from jaxlm.weights.matrices import Matrix

RECORD = "extracted.json"


def extract(
    tuned: Place, base: Place, target: str | Path, settings: Extraction, calibration: Sequence[str] = ()
) -> tuple[list[str], dict[str, Any]]:
    """Writes a directory of PEFT's with a LoRA that makes of `base` what is nearest to `tuned`; returns lines on it and
    the record that it holds.

    `calibration`: sources of text on whose inputs, as the base has them, the adapter is to be nearest; empty: the
    weights alone say it. ValueError: the models are of different shapes or alike, the rank is too large, or `target`
    is there already; nothing is left then.
    """
    folder = convert.fresh(target)
    config_io.check(settings, "")
    with run_directory.removed_if_refused(folder, (BaseException,)):
        new, old = open_model(tuned), open_model(base)
        changes, others = _changes(new, old, settings)
        matrices = Adapted(_lora(settings, changes), old.model.family, old.model.config).targets
        hessians = _hessians(old, settings, calibration, matrices)
        adapter, missed = _factors(matrices, changes, settings.rank, hessians)
        adapted = Adapted(_lora(settings, matrices), old.model.family, old.model.config)
        folder.mkdir(parents=True, exist_ok=True)
        notes = peft.save(folder, adapted, adapter, str(old.source.path))
        record: dict[str, Any] = dict(tuned=new.source.path.name, base=old.source.path.name, rank=settings.rank)
        record |= dict(whitened=bool(calibration), missed=missed, left_out=others)
        record |= _compared(new, old, folder)
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        if others:
            notes.append(f"left out, for LoRA has no part in them, though they changed: {', '.join(others)}")
        return [*notes, f"{RECORD}: how near it comes, by matrices and by logits"], record


def _lora(settings: Extraction, paths: Mapping[str, Any]) -> Lora:
    """Returns the settings of an adapter with a scale of one."""
    return Lora(rank=settings.rank, alpha=float(settings.rank), targets=tuple(f"^{path}$" for path in paths))


def _changes(new: Pretrained, old: Pretrained, s: Extraction) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the differences of the targets that changed, and the paths of other weights that changed too.

    ValueError: the models have other weights, or nothing that an adapter may change differs.
    """
    for p in (new, old):
        if p.source.adapter != config.Adapter():
            raise ValueError(f"{p.source.path}: has an adapter; merge it first: jaxlm export {p.source.path} MERGED")
        if p.source.adapted.compressed:
            raise ValueError(f"{p.source.path}: is compressed; make it whole first: jaxlm export {p.source.path} WHOLE")
    flat, specs = tree.flatten(new.params), tree.flatten(old.model.specs, spec.is_spec)
    first = tree.flatten(old.params)
    for path in sorted(first.keys() & flat.keys()):
        if first[path].shape != flat[path].shape:
            a, b = list(flat[path].shape), list(first[path].shape)
            raise ValueError(f"base: {path} is {b}, and {a} in {new.source.path.name}; give the model that it began as")
    if type(new.model.config) is not type(old.model.config) or specs.keys() - flat.keys():
        raise ValueError(f"base: {old.source.path.name} and {new.source.path.name} are of different architectures")
    targets = Adapted(Lora(targets=s.targets), old.model.family, old.model.config).targets
    found, others = {}, []
    for path in specs:
        difference = np.asarray(flat[path], np.float32) - np.asarray(first[path], np.float32)
        if not np.isfinite(difference).all():
            raise ValueError(f"{path}: holds NaN or infinity; check both models")
        if path in targets and difference.any():
            found[path] = difference
        elif difference.any():
            others.append(path)
    if not found:
        raise ValueError(f"targets: {new.source.path.name} differs from the base in none of them; name others")
    return found, others


def _hessians(
    old: Pretrained, s: Extraction, sources: Sequence[str], matrices: Mapping[str, Matrix]
) -> dict[str, np.ndarray]:
    if not sources:
        return {}
    calibrated = calibrated_program.of(old, sources, s.batches)
    found, _ = unit_scores.recorded(calibrated, jax.device_get(old.params), matrices, hessian=True)
    return {path: np.asarray(record.hessian) for path, record in found.items()}


def _factors(
    matrices: Mapping[str, Matrix], changes: Mapping[str, np.ndarray], rank: int, hessians: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], float]:
    """Returns the adapter's weights, and the mean share of the squares of the matrices' products that it misses."""
    adapter: dict[str, Any] = {}
    missed = []
    for path in calibrated_program.shown(list(changes), "factoring"):
        m, w = matrices[path], changes[path]
        flat = jnp.asarray(w.reshape(m.layers, int(np.prod(m.in_shape)), -1))
        try:
            if hessians:
                made = jax.vmap(lambda w, h: low_rank.factored(w, rank, h))(flat, jnp.asarray(hessians[path]))
            else:
                made = jax.vmap(lambda w: low_rank.factored(w, rank))(flat)
        except ValueError as error:
            raise ValueError(f"{error} ({path})") from None
        pair = dict(a=made.a.reshape(m.layers, *m.in_shape, rank), b=made.b.reshape(m.layers, rank, *m.out_shape))
        adapter = tree.put(adapter, path, pair)
        missed.append(float(made.error.sum() / jnp.maximum(made.whole.sum(), 1e-30)))
    return adapter, float(np.mean(missed))


def _compared(new: Pretrained, old: Pretrained, folder: Path) -> dict[str, float]:
    """Returns how far logits of random tokens are from the trained model's: those of the base, and with the adapter."""
    if not new.model.config.head or convert.task_head(new.source) is not None:
        return {}  # without a head of the vocabulary there is nothing that both have
    wanted = convert.logits(new)
    files = peft.open_files(folder)
    adapted = Adapted(peft.describe(files, old.model.family, old.model.config), old.model.family, old.model.config)
    with mesh.on_mesh(old.mesh):
        loaded = peft.load(files, adapted, old.model.shard.shardings(adapted.specs()["adapter"], old.mesh), old.params)
    with_it = dataclasses.replace(
        old, model=dataclasses.replace(old.model, adapter=adapted), params=old.params | {"adapter": loaded}
    )
    before, after = (convert.compare(wanted, convert.logits(p)) for p in (old, with_it))
    return dict(base_off_by=before["relative_difference"], adapter_off_by=after["relative_difference"])
