"""Measures how far a model has moved from what it was before a run, on the inputs of the new task: KL(before ‖ now).

That divergence says how much is forgotten better than others do (Shenfeld et al. 2025, RL's Razor). The predictions of
the weights before are computed once, when the run begins, and lie in its directory: the 64 likeliest classes of each
place and the rest as one, which is thousands of times less than a second copy of the weights or all logits of a large
vocabulary would take, and needs no forward pass of theirs again.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.assembly import continual_methods, corpus
from jaxlm.assembly.earlier import Task
from jaxlm.assembly.program import HOURS, Program
from jaxlm.assembly.run_objective import BoundObjective
from jaxlm.data import loader, replay
from jaxlm.objectives import outputs
from jaxlm.runtime import processes

FILE = "before.npz"
NAME = "kl_before"
PREFIX = "before_"
TOP = 64  # classes of each place that are stored by themselves

Pair = tuple[Task | None, BoundObjective]


def compared(p: Program) -> list[Pair]:
    """Returns the heads whose predictions on the new inputs are compared: those of earlier tasks of the run's kind,
    or the vocabulary's. Empty: the run doesn't ask, or there are none."""
    run = p.run
    if not (run.start and run.continual.kl_rows and continual_methods.keeps(run)):
        return []
    if p.objective.objective.outputs is None:
        return []
    if p.earlier.tasks:
        return list(p.earlier.alike(p.objective))
    return [] if p.objective.specs(run.model.width) else [(None, p.objective)]


def meter(p: Program, data: corpus.Corpus, weights: Any | None) -> Callable[[Any], dict[str, float]]:
    """Returns what gives `kl_before` of weights, the mean over predicted places, in nats; nothing in a run that doesn't
    ask.

    `weights`: those before the run, which then begins; None: it goes on, and what they predict is read from its
    directory.
    """
    pairs = compared(p)
    file = p.run.folder / FILE
    if pairs and weights is not None:
        _store(p, data, pairs, weights, file)
    if not pairs or (weights is None and not file.is_file()):  # a run that was begun before there was a meter
        return lambda weights: {}
    steps = [jax.jit(partial(_sums, p, pair), out_shardings=p.whole) for pair in pairs]
    with np.load(file) as known:
        arrays = {name: known[name] for name in known.files}

    def measure(weights: Any) -> dict[str, float]:
        total = count = 0.0
        for i, step in enumerate(steps):
            before = {name: arrays[f"{i}/{name}"] for name in outputs.Stored._fields}
            for at, batch, rows in _batches(p, data):
                more = {PREFIX + name: leaf[at.clip(max=len(leaf) - 1)][None] for name, leaf in before.items()}
                apart, weight = jax.device_get(step(weights, _placed(p, batch | more, rows)))
                total, count = total + float(apart), count + float(weight)
        return {NAME: total / count} if count else {}

    return measure


def _sums(p: Program, pair: Pair, weights: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the divergence over places by their weights, and these weights' sum."""
    rows = jax.tree.map(lambda x: x[0], batch)
    before = outputs.Stored(*(rows.pop(PREFIX + name) for name in outputs.Stored._fields))
    now = _outputs(p, pair, weights, rows)
    return outputs.total(outputs.divergence_from(before, now, p.model.shard), now), now.weights_BN.sum()


def _outputs(p: Program, pair: Pair, weights: Any, rows: Any) -> outputs.Predicted:
    task, objective = pair
    return objective.outputs(p.model, weights if task is None else p.earlier.weights_for(weights, task), rows)


def _batches(p: Program, data: corpus.Corpus) -> Iterator[tuple[np.ndarray, loader.Arrays, list[int] | None]]:
    """Yields the batches of the rows that are measured: the numbers of their rows, which may be beyond the last one,
    their leaves, and the rows of a batch that this process makes."""
    parts = [corpus.as_records(p.objective, part, document_mask=p.run.data.document_mask, seed=p.run.seed)
             for part in data.valid]  # fmt: skip
    chosen = replay.Chosen.first(parts, p.run.seed, NAME, p.run.continual.kl_rows)
    size = p.run.train.batch_size // p.run.train.micro_batches
    rows = p.rows(size)
    made = loader.evaluation_batches(chosen, p.objective.example, batch_size=size, rows=rows)
    for number, batch in enumerate(made):
        yield number * size + np.array(range(size) if rows is None else rows), batch, rows


def _placed(p: Program, batch: loader.Arrays, rows: list[int] | None) -> Any:
    """Returns a batch on the devices, every row as it is: what is stored of each place belongs to it."""
    return loader.to_device(batch, p.batch_shardings(batch), rows)


def _store(p: Program, data: corpus.Corpus, pairs: list[Pair], weights: Any, file: Path) -> None:
    """Writes what the weights predict for each row."""
    arrays: dict[str, np.ndarray] = {}
    for i, pair in enumerate(pairs):

        def predictions(weights: Any, batch: Any, pair: Pair = pair) -> outputs.Stored:
            rows = jax.tree.map(lambda x: x[0], batch)
            return outputs.stored(_outputs(p, pair, weights, rows), TOP, p.model.shard)

        compute = jax.jit(predictions, out_shardings=p.whole)
        found = [jax.device_get(compute(weights, _placed(p, batch, rows))) for _, batch, rows in _batches(p, data)]
        for name, leaves in zip(outputs.Stored._fields, zip(*found, strict=True), strict=True):
            arrays[f"{i}/{name}"] = np.concatenate(leaves)[: p.run.continual.kl_rows]
    if jax.process_index() == 0:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    processes.barrier("what was predicted before", HOURS)
