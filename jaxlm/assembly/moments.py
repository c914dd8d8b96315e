"""Lets a run go on with what the optimizer of the run that it starts from remembers, and makes that larger as a model
grows."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.assembly import continual_methods, earlier, importances, open_model, run_directory
from jaxlm.assembly import program as programs
from jaxlm.assembly.model_source import Source, StartModel
from jaxlm.core import config, registry, spec, tree
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.objectives import OBJECTIVES
from jaxlm.training import moments
from jaxlm.training.moments import Slot
from jaxlm.training.step import State
from jaxlm.weights.adapters import METHODS

Grow = Callable[[Mapping[str, np.ndarray], int], dict[str, np.ndarray]]
"""(averages of a power of the gradients by path, the power) → those of the larger model, as far as they are known."""
SHOWN = 3


class Stored(NamedTuple):
    """A Stored says where a run directory holds what its optimizer remembers."""

    step: int | None
    """The checkpoint's; None: the newest."""
    paths: dict[Slot, str]
    """The path of each slot in the item `opt`."""
    arrays: dict[str, jax.ShapeDtypeStruct]
    """Shape and dtype of everything there, by path."""


def first_state(p: programs.Program, start: StartModel) -> State:
    """Returns the state before the first update: fresh weights, or those of the model that the run starts from, with
    the optimizer's memory that `optim.moments` says. ValueError: the model doesn't fit the run."""
    check(p.run, start)
    if not p.run.start:
        return p.init()
    given = open_model.first_params(p, start)
    known = set(tree.flatten(given))
    state = p.init_from(given)
    return _carried(p, start.source, state, known) if p.run.optim.moments == "start" else state


def check(run: config.Run, start: StartModel) -> None:
    """Raises ValueError where the run is to go on with moments that there aren't, or that aren't those of its
    optimizer."""
    if run.optim.moments == "fresh":
        return
    if not run.start:
        raise ValueError(
            "optim.moments: start takes those of the run that this one starts from, and it starts from none; name a "
            "run directory by `start`, or set it to fresh"
        )
    source = start.source
    if source.run is None or source.adapter_files is not None:
        raise ValueError(
            f"optim.moments: {run.start} was published without an optimizer's state; set it to fresh, or start from a "
            "run directory"
        )
    check_pair(source.run, run)
    if not stored(source).paths:
        raise ValueError(
            f"optim.moments: {run.start} holds no optimizer's state (an imported model has none, nor has one that grew "
            "from such, or from an optimizer whose state can't grow); set it to fresh"
        )


def check_pair(before: config.Run, run: config.Run) -> None:
    """Raises ValueError where the run is to go on with the moments of a run of another optimizer, or has no use for
    any."""
    if run.optim.moments == "fresh":
        return
    method, name = METHODS.of(run.adapter), registry.name_of(run.adapter)
    if method.has_own_optimizer:
        raise ValueError(f"optim.moments: {name} begins to choose anew in each run; set it to fresh")
    if method.growth is not None or continual_methods.separate(run):
        raise ValueError(f"optim.moments: each run trains a new {name}, which has none yet; set it to fresh")
    theirs, ours = (_remembers(r.optim) for r in (before, run))
    if theirs != ours:
        raise ValueError(
            f"optim.moments: the run {before.name} was trained by {theirs}, and this one is by {ours}; choose the same "
            "optimizer, or set it to fresh"
        )
    sizes = [(r.transfer, r.model.width, r.model.layers) for r in (before, run)]
    if {before.transfer.method, run.transfer.method} != {"none"} and sizes[0] != sizes[1]:
        raise ValueError(
            f"optim.moments: the run {before.name} has other sizes or another transfer, by which gradients are scaled; "
            "set it to fresh"
        )
    if ours == "sgd without momentum":
        raise ValueError(f"optim.moments: {ours} remembers nothing; set it to fresh")


def _remembers(c: config.Optim) -> str:
    return f"{c.name} without momentum" if c.name == "sgd" and not c.momentum else c.name


def stored(source: Source, step: int | None = None) -> Stored:
    """Returns where a model's run directory holds its optimizer's state: of the checkpoint `step`, or else of the one
    that its weights are read from. A model that was published elsewhere, or imported, has none."""
    if source.run is None:
        return Stored(None, {}, {})
    with Checkpoints(source.path / "checkpoints") as checkpoints:
        step = open_model.step_of(source, checkpoints, step)
        arrays = checkpoints.described(step, item="opt")
        grown = bool(arrays) and "grown" in checkpoints.read_meta(step)
    if not arrays:
        return Stored(step, {}, {})
    if grown:  # of a model with other weights than its own run would train: by names
        names = {path: path.split("/") for path in arrays}
        return Stored(step, {Slot(n[0], n[1], "/".join(n[2:])): path for path, n in names.items()}, arrays)
    state = _abstract(source)
    return Stored(step, {slot: path for slot, (path, _) in moments.slots(state).items() if path in arrays}, arrays)


def _abstract(source: Source) -> Any:
    """Returns the shapes of the optimizer's state of the run that trained a model."""
    assert source.run is not None
    specs = open_model.specs_of(source)
    before = earlier.of_directory(source.path, source.run)
    optimizer = programs.optimizer(source.run, specs, source.adapted, before)
    return jax.eval_shape(optimizer.tx.init, tree.partition(spec.abstract(specs), optimizer.trainable)[0])


def _carried(p: programs.Program, source: Source, state: State, known: set[str]) -> State:
    """Returns the state with the optimizer's memory of the run before, each device's share straight onto it. Weights
    that aren't among the `known`, such as a new head, have none. ValueError: it holds none of what the run trains."""
    place, found = p.run.start, stored(source)
    now = _renamed(p, source)
    theirs = {slot._replace(weight=now(slot.weight)): path for slot, path in found.paths.items()}
    ours = moments.slots(p.abstract_state().opt)
    parts = [sorted({slot.part for slot in each}) for each in (theirs, ours)]
    if not set(parts[1]) <= set(parts[0]):
        raise ValueError(
            f"optim.moments: {place} remembers {', '.join(parts[0])}, and this run's optimizer needs "
            f"{', '.join(parts[1])}; choose the same settings of `optim`, or set it to fresh"
        )
    taken = {
        slot: (path, leaf) for slot, (path, leaf) in ours.items()
        if (not slot.weight or slot.weight in known)
        and slot in theirs and found.arrays[theirs[slot]].shape == leaf.shape
    }  # fmt: skip
    if not any(slot.weight for slot in taken):
        raise ValueError(
            f"optim.moments: {place} remembers nothing of the weights that this run trains; set it to fresh"
        )
    here = dict(_by_path(state.opt))
    wanted: dict[str, Any] = {}
    for slot, (path, leaf) in taken.items():
        wanted = tree.put(wanted, theirs[slot], leaf)
        here[path].delete()  # both are never held
    with Checkpoints(source.path / "checkpoints") as checkpoints:
        read = checkpoints.restore_params(wanted, found.step, item="opt", partial=True)
    values = {path: tree.at(read, theirs[slot]) for slot, (path, _) in taken.items()}
    if jax.process_index() == 0:
        print(f"moments      those of {place}{_missing(sorted({s.weight for s in ours} - {s.weight for s in taken}))}")
    opt = jax.tree_util.tree_map_with_path(lambda at, x: values.get(_name(at), x), state.opt)
    return state.replace(opt=opt)


def _missing(weights: list[str]) -> str:
    more = f" and {len(weights) - SHOWN} more" if len(weights) > SHOWN else ""
    return f"; none yet of {', '.join(weights[:SHOWN])}{more}" if weights else ""


def _name(at: tuple) -> str:
    return jax.tree_util.keystr(at, simple=True, separator="/")


def _by_path(state: Any) -> list[tuple[str, Any]]:
    return [(_name(at), leaf) for at, leaf in jax.tree_util.tree_flatten_with_path(state)[0]]


def _renamed(p: programs.Program, source: Source) -> Callable[[str], str]:
    """Returns the function from the path of a weight of the run before to its path in this run; empty stays empty. The
    head of an objective that is read in another form than it was trained in has none."""
    assert source.run is not None
    own = OBJECTIVES.of(source.run.objective).specs(source.run.objective, source.config.width)
    turned = run_directory.read_config(source.path).objective != source.run.objective

    def now(path: str) -> str:
        if turned and path.split("/")[0] in own:
            return f"{path}, turned"
        if path and p.earlier.tasks and not p.run.continual.old:
            return importances.now(p.earlier.tasks[-1], source, path)
        return path

    return now


def grown(source: Source, step: int | None, grow: Grow) -> tuple[dict[str, Any] | None, str]:
    """Returns the item `opt` of a grown model's checkpoint, by the names of slots, and a line on it. None: the model
    has no optimizer's state, or one that can't grow. One array of the old state is read at a time."""
    fresh = "a run from it begins with fresh moments"
    found = stored(source, step)
    if not found.paths:
        return None, f"moments: none, for {source.path.name} holds no optimizer's state; {fresh}"
    if (other := moments.unmapped(found.paths)) is not None:
        return None, f"moments: none, for what {other} holds can't be that of a larger model; {fresh}"
    wanted: dict[str, Any] = {}
    for path in found.paths.values():
        wanted = tree.put(wanted, path, found.arrays[path])
    with Checkpoints(source.path / "checkpoints") as checkpoints:
        values = {path: np.asarray(x) for path, x in checkpoints.each_param(wanted, found.step, item="opt")}
    out: dict[str, Any] = {}
    for record, field in sorted({(slot.record, slot.field) for slot in found.paths}):
        mine = {slot.weight: values[path] for slot, path in found.paths.items() if slot[:2] == (record, field)}
        if "" not in mine:
            mine = grow(mine, moments.ORDERS[record, field])
        for path, value in mine.items():
            out = tree.put(out, f"{record}/{field}/{path}".rstrip("/"), value)
    return out, "moments: grown too; to go on with them: --optim.moments start"
