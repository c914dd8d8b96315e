"""Reads which of PackNet's tasks owns each weight of a run's model, to use it for an earlier task."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.assembly.continual_methods import PACKNET
from jaxlm.assembly.task_index import FOLDER, INDEX, Task, read_index
from jaxlm.core import config, tree
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.training.continual import packnet

OWNER = f"{PACKNET}/owner"
WEIGHTS = "weights"


def check_stream(runs: list[config.Run]) -> None:
    """Refuses runs that follow each other if the first ones leave too few weights to a later one: ValueError."""
    free = 1.0
    for number, run in enumerate(runs, 1):
        if PACKNET not in run.continual.methods:
            return
        keep = packnet.share(run.continual.packnet, number)
        if free < packnet.LEAST:
            raise ValueError(
                f"continual.packnet.keep: {number - 1} stages leave {free:.2%} of the weights to {run.name}; give a "
                f"smaller keep, or packnet.tasks {len(runs)}"
            )
        free *= 1 - keep


def task_of(folder: Path, run: config.Run | None, name: str) -> Task | None:
    """Returns the earlier task of a run directory that owns weights there; None: the run has no such task."""
    if run is None or PACKNET not in run.continual.methods:
        return None
    return next((task for task in read_index(folder) if task.name == name and task.packed), None)


def for_task(folder: Path, weights: Any, task: Task) -> Any:
    """Returns the weights of a run directory as one of its earlier tasks left them; its head stays where it is."""
    index = json.loads((folder / FOLDER / INDEX).read_text("utf-8"))
    shapes, wanted = tree.flatten(weights), dict[str, Any]()
    for path in index["trained"]:
        w = shapes[path]
        wanted = tree.put(wanted, path, jax.ShapeDtypeStruct(w.shape, jnp.int8, sharding=w.sharding))
    with Checkpoints(folder / FOLDER / WEIGHTS) as stored:
        found = stored.restore_params(wanted, item=OWNER)
    owner = tree.map_named(lambda path, _: tree.at(found, path), weights)
    return packnet.for_task(weights, owner, task.packed)
