"""Works out which of PackNet's tasks owns each weight, when a run begins."""

import json
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.assembly import importances
from jaxlm.assembly.continual_methods import PACKNET
from jaxlm.assembly.model_source import Source
from jaxlm.assembly.owned import OWNER, WEIGHTS
from jaxlm.assembly.program import Program
from jaxlm.assembly.task_index import FOLDER, INDEX
from jaxlm.core import tree
from jaxlm.training.continual import packnet

PRUNED = f"tracks/{PACKNET}/pruned"


def like(p: Program) -> Any:
    """Returns the shapes and shardings of the owner of each trained weight, int8."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.int8, sharding=s.sharding), importances.like(p))


def owners(p: Program, before: Source) -> Any:
    """Returns the number of the task that owns each weight, 0 where none does, int8, for a run that follows `before`.

    ValueError: that one hasn't pruned yet, the run trains what it didn't, or too little is free.
    """
    index = json.loads((before.path / FOLDER / INDEX).read_text("utf-8"))
    last, trained = p.earlier.tasks[-1], index["trained"]
    known = {importances.now(last, before, path) for path in trained}
    new = set(p.objective.specs(p.run.model.width))
    sharing = [task.packed for task in p.earlier.tasks if task.packed and task.objective == p.run.objective]
    for path in importances.trained_paths(p):
        if path not in known and path.split("/")[0] not in new:
            raise ValueError(
                f"optim.freeze: packnet owns no part of {path}, which {before.path} didn't train but depends on; "
                "freeze it, or begin anew"
            )
    read = partial(importances.restored, p, before, trained, dtype=jnp.int8)
    pruned = read(before.path / "checkpoints", PRUNED)
    number = p.earlier.packed
    owner = read(before.path / FOLDER / WEIGHTS, OWNER) if number > 1 else jax.tree.map(jnp.zeros_like, pruned)
    if not any(bool(x.any()) for x in jax.tree.leaves(pruned)):
        raise ValueError(
            f"continual.methods: {before.path} has no weights left for another task: it hasn't pruned yet, or keeps "
            f"all of them; finish it (jaxlm train {before.path}), or train it anew with a smaller packnet.keep"
        )

    def one(path: str, o: jax.Array) -> jax.Array:
        if path.split("/")[0] in new:  # the first task with this head keeps all of it
            return jnp.full_like(o, min(sharing, default=0))
        taken = jnp.where((o == 0) & (tree.at(pruned, path) == 0), jnp.int8(number), o)
        return taken if path in known else o

    made = tree.map_named(one, owner)
    _check_free(p, made, known)
    return made


def _check_free(p: Program, owner: Any, known: set[str]) -> None:
    axes = p.earlier.plan(p.specs, p.objective.specs(p.run.model.width), p.run.train.steps).axes
    counts = {path: o for path, o in tree.flatten(owner).items() if path in known and axes(path) is not None}
    free = sum(int((o == 0).sum()) for o in counts.values())
    share = free / max(1, sum(math.prod(o.shape) for o in counts.values()))
    if share < packnet.LEAST:
        raise ValueError(
            f"continual.packnet: {p.earlier.packed} tasks own {1 - share:.1%} of the weights, which leaves too few for "
            "another; begin anew with a smaller keep or with packnet.tasks, or with a larger model"
        )
