"""Writes the run directory of a model that was made of another one of other sizes: larger (`grow`) or smaller
(`shrink`)."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.assembly import earlier
from jaxlm.assembly.open_model import Pretrained, published_run
from jaxlm.core import config, config_io, spec, tree
from jaxlm.formats import hf_sidecars
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.models import MODELS
from jaxlm.nn.family import Family
from jaxlm.nn.layout import Layout
from jaxlm.objectives import OBJECTIVES
from jaxlm.runtime import mesh


def check_plain(p: Pretrained, how: str) -> None:
    """Raises ValueError where the model has an adapter, is in few bits, or has heads of earlier tasks, none of which
    change their sizes with it. `how` is what is done to it: grow or shrink."""
    where = p.source.path
    if p.source.adapter != config.Adapter():
        raise ValueError(f"{where}: has an adapter; merge it first: jaxlm export {where} MERGED --format hf")
    if p.source.adapted.compressed:
        raise ValueError(f"{where}: is compressed; make it whole first: jaxlm export {where} WHOLE --format hf")
    if p.source.run is not None and earlier.of_directory(where, p.source.run).tasks:
        raise ValueError(f"{where}: has heads of earlier tasks, which don't {how}; {how} the model before it")


def specs_of(family: Family, c: Any, p: Pretrained) -> Any:
    """Returns the specs of a model made of `p`, with those of the objective's own head."""
    config_io.check(c, "model.")
    objective = p.source.objective
    own = {} if objective is None else OBJECTIVES.of(objective).specs(objective, c.width)
    return family.specs(c) | own


def write(
    p: Pretrained, folder: Path, c: Any, made: Any, about: dict[str, Any], tokens: Any = None, opt: Any = None
) -> list[str]:
    """Writes the run directory of a model with the config `c` and the weights `made`; returns lines on it. `tokens`:
    its tokenizer; None: that of `p`. `opt`: what the optimizer remembers. ValueError: the weights don't fit it."""
    source = p.source
    specs = specs_of(MODELS.of(c), c, p)
    _check_shapes(specs, made)
    run = published_run(source) if source.run is None else source.run
    run = dataclasses.replace(run, model=c, name=folder.resolve().name, out=str(folder.parent), start="")
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, ema=0.0))  # the average is what it was made of
    notes = [*_save_text(p, folder, tokens), *source.save_advice(folder)]
    hf_sidecars.set_embedding_width(folder, c.width)
    layout = Layout.of(config.Mesh(), run.execution)
    with Checkpoints(folder / "checkpoints") as checkpoints, mesh.on_mesh(p.mesh):
        weights = jax.device_put(made, layout.shardings(specs, p.mesh))
        state = dict(step=jnp.zeros((), jnp.int32), params=weights)
        state |= {} if opt is None else {"opt": jax.device_put(opt, mesh.replicated(p.mesh))}
        checkpoints.save(0, state, {"step": 0, **about}, wait=True)
    config_io.dump(run, folder / "config.json")
    notes.append(f"checkpoints: {spec.count(p.model.specs):,} parameters became {spec.count(specs):,}")
    return notes


def _save_text(p: Pretrained, folder: Path, tokens: Any) -> list[str]:
    if tokens is None:
        if p.source.tokens is None:
            raise ValueError(f"{p.source.path}: has no tokenizer; put its tokenizer.json beside the weights")
        return [f"tokenizer: {', '.join(p.source.save_text(folder / 'tokenizer'))}"]
    file = tokens.save(folder / "tokenizer")
    if "default" in p.source.templates:
        (folder / "tokenizer" / "chat_template.jinja").write_text(p.source.templates["default"], "utf-8")
    return [f"tokenizer: {file.name}, {tokens.vocab_size} tokens"]


def _check_shapes(specs: Any, weights: Any) -> None:
    """Refuses sizes that the family's config can't express. ValueError: shapes differ."""
    wanted = {path: s.shape for path, s in tree.flatten(specs, spec.is_spec).items()}
    made = {path: w.shape for path, w in tree.flatten(weights).items()}
    for path in sorted(wanted.keys() | made.keys()):
        if wanted.get(path) != made.get(path):
            raise ValueError(
                f"{path}: would have shape {made.get(path)}, where the family's config allows {wanted.get(path)}; this "
                "family can't have these sizes"
            )
