"""Names the methods of continual learning, and says which of them a run may use, together and with what."""

from typing import Any

from jaxlm.assembly.run_objective import BoundObjective
from jaxlm.assembly.task_index import Task
from jaxlm.core import config, registry
from jaxlm.core.continual import Continual
from jaxlm.core.errors import nearest
from jaxlm.objectives import OBJECTIVES
from jaxlm.weights import adapters
from jaxlm.weights.adapters.method import Columns

PENALTIES = ("l2", "ewc", "si", "mas", "rwalk")
REPLAYS = ("replay", "der", "agem", "gem")
TEACHERS = ("lwf", "features")
PACKNET = "packnet"
METHODS = (*PENALTIES, *TEACHERS, *REPLAYS, PACKNET)
TRACKED = ("si", "rwalk")


def check(c: Continual, run: config.Run) -> None:
    """Raises ValueError where the methods can't be used, or not together, or not by this run."""
    for name in c.methods:
        if name not in METHODS:
            raise ValueError(f"continual.methods: unknown {name!r}{nearest(name, METHODS)}")
    if len(set(c.methods)) < len(c.methods):
        raise ValueError("continual.methods: names a method twice")
    if "agem" in c.methods and "gem" in c.methods:
        raise ValueError("continual.methods: agem and gem both change the gradient; choose one")
    bounds, learned = {"agem", "gem"} & set(c.methods), {"replay", "der"} & set(c.methods)
    if bounds and learned:
        raise ValueError(
            f"continual.methods: {min(bounds)} takes the gradient of earlier rows as a bound, and {min(learned)} "
            "learns from them; choose one"
        )
    _check_adapters(c, run)
    if adapters.METHODS.of(run.adapter).growth is not None and (held := set(c.methods) & set(PENALTIES)):
        raise ValueError(
            f"continual.methods: {min(held)} holds the weights of earlier tasks, and {registry.name_of(run.adapter)} "
            "trains new ones in each; choose replay or lwf, or lora as the adapter"
        )
    if replays(c) and not (c.replay.examples or c.replay.tokens):
        raise ValueError("continual.replay: bound the memory by examples or tokens; both are 0")
    if PACKNET in c.methods:
        _check_packnet(c, run)
    needing = {"lwf", "der"} & set(c.methods)
    if needing and OBJECTIVES.of(run.objective).outputs is None:
        raise ValueError(
            f"continual.methods: {min(needing)} compares predictions, and {registry.name_of(run.objective)} offers "
            "none to compare; choose another method"
        )


def _check_adapters(c: Continual, run: config.Run) -> None:
    """Raises ValueError where tasks can't have adapters of their own, or nothing is left that a method could keep."""
    method, name = adapters.METHODS.of(run.adapter), registry.name_of(run.adapter)
    if c.adapters == "task" and method.growth is not None:
        raise ValueError(
            f"continual.adapters: {name} grows from task to task by itself; leave the field out, or choose lora"
        )
    if c.adapters == "task" and method.trained_roles:
        raise ValueError(
            f"continual.adapters: task needs an adapter over a frozen base, and `adapter` {name} trains weights of the "
            "base, which all tasks share; choose lora"
        )
    if c.adapters == "task" and c.methods:
        raise ValueError(
            "continual.methods: each task has an adapter of its own (continual.adapters), so that there is nothing to "
            "keep; leave one of the two out"
        )


def _check_packnet(c: Continual, run: config.Run) -> None:
    """Raises ValueError where the run's other settings don't go with PackNet."""
    if others := [name for name in c.methods if name != PACKNET]:
        raise ValueError(
            f"continual.methods: packnet leaves the weights of earlier tasks as they are, so {others[0]} has nothing "
            "to keep; choose one"
        )
    if c.old:
        raise ValueError("continual.old: packnet reads no earlier data; leave it out")
    if adapters.METHODS.of(run.adapter).growth is not None:
        raise ValueError(
            f"continual.methods: packnet gives each task weights of its own, and so does "
            f"{registry.name_of(run.adapter)}; leave out packnet, or choose lora as the adapter"
        )
    if run.train.use == "best":
        raise ValueError("train.use: the best checkpoint may be one from before packnet prunes; set it to last")
    if run.train.patience:
        raise ValueError("train.patience: a run that stops early may stop before packnet prunes; set it to 0")
    for name in ("top_layers", "only_layers"):
        if getattr(run.optim, name) not in (None, ()):
            raise ValueError(
                f"optim.{name}: packnet prunes all layers of a weight, also those that aren't trained; leave it out"
            )


def keeps(run: config.Run) -> bool:
    """Says whether a run keeps anything of what was before."""
    return bool(run.continual.methods) or run.continual.heads or separate(run)


def separate(run: config.Run) -> bool:
    """Says whether a run has an adapter, or a column of one, for itself, so that earlier tasks keep theirs."""
    return run.continual.adapters == "task" or columns(run) is not None


def columns(run: config.Run) -> Columns[Any] | None:
    growth = adapters.METHODS.of(run.adapter).growth
    return None if growth is None else growth.columns


def replays(c: Continual) -> bool:
    """Says whether any method keeps rows."""
    return any(name in c.methods for name in REPLAYS)


def writes(c: Continual) -> bool:
    """Says whether the model writes the earlier rows itself."""
    return replays(c) and c.replay.source == "model"


def reads_old_data(c: Continual) -> bool:
    """Says whether anything is made of the data of the task right before the run."""
    return "ewc" in c.methods or "mas" in c.methods or (replays(c) and c.replay.source == "data")


def check_writes(run: config.Run, task: Task, objective: BoundObjective) -> None:
    """Raises ValueError where the model can't write rows of the task right before the run."""
    name, own = objective.name, registry.name_of(run.objective)
    if objective.writes is None:
        raise ValueError(
            f"continual.replay.source: a model can't write rows of {task.name}, whose objective is {name}; set it to "
            "data, or choose lwf in continual.methods, which needs no old data either"
        )
    if objective.writes.asked is not None and objective.objective is not OBJECTIVES.of(run.objective):
        raise ValueError(
            f"continual.replay.source: {task.name} answers texts of {name}, which the new data have to hold, and they "
            f"are for {own}; set it to data"
        )


def replay_rows(run: config.Run, tasks: int, multiple: int) -> int:
    """Returns how many rows of a batch are earlier ones: the multiple of what devices and micro-batches need that is
    nearest to the share asked for. ValueError: no new rows would be left."""
    if not tasks or not replays(run.continual):
        return 0
    unit = multiple * run.train.micro_batches * (tasks if "gem" in run.continual.methods else 1)
    share, size = run.continual.replay.share, run.train.batch_size
    rows = max(1, round(share * size / unit)) * unit
    if rows >= size:
        raise ValueError(
            f"continual.replay.share: {rows} of train.batch_size {size} rows would be earlier ones, in multiples of "
            f"{unit}; raise train.batch_size"
        )
    return rows
