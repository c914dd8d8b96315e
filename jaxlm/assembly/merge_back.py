"""Merges the model after a stage of a stream with the one before it: the stream goes on from what comes out.

The merged model is a run directory beside the stage's own, under `merged/` with the same name, so that the tasks,
memories and heads that the stage knows are found there; the stage's own run stays as it is.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly import continual_methods, earlier, task_index
from jaxlm.assembly.merge import HELD
from jaxlm.assembly.open_model import Pretrained, open_model
from jaxlm.core import config, config_io, spec, tree
from jaxlm.core.merging import Changes
from jaxlm.core.stream import MergeBack
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.runtime import mesh, processes
from jaxlm.training.adafactor import own_axes
from jaxlm.weights import merging
from jaxlm.weights.merging import Settings, Stretch

FOLDER = "merged"
RECORD = "merge.json"
USUAL = 0.5  # the weight of the new model
EXACT = ("linear", "slerp", "task_arithmetic")  # with a weight of 1 they give the new model itself
LEFT = ("checkpoints", "start.npz", "report.html", "*.part", "environment.json")  # of the stage's run alone


def check(c: MergeBack, runs: list[config.Run], start: str) -> None:
    """Refuses a stream whose stages can't be merged back so: ValueError. `start`: where the stream starts."""
    config_io.check(c, "merge_back.")
    if c.method == "model_stock" and not start:
        raise ValueError(
            "merge_back.method: model_stock needs a model that both began from, and this stream starts from fresh "
            "weights; name a model in the run's `start`, or choose another method"
        )
    settings(c)
    for run in runs:
        if run.adapter != config.Adapter():
            raise ValueError(
                "merge_back: merges whole weights, and the product of an adapter's factors is not that of their means; "
                "train without adapter"
            )
        for name in ("si", "rwalk", continual_methods.PACKNET):
            if name in run.continual.methods:
                why = "owns weights that merging changes" if name == continual_methods.PACKNET else (
                    "measures the path to a stage's own weights, from which merging goes away"
                )  # fmt: skip
                raise ValueError(f"merge_back: {name} {why}; choose another method, or leave merge_back out")


def settings(c: MergeBack) -> Settings:
    """Returns how two models are merged. ValueError: the method has no such setting, or needs one."""
    given = Settings(**{each.name: getattr(c, each.name) for each in dataclasses.fields(Changes)})
    weight = USUAL if c.weight is None else c.weight
    try:
        if c.method == "model_stock":
            if c.weight is not None:
                raise ValueError("weight: model_stock finds its own; leave it out")
            return merging.resolved(given, 2, True)
        if c.method == "linear":
            return merging.resolved(dataclasses.replace(given, weights=(1 - weight, weight)), 2, False)
        if c.method == "slerp":
            return merging.resolved(dataclasses.replace(given, t=weight), 2, False)
        return merging.resolved(dataclasses.replace(given, scale=weight), 1, True)
    except ValueError as error:
        raise ValueError(f"merge_back.{error}") from error


def place(run: config.Run) -> Path:
    """Returns the run directory of the model that a stage is merged to."""
    return Path(run.out) / FOLDER / run.name


def merge(c: MergeBack, run: config.Run, start: str) -> Path:
    """Returns the run directory of the merge of a stage, whose run is trained, with the model that it started from;
    what is there already is not made again. `start`: where the stream starts."""
    folder = place(run)
    if (folder / "config.json").is_file():
        return folder
    after, before = open_model(run.folder), open_model(run.start)
    base = _seen_by(run, open_model(start)) if c.method == "model_stock" else None
    weights = merged(c, after, _seen_by(run, before), base)
    part = folder.with_name(f"{folder.name}.part")
    if jax.process_index() == 0:
        shutil.rmtree(part, ignore_errors=True)  # of an attempt that was cut off
        shutil.copytree(run.folder, part, ignore=shutil.ignore_patterns(*LEFT))
        as_merged = dataclasses.replace(
            run, out=str(folder.parent), optim=dataclasses.replace(run.optim, ema=0.0),
            train=dataclasses.replace(run.train, use="last"),
        )  # fmt: skip
        config_io.dump(as_merged, part / "config.json")
        record = {"before": run.start, "after": str(run.folder), **dataclasses.asdict(settings(c))}
        (part / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    processes.barrier("the merged model", 3600.0)
    with Checkpoints(part / "checkpoints") as checkpoints, mesh.on_mesh(after.mesh):
        step = run.train.steps
        state = dict(step=jnp.full((), step, jnp.int32), params=weights)
        checkpoints.save(step, state, {"step": step, "merged": c.method}, wait=True)
    if jax.process_index() == 0:
        part.rename(folder)
    processes.barrier("the merged model's end", 3600.0)
    return folder


def _seen_by(run: config.Run, before: Pretrained) -> Any:
    """Returns the weights of a model with its heads where a run that goes on from it has them."""
    if before.source.run is None:
        return before.params
    known = task_index.read_index(before.source.path)
    return earlier.with_heads(earlier.of_directory(run.folder, run), before.source.run, known, before.params)


def merged(c: MergeBack, after: Pretrained, before: Any, base: Any = None) -> Any:
    """Returns the merge of a model with the weights before. What only the model has, such as a new head, stays, and
    with a base what that lacks. Each matrix of a stack counts by itself."""
    how, specs = settings(c), tree.flatten(after.model.specs, spec.is_spec)

    def one(path: str, w: jax.Array) -> jax.Array:
        others = [tree.at(t, path) for t in (before, base) if t is not None]
        if any(x is None or x.shape != w.shape for x in others) or (c.weight == 1 and c.method in EXACT):
            return w
        if c.weight == 0:
            return jax.device_put(np.asarray(others[0]).astype(w.dtype), w.sharding)
        axes = own_axes(specs[path])
        stacks = [_matrices(x, axes) for x in (*others, w)]
        out = np.empty(stacks[0].shape, np.float32)
        for i, matrix in enumerate(zip(*stacks, strict=True)):
            old, *given, new = matrix
            if c.method == "model_stock":
                rows, first = [old, new], given[0]
            else:
                rows, first = ([new], old) if merging.METHODS[c.method].needs_base else ([old, new], None)
            tensor = merging.Tensor(f"{path}/{i}", out.shape[1], partial(_stretches, first, rows))
            out[i] = np.concatenate(list(merging.merge(how, tensor)))
        return jax.device_put(_as_before(out, w.shape, axes).astype(w.dtype), w.sharding)

    return tree.map_named(one, after.params)


def _matrices(w: jax.Array, axes: tuple[int, ...]) -> np.ndarray:
    """Returns the matrices of an array as rows, float32."""
    stack = [i for i in range(w.ndim) if i not in axes]
    return np.asarray(w, np.float32).transpose(*stack, *axes).reshape(math.prod(w.shape[i] for i in stack), -1)


def _as_before(rows: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    """Returns the array of which `_matrices` made rows."""
    order = [*(i for i in range(len(shape)) if i not in axes), *axes]
    return rows.reshape([shape[i] for i in order]).transpose(np.argsort(order))


def _stretches(base: np.ndarray | None, rows: list[np.ndarray]) -> Iterator[Stretch]:
    for at in range(0, len(rows[0]), HELD):
        part = slice(at, at + HELD)
        yield Stretch(at, None if base is None else base[part], np.stack([row[part] for row in rows]))
