"""Holds what a run knows of the tasks that its model learned before: their objectives and heads, and what its methods
of continual learning do with them in a step."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.assembly.continual_methods import (
    PACKNET,
    PENALTIES,
    TEACHERS,
    TRACKED,
    check_writes,
    columns,
    keeps,
    replays,
    separate,
    writes,
)
from jaxlm.assembly.model_source import StartModel
from jaxlm.assembly.run_objective import BoundObjective, bind, row_shape
from jaxlm.assembly.task_index import FOLDER, INDEX, Task, read_index, task_of
from jaxlm.core import config, registry, tree
from jaxlm.core.continual import Continual
from jaxlm.data import replay
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.objectives import OBJECTIVES, outputs
from jaxlm.objectives.objective import DeviceBatch, Sums
from jaxlm.training.adafactor import own_axes
from jaxlm.training.continual import packnet, path, penalty, projection
from jaxlm.training.step import Keeping, State
from jaxlm.weights.adapters.adapted import Adapted

HEADS = "tasks"  # the weights of earlier tasks, heads and adapters, stand at `tasks/NAME/…`


def earlier_tasks(run: config.Run, start: StartModel) -> tuple[Task, ...]:
    """Returns the tasks before this run: those of its own directory, else of the run that it starts from and that run's
    own, else, where the run names earlier data, one of its own objective."""
    if not keeps(run):
        return ()
    if (run.folder / FOLDER / INDEX).is_file():
        return tuple(read_index(run.folder))
    source = start.source if run.start else None
    before = source.run if source is not None else None
    if run.continual.old:
        if separate(run):
            raise ValueError("continual.old: each task keeps an adapter, or a column of one, of its own; leave it out")
        template = source.templates.get("default") if source is not None else None
        return (Task("before", run.objective, run.train.seq_len, template, run.continual.old, own_head=False),)
    if source is not None and before is None and separate(run) and source.adapter != config.Adapter():
        raise ValueError(
            f"start: {run.start} has an adapter of a task that has no name here; merge it first: jaxlm export "
            f"{run.start} MERGED --format hf"
        )
    if before is None and source is not None and writes(run.continual):  # a published model: it speaks for itself
        template = source.templates.get("default")
        return (Task("before", run.objective, run.train.seq_len, template, (), own_head=False),)
    if before is None or source is None:
        return ()
    tasks = [*read_index(source.path), task_of(before, source.templates.get("default"))]
    if PACKNET in before.continual.methods:
        tasks[-1] = dataclasses.replace(tasks[-1], packed=1 + max((task.packed for task in tasks), default=0))
    elif PACKNET in run.continual.methods and source.is_trained_here:
        raise ValueError(
            f"continual.methods: packnet keeps what was trained with it, and {source.path} was not: train that with "
            f"--continual.methods packnet; to start from it and not keep it: jaxlm export {source.path} MODEL"
        )
    taken = [task.name for task in tasks]
    if twice := next((name for name in taken if taken.count(name) > 1), None):
        raise ValueError(f"start: two earlier tasks have the name {twice!r}; rename the run directory")
    return tuple(_beside(task, run, source.adapter) for task in tasks)


def _beside(task: Task, run: config.Run, before: config.Adapter) -> Task:
    """Returns a task as a run sees it that goes on: with what it is used with, of which the run may train nothing, or
    with a head of its own unless the run's is the same. `before`: the adapter of the model that the run starts from."""
    if separate(run) and task.adapter == "shared":
        growing = columns(run)
        if type(before) is config.Adapter:
            task = dataclasses.replace(task, adapter="none")
        elif growing is None:
            task = dataclasses.replace(task, adapter="own")
        elif isinstance(before, type(run.adapter)):  # another one is refused where its weights are read
            task = dataclasses.replace(task, adapter="column", column=growing.last(before))
    has_head = bool(OBJECTIVES.of(task.objective).specs(task.objective, run.model.width))
    return dataclasses.replace(task, own_head=has_head and (task.kept_whole or task.objective != run.objective))


@dataclass(frozen=True)
class Earlier:
    """The earlier tasks of a program, bound to its tokenizer, and what a step does with them."""

    c: Continual
    tasks: tuple[Task, ...]
    objectives: tuple[BoundObjective, ...]
    rows: int = 0
    """How many of a batch's rows are earlier ones."""
    share: float = 0.0
    """Their share of it."""
    adapter: Adapted | None = None
    """The model with the run's adapter, which tells of the tasks' own; None: there are no tasks."""

    @cached_property
    def replays(self) -> bool:
        """Says whether batches hold earlier rows."""
        return replays(self.c) and bool(self.tasks)

    @property
    def projects(self) -> bool:
        """Says whether earlier rows bound the gradient instead of being learned."""
        return self.replays and ("agem" in self.c.methods or "gem" in self.c.methods)

    @property
    def needs_teacher(self) -> bool:
        """Says whether a step needs the weights that training starts from."""
        return any(name in self.c.methods for name in TEACHERS) and bool(self.tasks)

    @property
    def compares(self) -> bool:
        """Says whether a step compares predictions or states of rows whose loss it computes."""
        return self.needs_teacher or (self.replays and {"replay", "der"} <= set(self.c.methods))

    @property
    def packed(self) -> int:
        """Returns how many earlier tasks own weights that a step must leave as they are."""
        return max((task.packed for task in self.tasks), default=0) if PACKNET in self.c.methods else 0

    def plan(self, specs: Any, head: Any, steps: int) -> packnet.Plan:
        """Returns what a run of so many steps prunes of weights with these specs: matrices, but not those of the
        objective's own `head`, all of which the first task with that head keeps."""

        def axes(path: str) -> tuple[int, ...] | None:
            s = tree.at(specs, path)
            return own_axes(s) if s.is_matrix and path.split("/")[0] not in head else None

        keep = packnet.share(self.c.packnet, self.packed + 1)
        return packnet.Plan(axes, keep, packnet.last_dense_step(self.c.packnet, steps))

    def describe(self) -> dict[str, str]:
        """Returns a line on what is kept, for people; nothing where no method is named and no task is kept whole."""
        if not self.c.methods:
            whole = " ".join(task.name for task in self.tasks if task.kept_whole)
            return {"continual": f"{whole}: kept whole, with heads and adapters of their own"} if whole else {}
        if PACKNET in self.c.methods:
            keep = packnet.share(self.c.packnet, self.packed + 1)
            return {"continual": f"packnet: task {self.packed + 1}, which keeps {keep:.3g} of the free weights"}
        methods = " ".join(self.c.methods)
        if not self.tasks:
            return {"continual": f"{methods}: nothing was learned before this run, so they act from the next one on"}
        rows = f"; {self.share:.0%} of each batch's rows are earlier ones" if self.rows else ""
        return {"continual": f"{methods} for {' '.join(task.name for task in self.tasks)}{rows}"}

    def specs(self, width: int) -> dict[str, Any]:
        """Returns the specs of what earlier tasks have for themselves: heads and adapters."""
        out: dict[str, Any] = {}
        for task in self.tasks:
            own = OBJECTIVES.of(task.objective).specs(task.objective, width) if task.own_head else {}
            if task.adapter == "own":
                assert self.adapter is not None
                own = own | {"adapter": self.adapter.specs()["adapter"]}
            if own:
                out[task.name] = own
        return {HEADS: out} if out else {}

    def trainable(self, path: str) -> bool:
        """Returns whether a weight is trained as far as this is concerned: earlier heads are where something holds
        them, unless their task is kept whole."""
        if not path.startswith(f"{HEADS}/"):
            return True
        whole = any(task.kept_whole and task.name == path.split("/")[1] for task in self.tasks)
        return not whole and (self.replays or "lwf" in self.c.methods)

    def weights_for(self, weights: Any, task: Task) -> Any:
        """Returns the weights with the head and the adapter of an earlier task in the place of the run's."""
        own = weights.get(HEADS, {}).get(task.name, {})
        if task.adapter == "none":
            weights = {name: value for name, value in weights.items() if name != "adapter"}
        if task.adapter == "column":
            assert self.adapter is not None
            own = own | {"adapter": self.adapter.column(weights["adapter"], task.column)}
        return weights | own

    def totals(self, batch: DeviceBatch) -> dict[str, jax.Array]:
        """Returns the total weights of the losses on earlier rows."""
        _, parts = replay.parted(batch)
        return {
            _name(i, loss): total
            for i, part in parts.items()
            for loss, total in self.objectives[i].totals(part).items()
        }

    def replayed(self, model: Model, weights: Any, batch: DeviceBatch, key: jax.Array | None) -> Sums:
        """Computes the losses on the earlier rows of a batch, by the share that they have in it."""
        _, parts = replay.parted(batch)
        scale = 1.0 if self.projects else self.share
        out: Sums = {}
        for i, part in parts.items():
            objective, own = self.objectives[i], self.weights_for(weights, self.tasks[i])
            if "der" not in self.c.methods or "replay" in self.c.methods:
                sums = objective.loss(model, own, part, key)
            else:
                sums = {loss: {"loss": jnp.zeros(())} for loss in objective.totals(part)}
            if "der" in self.c.methods:
                now = objective.outputs(model, own, part)
                apart = outputs.stored_difference(now, part["stored"], part["stored_classes"], model.shard)
                der, name = outputs.total(apart, now), next(iter(sums))
                sums |= {name: sums[name] | {"loss": sums[name]["loss"] + self.c.der.strength * der, "der": der}}
            out |= {_name(i, loss): values | {"loss": scale * values["loss"]} for loss, values in sums.items()}
        return out

    def kept(self, model: Model, weights: Any, teacher: Any, batch: DeviceBatch, own: BoundObjective) -> dict[str, Any]:
        """Computes what keeps the model's outputs and states on the new rows to those of the teacher, as sums over
        places by their weights, by name, with the strengths applied."""
        out: dict[str, Any] = {}
        teacher = jax.lax.stop_gradient(teacher)
        if "lwf" in self.c.methods:
            out["lwf"] = jnp.zeros(())
            for task, objective in self.alike(own):
                before, now = (objective.outputs(model, self.weights_for(w, task), batch) for w in (teacher, weights))
                how = outputs.Measure(temperature=self.c.lwf.temperature)
                apart = outputs.divergence(before, now, how, model.shard)
                out["lwf"] += self.c.lwf.strength * outputs.total(apart, now)
        if "features" in self.c.methods:
            old, new = (model.forward(w, batch).x_BTD.astype(jnp.float32) for w in (teacher, weights))
            real_BT = (batch["segments"] > 0).astype(jnp.float32)
            apart = (jnp.square(new - old).mean(-1) * real_BT).sum()
            size = (jnp.square(old).mean(-1) * real_BT).sum()
            weight = sum(jax.tree.leaves(own.totals(batch)), jnp.zeros(()))
            out["features"] = self.c.features.strength * weight * apart / jnp.maximum(size, 1e-9)
        return out

    def alike(self, own: BoundObjective) -> list[tuple[Task, BoundObjective]]:
        """Returns the earlier tasks whose predictions on new rows can be compared: those of the run's own objective.
        Those that share its head, or the vocabulary's, count once."""
        pairs = zip(self.tasks, self.objectives, strict=True)
        alike = [(task, o) for task, o in pairs if o.objective is own.objective]
        shared = [pair for pair in alike if not pair[0].own_head]
        return [pair for pair in alike if pair[0].own_head] + shared[:1]

    def tracks(self, params: Any) -> Any:
        """Returns what is noted along the way, at the first update; None: nothing."""
        made = {"si": path.si_start, "rwalk": path.rwalk_start,
                PACKNET: lambda w: {"pruned": packnet.nothing_pruned(w)}}  # fmt: skip
        return {name: start(params) for name, start in made.items() if name in self.c.methods} or None

    def tracks_like(self, trees: Any, masks: Any) -> Any:
        """Returns the tracks with `trees` in the place of each tree of a float32 number for each trained weight, and
        `masks` in that of one of an int8 number: their shardings, or their bytes."""
        parts = {"si": ("path", "start"), "rwalk": ("fisher", "score")}
        out = {name: dict.fromkeys(names, trees) for name, names in parts.items() if name in self.c.methods}
        return out | ({PACKNET: {"pruned": masks}} if PACKNET in self.c.methods else {}) or None

    def keeping(self, rows: int, specs: Any, head: Any, steps: int) -> Keeping:
        """Returns what the methods do to an update whose batch has `rows` rows, in a run of so many steps that trains
        weights with these specs, and of them an objective's own `head`."""
        if PACKNET in self.c.methods:
            return self._packing(self.plan(specs, head, steps))
        c, penalties = self.c, [name for name in PENALTIES if name in self.c.methods and self.tasks]
        tracked = [name for name in TRACKED if name in c.methods]

        def pull(params: Any, memory: Any) -> jax.Array:
            each = [getattr(c, name).strength * penalty.value(penalty.Quadratic(**memory[name]), params)
                    for name in penalties]  # fmt: skip
            return sum(each, jnp.zeros(()))

        def observe(tracks: Any, gradient: Any, old: Any, new: Any) -> Any:
            out = {}
            if "si" in tracked:
                out["si"] = path.si_observe(tracks["si"], gradient, old, new)
            if "rwalk" in tracked:
                out["rwalk"] = path.rwalk_observe(c.rwalk, tracks["rwalk"], gradient, old, new, rows)
            return out

        keeping = Keeping(penalty=pull if penalties else None, observe=observe if tracked else None)
        if not self.projects:
            return keeping

        def parts(batch: Any) -> list[Any]:
            own, earlier = replay.parted(batch)
            return [own, *({replay.key(i, name): leaf for name, leaf in part.items()} for i, part in earlier.items())]

        def combine(gradients: list[Any]) -> Any:
            own, *references = gradients
            if not references:  # a batch that is made for its shapes alone
                return own
            if "gem" in c.methods:
                return projection.gem(own, references, c.gem.margin)
            return projection.agem(own, references[0])

        return keeping._replace(parts=parts, combine=combine, learned=lambda loss: not loss.startswith("replay"))

    def _packing(self, plan: packnet.Plan) -> Keeping:
        """Returns what PackNet does to an update."""

        def owner(state: State) -> Any:
            return state.memory[PACKNET]["owner"] if self.packed else None

        def movable(gradient: Any, state: State) -> Any:
            return packnet.masked(gradient, state.tracks[PACKNET]["pruned"], owner(state))

        def settle(old: State, new: State) -> State:
            number, before = old.step + 1, old.tracks[PACKNET]["pruned"]
            params, pruned = packnet.settled(plan, number, old.params, new.params, before, owner(old))
            average = None if new.ema is None else packnet.within(new.ema, params, pruned, owner(old))
            return new.replace(params=params, ema=average, tracks=new.tracks | {PACKNET: {"pruned": pruned}})

        return Keeping(movable=movable, settle=settle)


def _name(task: int, loss: str) -> str:
    return f"replay{task}.{loss}"


def of_directory(folder: Path, run: config.Run) -> Earlier:
    """Returns what a run directory says of earlier tasks, as far as weights are concerned."""
    return Earlier(run.continual, tuple(read_index(folder)), (), adapter=_adapted(run))


def _adapted(run: config.Run) -> Adapted:
    return Adapted(run.adapter, MODELS.of(run.model), run.model, run.compression)


def with_heads(earlier: Earlier, before: config.Run, known: Sequence[Task], weights: Any) -> Any:
    """Returns the weights of the run before with its heads and adapters where the run that goes on from it has them.

    `known`: the earlier tasks of the run before. Its own head and adapter, which stand at the top, and those at
    `tasks/` become those of earlier tasks, or the run's own where that goes on with them.
    """
    own = OBJECTIVES.of(before.objective).specs(before.objective, before.model.width)
    stored = weights.get(HEADS, {})
    parts = {name: {k: x for k, x in values.items() if k != "adapter"} for name, values in stored.items()}
    heads = {task.name: parts[task.name] for task in known if task.own_head}
    top = {name: weights[name] for name in own}
    out = {name: value for name, value in weights.items() if name not in own and name != HEADS}
    shared = out.pop("adapter", None) if earlier.c.adapters == "task" else out.get("adapter")
    mine: dict[str, Any] = {}
    for task in earlier.tasks:
        head = heads.get(task.name, top)
        of_task = dict(head) if task.own_head else {}
        if task.adapter == "own":
            of_task["adapter"] = stored.get(task.name, {}).get("adapter", shared)
        if of_task:  # copies, for tasks which shared a head or an adapter no longer do
            mine[task.name] = jax.tree.map(jnp.copy, of_task)
        if not task.own_head:
            out |= head
    return out | ({HEADS: mine} if mine else {})


def nothing() -> Earlier:
    """Returns what a run knows that comes after nothing."""
    return Earlier(Continual(), (), ())


def bound(run: config.Run, tasks: Sequence[Task], tokens: Any, rows: int) -> Earlier:
    """Binds the earlier tasks of a run. `rows`: how many of a batch's rows are earlier ones."""
    if "lwf" in run.continual.methods and tasks:
        own = OBJECTIVES.of(run.objective)
        if not any(OBJECTIVES.of(t.objective) is own for t in tasks):
            raise ValueError(
                f"continual.methods: lwf compares predictions of {registry.name_of(run.objective)}, and no earlier "
                "task made such; choose another method, such as features or replay"
            )
    objectives = tuple(bind(t.objective, tokens, row_shape(t.seq_len, run.model, t.template, run.adapter))
                       for t in tasks)  # fmt: skip
    if run.continual.methods and any(task.kept_whole for task in tasks) and separate(run):
        raise ValueError(
            f"continual.methods: {registry.name_of(run.adapter)} gives each task a column of its own, so that there is "
            "nothing to keep; leave the methods out"
        )
    adapter = _adapted(run)
    if adapter.num_virtual_tokens and (bare := [task.name for task in tasks if task.adapter == "none"]):
        raise ValueError(
            f"continual.adapters: {bare[0]} was learned without virtual tokens, which {adapter.name} puts before every "
            "text; choose lora as the adapter"
        )
    if tasks and writes(run.continual):
        check_writes(run, tasks[-1], objectives[-1])
    made = Earlier(run.continual, tuple(tasks), objectives, rows, rows / run.train.batch_size, adapter)
    made.describe()  # refuses a task for which no weights are left
    return made
