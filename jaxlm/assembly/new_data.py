"""A finished run directory whose data is changed begins a new run beside it, which starts from its model."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from jaxlm.assembly import run_directory
from jaxlm.assembly.model_source import StartModel
from jaxlm.core import config
from jaxlm.training import optimizers
from jaxlm.weights.adapters import METHODS


def learns_anew(before: config.Run, run: config.Run) -> bool:
    """Says whether a run differs from that of a run directory in what it learns: its training data or its objective."""
    return run.data.train != before.data.train or run.objective != before.objective


def following(before: config.Run, run: config.Run) -> config.Run:
    """Returns the run that learns new data from where a run directory ended.

    `before` is the run in its directory, and `run` is that with changes. Weights of sources and earlier data that
    nobody changed belong to the data of before, and are left out. ValueError: the run in the directory isn't finished.
    """
    folder = before.folder
    if run.start != before.start:
        raise ValueError(f"start: new data for {folder} starts from its own model; leave `start` out, or name a config")
    if before.data.train and not run_directory.has_ended(folder):  # an imported model was trained elsewhere
        raise ValueError(
            f"data.train: {folder} isn't trained to its end, so it can't learn other data yet; finish it first with: "
            f"jaxlm train {folder}"
        )
    data, continual = run.data, run.continual
    if data.weights == before.data.weights and data.train != before.data.train:
        data = dataclasses.replace(data, weights=())
    if continual.old == before.continual.old:
        continual = dataclasses.replace(continual, old=())
    return dataclasses.replace(run, start=str(folder), start_layers=(), data=data, continual=continual)


def named(before: config.Run, run: config.Run) -> config.Run:
    """Returns the run with its name: its own where that was changed, else the first of NAME-2, NAME-3, … that is free,
    or holds this very run, which then goes on."""
    if run.name != before.name:
        return run
    tried = (dataclasses.replace(run, name=name) for name in _names(before))
    return next(one for one in tried if _is_free(one.folder) or _holds(one))


def _names(before: config.Run) -> Iterator[str]:
    """Yields names for what follows a run: NAME-2, NAME-3, … after NAME; after NAME-3 too, where NAME is beside it."""
    stem, first = before.name, 2
    if (found := re.fullmatch(r"(.+)-(\d+)", stem)) and (before.folder.parent / found[1] / "config.json").is_file():
        stem, first = found[1], int(found[2]) + 1
    while True:
        yield f"{stem}-{first}"
        first += 1


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _holds(run: config.Run) -> bool:
    """Says whether a run's directory holds that run."""
    return (run.folder / "config.json").is_file() and not run_directory.differing(run)


def told(run: config.Run, start: StartModel) -> list[str]:
    """Returns what is said when a run begins that starts from another: where it is trained, its rates, and, where both
    have one kind of objective, whether anything keeps what that one learned (`warnings`)."""
    if not run.start or (source := start.source).run is None or not source.is_trained_here:
        return []
    before = source.run
    c, steps = run.optim, run.train.steps
    rate = optimizers.schedule(c, steps)
    last = float(optimizers.schedule(before.optim, before.train.steps)(before.train.steps - 1))
    high, low = (float(rate(step)) for step in (c.warmup, steps - 1))
    return [
        f"{run.folder} goes on from {source.path} as a new run: its learning rate rises to {high:.3g} by step "
        f"{c.warmup} and is {low:.3g} at step {steps}, the last ({c.schedule}); that of {source.path} ended at "
        f"{last:.3g}",
        *(f"warning: {line}" for line in warnings(run, start)),
    ]


def warnings(run: config.Run, start: StartModel) -> list[str]:
    """Returns a line where a run goes on from a trained one with its kind of objective, trains the model's own weights,
    and names no method that keeps what that one learned."""
    if not run.start or (source := start.source).run is None or not source.is_trained_here:
        return []
    alike = type(source.run.objective) is type(run.objective)  # else it is another task, such as a text's labels
    if not alike or run.continual.methods or METHODS.of(run.adapter) is not METHODS.of(config.Adapter()):
        return []
    return [
        f"{run.folder} may forget what {source.path} learned; to keep it, train with earlier data in each "
        "batch: --continual.methods replay --continual.replay.share 0.05"
    ]
