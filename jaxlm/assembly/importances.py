"""Estimates how much each weight matters to the task right before a run, and reads what earlier runs estimated."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxlm.assembly.earlier import HEADS
from jaxlm.assembly.model_source import Source
from jaxlm.assembly.program import Program
from jaxlm.assembly.run_objective import BoundObjective
from jaxlm.assembly.task_index import Task
from jaxlm.core import spec, tree
from jaxlm.core.continual import Ewc
from jaxlm.data.loader import Arrays, to_device
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout
from jaxlm.objectives import OBJECTIVES, outputs
from jaxlm.objectives.objective import DeviceBatch
from jaxlm.training.continual import importance
from jaxlm.training.step import State


def trained_paths(p: Program) -> list[str]:
    """Returns the paths of the weights that a run trains."""
    return [path for path in tree.flatten(p.specs, spec.is_spec) if p.optimizer.trainable(path)]


def like(p: Program) -> Any:
    """Returns the shapes and shardings of a number for each trained weight, in float32; None where one isn't."""
    return jax.tree.map(
        lambda s, home: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=home),
        tree.partition(spec.abstract(p.specs), p.optimizer.trainable)[0], p.state_shardings.params,
    )  # fmt: skip


def ones(p: Program, state: State) -> Any:
    """Returns 1 for each trained weight that was there before the run, and 0 for those of its new head."""
    shared = any(not task.own_head for task in p.earlier.tasks)
    new = () if shared else tuple(p.objective.specs(p.run.model.width))
    return tree.map_named(
        lambda path, w: jnp.full_like(w, 0.0 if path.split("/")[0] in new else 1.0, jnp.float32), state.params
    )


def estimated(p: Program, state: State, batches: Iterable[Arrays], name: str) -> Any:
    """Returns the importances of the method (`ewc` or `mas`) for the last task, the mean over rows. Each row is
    computed by all devices of the batch axes, and of all stages, together, so that every row's gradient is one by
    itself."""
    task, objective = p.earlier.tasks[-1], p.earlier.objectives[-1]
    mesh = dataclasses.replace(p.run.mesh, compute=(*p.run.mesh.compute, "batch="), stage=1)
    model = dataclasses.replace(p.model, shard=Layout.of(mesh, p.run.execution))
    c = getattr(p.run.continual, name)
    of_row = _fisher_loss(c, objective, model) if name == "ewc" else partial(_norm_loss, objective, model)
    each = jnp.square if name == "ewc" else jnp.abs

    def sums(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        rows = jax.tree.map(lambda x: x[0], batch)
        present_B = jax.vmap(lambda row: _total(objective, row) > 0)(rows).astype(jnp.float32)
        keys = jax.random.split(key, len(present_B))

        def loss(params: Any, row: Any) -> jax.Array:
            weights = p.earlier.weights_for(tree.merge(params, frozen), task)
            return of_row(weights, cast(DeviceBatch, {k: v for k, v in row.items() if k != "key"}), row["key"][0])

        return importance.over_rows(loss, each, params, rows | {"key": keys}, present_B), present_B.sum()

    compute = jax.jit(sums, out_shardings=(p.state_shardings.params, p.whole))

    def on_batch(params: Any, numbered: tuple[int, Arrays]) -> Any:
        number, batch = numbered
        key = jax.random.fold_in(jax.random.key(p.run.seed), number)
        return compute(params, state.frozen, to_device(batch, p.whole if p.mesh is not None else None), key)

    return importance.mean_over(on_batch, state.params, enumerate(batches))


def _total(objective: BoundObjective, row: Any) -> jax.Array:
    one = jax.tree.map(lambda x: x[None], row)
    return sum(jax.tree.leaves(objective.totals(one)), jnp.zeros(()))


def _fisher_loss(c: Ewc, objective: BoundObjective, model: Model) -> Any:
    """Returns the function of (weights, a batch of one row, key) whose gradient is squared."""
    if c.labels == "model" and objective.objective.outputs is None:
        raise ValueError(f"continual.ewc.labels: {objective.name} offers no predictions to draw from; set it to data")

    def one_place(weights_BN: jax.Array, key: jax.Array) -> jax.Array:
        at = jax.random.categorical(key, jnp.log(weights_BN.ravel()))
        return (jnp.arange(weights_BN.size) == at).reshape(weights_BN.shape).astype(weights_BN.dtype)

    def loss(weights: Any, row: DeviceBatch, key: jax.Array) -> jax.Array:
        drawn, at = jax.random.split(key)
        if c.labels == "model":
            found = objective.outputs(model, weights, row)
            if c.unit == "token":
                found = found._replace(weights_BN=one_place(found.weights_BN, at))
            return outputs.total(outputs.drawn_loss(found, drawn, model.shard), found)
        if c.unit == "token":
            if "weights" not in row:
                raise ValueError(f"continual.ewc.unit: {objective.name} has one target a row; set it to row")
            row = row | {"weights": one_place(row["weights"], at)}
        return sum((values["loss"] for values in objective.loss(model, weights, row, None).values()), jnp.zeros(()))

    return loss


def _norm_loss(objective: BoundObjective, model: Model, weights: Any, row: DeviceBatch, key: jax.Array) -> jax.Array:
    """Returns the squared norm of a row's outputs, a mean over its places."""
    if objective.objective.outputs is None:
        raise ValueError(
            f"continual.methods: mas needs outputs, and {objective.name} offers none; choose another method"
        )
    found = objective.outputs(model, weights, row)
    return outputs.total(outputs.squared_norm(found, model.shard), found) / jnp.maximum(found.weights_BN.sum(), 1e-9)


# ------------------------------------------------------------------------------------------- what earlier runs stored


def stored(folder: Path) -> set[str]:
    """Returns the names of the items that a folder of checkpoints holds in its newest."""
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.latest()
        return set() if step is None else {path.name for path in checkpoints.path(step).iterdir()}


def restored(
    p: Program, before: Source, trained: Sequence[str], folder: Path, item: str, dtype: Any = jnp.float32
) -> Any:
    """Returns a tree of the run before as one of this run: its own head is now an earlier task's. Weights that it had
    no number for get 0."""
    wanted_here = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype, sharding=s.sharding), like(p))
    shapes = tree.flatten(wanted_here)
    places = {path: new for path in trained if (new := now(p.earlier.tasks[-1], before, path)) in shapes}
    wanted: dict[str, Any] = {}
    for path, new in places.items():
        wanted = tree.put(wanted, path, shapes[new])
    step = None
    with Checkpoints(folder) as checkpoints:
        if before.run is not None and before.run.train.use == "best" and folder.name == "checkpoints":
            step = checkpoints.best()
        found = tree.flatten(checkpoints.restore_params(wanted, step, item=item)) if wanted else {}
    by_place = {places[path]: value for path, value in found.items()}
    return tree.map_named(
        lambda path, s: by_place[path] if path in by_place else jax.jit(
            partial(jnp.zeros, s.shape, s.dtype), out_shardings=s.sharding
        )(), wanted_here,
    )  # fmt: skip


def now(last: Task, before: Source, path: str) -> str:
    """Returns the path that a weight of the run before has in this run."""
    assert before.run is not None
    own = OBJECTIVES.of(before.run.objective).specs(before.run.objective, before.config.width)
    return f"{HEADS}/{last.name}/{path}" if last.own_head and path.split("/")[0] in own else path
