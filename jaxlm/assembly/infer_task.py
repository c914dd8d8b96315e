"""Infers which task a text belongs to where each has an adapter of its own: by the last states of the base, which all
tasks share and none changes.

The run's `memory/` keeps the mean and the covariance of each task's training rows, and of the tasks before. A row's
vector is the mean of its states; of an encoder-decoder the state at the first place of the target, which has read the
source and nothing of the target.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly import corpus
from jaxlm.assembly.open_model import Pretrained, program
from jaxlm.assembly.program import Program
from jaxlm.assembly.task_index import FOLDER, STATISTICS
from jaxlm.data import loader, replay
from jaxlm.evaluation import task_inference
from jaxlm.evaluation.task_inference import Statistics
from jaxlm.runtime import mesh, processes

ROWS = 512


def vectors(p: Program, weights: Any, parts: Sequence[Any], name: str) -> np.ndarray:
    """Returns the vectors of rows of a corpus, `[N, D]` in float32: of at most `ROWS`, drawn by the run's seed and
    `name`."""
    base, run = p.adapter.disabled, p.run
    model = dataclasses.replace(p.model, adapter=base if base.changes else None)
    records = [corpus.as_records(p.objective, x, document_mask=run.data.document_mask, seed=run.seed) for x in parts]
    chosen = replay.Chosen.first(records, run.seed, f"{name}:states", ROWS)
    first = model.family.kind == "encoder_decoder"

    def pooled(weights: Any, batch: Any) -> jax.Array:
        # Where a row is several texts, as of a question's choices, its first one stands for it.
        batch = {name: x[0] if x.ndim < 4 else x[0, :, 0] for name, x in batch.items()}
        x_BTD = model.forward(weights, batch).x_BTD.astype(jnp.float32)
        real_BT = (batch["positions"] == 0) & (batch["segments"] == 1) if first else batch["segments"] > 0
        share_BT = real_BT / jnp.maximum(real_BT.sum(1, keepdims=True), 1)
        return (x_BTD * share_BT[..., None]).sum(1)

    compute, found = jax.jit(pooled, out_shardings=p.whole), []
    size = run.train.batch_size // run.train.micro_batches
    rows, plain = p.rows(size), {name: w for name, w in weights.items() if name != "adapter"}
    for batch in loader.evaluation_batches(chosen, p.objective.example, batch_size=size, rows=rows):
        found.append(jax.device_get(compute(plain, loader.to_device(batch, p.batch_shardings(batch), rows))))
    return np.concatenate(found)[: len(chosen)]


def note(p: Program, weights: Any, train: Sequence[Any]) -> None:
    """Keeps the statistics of a run's own training rows beside those of the tasks before, in its directory."""
    own = task_inference.statistics(vectors(p, weights, train, p.run.name))
    known = read(p.run.folder) | {p.run.name: own}
    if jax.process_index() == 0:
        file = p.run.folder / FOLDER / STATISTICS
        part = file.with_name(f"{file.name}.part")
        with part.open("wb") as out:
            arrays = {f"{name}/{key}": x for name, s in known.items() for key, x in s._asdict().items()}
            np.savez(out, **arrays)
        part.rename(file)
    processes.barrier("the statistics of the task", 3600.0)


def read(folder: Path) -> dict[str, Statistics]:
    """Returns the statistics of each task that a run directory keeps, in the order of the tasks."""
    file = folder / FOLDER / STATISTICS
    if not file.is_file():
        return {}
    with np.load(file) as values:
        names = dict.fromkeys(key.rpartition("/")[0] for key in values.files)
        return {name: Statistics(*(values[f"{name}/{key}"] for key in Statistics._fields)) for name in names}


def share_right(opened: Pretrained, name: str) -> float | None:
    """Returns the share of the test rows, or else validation rows, of a model's run whose task is inferred to be
    `name`; None: the model keeps no statistics of it."""
    known = read(opened.source.path)
    if name not in known:
        return None
    p = program(opened, None)
    part: corpus.Part = "test" if p.run.data.test else "valid"
    with mesh.on_mesh(p.mesh):
        x_ND = vectors(p, opened.params, getattr(corpus.corpus(p.run.data, p.objective, (part,)), part), name)
    found = task_inference.infer(x_ND, list(known.values()))
    return float(np.mean(found == list(known).index(name)))
