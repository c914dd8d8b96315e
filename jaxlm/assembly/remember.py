"""Makes what a run keeps of the tasks before it, once, when it begins: importances, rows and the weights at the start.

It is made from the weights that training starts from, so that it doesn't matter whether the run before knew of any
method; only paths (si, rwalk) must have been noted by that run itself. A run directory holds it under `memory/`, which
appears whole or not at all.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.assembly import corpus, earlier, importances, packing, pseudo
from jaxlm.assembly.continual_methods import PACKNET, PENALTIES, TRACKED, keeps, reads_old_data
from jaxlm.assembly.model_source import Source, StartModel
from jaxlm.assembly.program import Program
from jaxlm.assembly.task_index import FOLDER, INDEX, STATISTICS, Task
from jaxlm.core import config
from jaxlm.core.continual import MAS, Ewc
from jaxlm.data import loader, replay
from jaxlm.data.packing import Records, trim_padding
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.objectives import outputs
from jaxlm.runtime import processes
from jaxlm.training.continual import path, penalty
from jaxlm.training.step import State

HOURS = 3600.0
ROWS = "rows{}.npz"
WEIGHTS = "weights"
BLOCK = 256  # rows that are made at a time


def remember(p: Program, state: State, start: StartModel, begins: bool) -> State:
    """Returns the state with what its methods know of earlier tasks, which the run's directory holds, or gets now if
    the run `begins`. ValueError: the directory has lost it, or it can't be made."""
    if not keeps(p.run):
        return state
    folder = p.run.folder / FOLDER
    if not (folder / INDEX).is_file():
        if not begins:
            raise ValueError(f"{folder}: is gone, and what the run keeps of earlier tasks with it; train anew")
        _make(p, state, start, folder)
    if not (kept := kept_like(p)):
        return state
    with Checkpoints(folder / WEIGHTS) as stored:
        return state.replace(memory={name: stored.restore_params(like, item=name) for name, like in kept.items()})


def kept_like(p: Program) -> dict[str, Any]:
    """Returns the shapes and shardings of the trees that an update reads, by name."""
    if not p.earlier.tasks:
        return {}
    return kept_trees(p.earlier, importances.like(p), packing.like(p), p.abstract_state().all_params)


def memory_like(p: Program) -> dict[str, Any] | None:
    """Returns the shapes and shardings of the memory of a state in training: what is kept of earlier tasks, and the
    teacher; None: there is none."""
    return (kept_like(p) | ({} if p.teacher is None else p.teacher.memory_like(p.mesh))) or None


def kept_trees(kept: earlier.Earlier, trained: Any, masks: Any, weights: Any) -> dict[str, Any]:
    """Returns the trees that an update reads, by name, with `trained` in the place of each tree of a float32 number for
    each trained weight, `masks` in that of one of an int8 number, and `weights` in that of all weights."""
    if not kept.tasks:
        return {}
    out = {name: {"importance": trained, "anchor": trained} for name in PENALTIES if name in kept.c.methods}
    out |= {PACKNET: {"owner": masks}} if kept.packed else {}
    return out | ({"teacher": weights} if kept.needs_teacher else {})


def _make(p: Program, state: State, start: StartModel, folder: Path) -> None:
    """Writes the memory of a run that begins."""
    part = folder.with_name(f"{FOLDER}.part")
    if jax.process_index() == 0:
        shutil.rmtree(part, ignore_errors=True)  # of an attempt that was cut off
        part.mkdir()
    processes.barrier("the memory", HOURS)
    before = start.source if p.run.start and not p.run.continual.old else None
    records = _records_of_last(p, before) if p.earlier.tasks and reads_old_data(p.run.continual) else []
    kept: dict[str, Any] = {}
    for name in p.run.continual.methods if p.earlier.tasks else ():
        if name in PENALTIES:
            kept[name] = _penalty(p, state, before, records, name)._asdict()
    if p.earlier.needs_teacher:
        kept["teacher"] = state.all_params
    if p.earlier.packed and before is not None:
        kept[PACKNET] = {"owner": packing.owners(p, before)}
    if kept:
        with Checkpoints(part / WEIGHTS) as stored:
            stored.save(0, kept, {"step": 0}, wait=True)
    rows = _rows(p, state, before, records) if p.earlier.replays else []
    if jax.process_index() == 0:
        if before is not None and (file := before.path / FOLDER / STATISTICS).is_file():
            shutil.copyfile(file, part / STATISTICS)
        for i, task in enumerate(rows):
            np.savez(part / ROWS.format(i), priorities=task.priorities, **task.arrays)  # type: ignore[arg-type]
        index = {"tasks": [task.to_dict() for task in p.earlier.tasks], "trained": importances.trained_paths(p)}
        (part / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")
        part.rename(folder)
    processes.barrier("the memory's end", HOURS)


def _records_of_last(p: Program, before: Source | None) -> list[Records]:
    """Returns the records of the task right before the run, one part a source."""
    c, task, objective = p.run.continual, p.earlier.tasks[-1], p.earlier.objectives[-1]
    if before is not None and before.run is not None:
        data = before.run.data
    else:
        data = config.Data(**{**vars(p.run.data), "train": c.old, "valid": (), "weights": ()})
    if not data.train:
        raise ValueError(f"continual.old: {task.name} names no data of its own; name the sources that stand for it")
    parts = corpus.corpus(data, objective, ["train"]).train
    return [corpus.as_records(objective, part, document_mask=data.document_mask, seed=p.run.seed) for part in parts]


# ---------------------------------------------------------------------------------------------------------- penalties


def _penalty(
    p: Program, state: State, before: Source | None, records: Sequence[Records], name: str
) -> penalty.Quadratic:
    """Returns the penalty of a method for all earlier tasks."""
    c, task = getattr(p.run.continual, name), p.earlier.tasks[-1]
    if name == "l2":
        new = importances.ones(p, state)
    elif name in TRACKED:
        tracks = _tracks(p, before, name)
        new = path.si_importance(c, tracks, state.params) if name == "si" else path.rwalk_importance(tracks)
    else:
        chosen = replay.Chosen.first(records, p.run.seed, f"{task.name}:{name}", c.examples)
        batches = loader.evaluation_batches(chosen, p.earlier.objectives[-1].example, batch_size=p.multiple * 4)
        new = importances.estimated(p, state, batches, name)
    if not any(float(x.max()) > 0 for x in jax.tree.leaves(new)):
        raise ValueError(
            f"continual.methods: {name} has nothing to hold: the run trains no weight that {task.name} depends on; "
            "choose another method, or train the same weights"
        )
    known = None
    if before is not None and (index := _index(before)) and name in importances.stored(before.path / FOLDER / WEIGHTS):
        read = lambda item: importances.restored(p, before, index["trained"], before.path / FOLDER / WEIGHTS, item)  # noqa: E731
        known = penalty.Quadratic(read(f"{name}/importance"), read(f"{name}/anchor"))
    return penalty.joined(known, new, state.params, c.decay if isinstance(c, Ewc | MAS) else 1.0)


def _index(source: Source) -> dict[str, Any]:
    file = source.path / FOLDER / INDEX
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _tracks(p: Program, before: Source | None, name: str) -> Any:
    """Returns what the run before noted along its way. ValueError: it noted nothing."""
    if before is None or before.run is None or name not in before.run.continual.methods:
        place = "the earlier data" if before is None else before.path
        raise ValueError(
            f"continual.methods: {name} needs the path of the training before, and {place} has none: train that with "
            f"--continual.methods {name}, or choose ewc or mas"
        )
    parts = ("path", "start") if name == "si" else ("fisher", "score")
    trained, folder = _index(before)["trained"], before.path / "checkpoints"
    return {part: importances.restored(p, before, trained, folder, f"tracks/{name}/{part}") for part in parts}


# --------------------------------------------------------------------------------------------------------------- rows


def _rows(p: Program, state: State, before: Source | None, records: Sequence[Records]) -> list[replay.Kept]:
    """Returns the rows that are kept of each earlier task."""
    kept, c = [], p.run.continual.replay
    for i, task in enumerate(p.earlier.tasks[:-1]):
        file = before.path / FOLDER / ROWS.format(i) if before is not None else Path()
        if not file.is_file() and c.source == "model" and p.earlier.objectives[i].writes is not None:
            kept.append(_written(p, state, i))
            continue
        if not file.is_file():
            raise ValueError(
                f"continual.methods: no rows of {task.name} are kept, for the run before this one kept none; name its "
                "sources in continual.old, or leave out what needs earlier rows"
            )
        kept.append(stored_rows(file, task))
    last = len(p.earlier.tasks) - 1
    kept.append(_written(p, state, last) if c.source == "model" else _new_rows(p, records))
    chosen = replay.chosen(kept, examples=c.examples, tokens=c.tokens, balance=c.balance)
    if "der" not in p.run.continual.methods:
        return chosen
    return [_with_logits(p, state, i, task) for i, task in enumerate(chosen)]


def stored_rows(file: Path, task: Task) -> replay.Kept:
    """Reads the rows that are kept of a task."""
    with np.load(file) as values:
        arrays = {name: values[name] for name in values.files if name != "priorities"}
        return replay.Kept(task.name, arrays, values["priorities"])


def _written(p: Program, state: State, i: int) -> replay.Kept:
    """Returns rows of a task that the model writes before it learns the new."""
    if jax.process_index() == 0:
        print(f"continual    the model writes rows of {p.earlier.tasks[i].name}")
    return pseudo.rows(p, state.all_params, i)


def _new_rows(p: Program, records: Sequence[Records]) -> replay.Kept:
    """Returns candidates of the task right before: as many as the memory could hold were they alone in it."""
    c, task, objective = p.run.continual.replay, p.earlier.tasks[-1], p.earlier.objectives[-1]
    total = sum(map(len, records))
    balanced = c.balance == "class"  # its rarest class must be found
    order, priorities = replay.first(p.run.seed, task.name, total, total if balanced or not c.examples else c.examples)
    parts: list[replay.Arrays] = []
    tokens = rows = 0
    for at in range(0, len(order), BLOCK):
        chosen = replay.Chosen(records, order[at : at + BLOCK])
        [block] = loader.evaluation_batches(chosen, objective.example, batch_size=len(chosen))
        parts.append({name: leaf[0] for name, leaf in block.items()})
        rows += len(chosen)
        if not at:
            _check_memory(p, parts[0], min(len(order), c.examples or len(order)))
        tokens += int(np.count_nonzero(parts[-1].get("segments", np.ones(1))))
        if c.tokens and tokens >= c.tokens and not balanced:
            break
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return replay.Kept(task.name, arrays, priorities[:rows])


def _check_memory(p: Program, block: replay.Arrays, rows: int) -> None:
    """Raises ValueError where that many rows don't fit into this machine's memory."""
    each = sum(leaf[0].nbytes for leaf in block.values())
    if "der" in p.run.continual.methods:
        each += 8 * p.run.continual.der.top * max((leaf[0].size for leaf in block.values()), default=0)
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if rows * each > free:
        raise ValueError(
            f"continual.replay.examples: {rows:,} rows of {each:,} bytes are {rows * each / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB of memory are free; keep at most {free // each:,}"
        )


def _with_logits(p: Program, state: State, i: int, kept: replay.Kept) -> replay.Kept:
    """Returns the rows with the largest logits that the model now gives at their places; those that have some keep
    them."""
    if "stored" in kept.arrays or not len(kept):
        return kept
    task, objective = p.earlier.tasks[i], p.earlier.objectives[i]

    def largest(weights: Any, batch: Any) -> Any:
        now = objective.outputs(p.model, p.earlier.weights_for(weights, task), jax.tree.map(lambda x: x[0], batch))
        return outputs.largest(now, p.run.continual.der.top, p.model.shard)

    compute = jax.jit(largest, out_shardings=p.whole)
    size = max(p.multiple, BLOCK // p.multiple * p.multiple // 16)
    values, classes = [], []
    for at in range(0, len(kept), size):
        indices = np.arange(at, at + size).clip(max=len(kept) - 1)  # the last batch is filled up
        batch = {replay.key(i, name): leaf[indices][None] for name, leaf in kept.arrays.items()}
        placed = loader.to_device(batch, p.batch_shardings(batch))
        found = jax.device_get(compute(state.all_params, replay.parted(placed)[1][i]))
        values.append(found[0])
        classes.append(found[1])
    n = len(kept)
    more = {"stored": np.concatenate(values)[:n], "stored_classes": np.concatenate(classes)[:n]}
    return replay.Kept(kept.task, kept.arrays | more, kept.priorities)


def _trimmed(p: Program, i: int, kept: replay.Kept) -> replay.Kept:
    """Returns the rows of a task without the columns that are padding in all of them. It is done once, for every other
    length would be a program of its own."""
    if p.earlier.objectives[i].padding == "keep" or "stored" in kept.arrays or not p.shortens_rows:
        return kept
    return replay.Kept(kept.task, trim_padding(kept.arrays), kept.priorities)


def replayed(p: Program, rows: list[int] | None) -> replay.Replayed | None:
    """Returns the earlier rows of each batch, of which this process makes `rows` of a micro-batch (None: all); None:
    the run keeps none."""
    if not p.earlier.replays:
        return None
    tasks = tuple(_trimmed(p, i, stored_rows(p.run.folder / FOLDER / ROWS.format(i), task))
                  for i, task in enumerate(p.earlier.tasks))  # fmt: skip
    every = "gem" in p.run.continual.methods
    each = p.earlier.rows // p.run.train.micro_batches // (len(tasks) if every else 1)
    mine = None if rows is None else tuple(p.rows(each) or ())
    return replay.Replayed(tasks, p.run.train.micro_batches, each, p.run.seed, every, mine)
