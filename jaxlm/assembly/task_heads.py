"""Heads of labelled tasks stand in published files as transformers has them; here they meet the objectives that train
them: which settings a file's head means, where its weights stand, and with which labels a run goes on from one."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from jaxlm.core import config, tree
from jaxlm.core.spec import is_spec
from jaxlm.core.weight_names import Name
from jaxlm.formats import huggingface, multimodal
from jaxlm.nn.family import Family, Task, TaskFiles
from jaxlm.objectives import OBJECTIVES
from jaxlm.objectives.objective import TaskHead

SHOWN = 6  # labels that a line names


# ------------------------------------------------------------------------------------------------------------ reading


def describe(folder: Path, family: Family, c: Any) -> tuple[Any, Any]:
    """Returns the config of the model beneath a head that the files hold, and the settings of the objective it belongs
    to; (`c`, None) where they hold none. ValueError: there is no such head here, or its labels are unusable."""
    values = huggingface.read_config(folder)
    architecture = (values.get("architectures") or [""])[0]
    task: Any = architecture.rpartition("For")[2]
    if task not in get_args(Task):
        return c, None
    files, where = family.FILES.task(c, task), f"{folder}/config.json"
    if files is None or multimodal.is_wrapper(values):
        raise ValueError(f"{where}: architectures: the head of {architecture} is not read here; start from the model "
                         "beneath it")  # fmt: skip
    if files.names["task"].file not in huggingface.open_tensors(folder).entries:
        return c, None  # config.json names the class of another model
    head = next(o.head for _, o in OBJECTIVES.items() if o.head is not None and o.head.task == task)
    try:
        settings = head.read(huggingface.read_outputs(values))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return files.config, head.with_bias(settings, "task_bias" in files.names)


def names_of(files: TaskFiles, head: TaskHead) -> dict[str, Name]:
    """Returns where all weights stand, those of the head too, by our paths."""
    ours = {"task": head.weight, "task_bias": f"{head.weight}_bias"}
    return {ours.get(path, path): name for path, name in files.names.items()}


def names_in(family: Family, c: Any, settings: Any) -> tuple[dict[str, Name], tuple[str, ...]]:
    """Returns the names in files of a model with the head of these settings, and patterns of tensors to leave out."""
    head = OBJECTIVES.of(settings).head
    assert head is not None
    files = family.FILES.task(c, head.task)
    assert files is not None, f"no head for {head.task}"
    return names_of(files, head), files.ignored


# ----------------------------------------------------------------------------------------------------------- starting


def fitting(model: Any, family: Family, settings: Any) -> Any:
    """Returns the config of a model that a run starts from, with the layers that the published head of its task reads:
    weights that the start lacks are then new, as in transformers."""
    head = OBJECTIVES.of(settings).head
    files = None if head is None else family.FILES.task(model, head.task)
    if head is None or files is None or _read(model, head.task) == _read(files.config, head.task):
        return model
    return files.config


def _read(c: Any, task: Task) -> tuple[Any, ...]:
    """Returns what a head of this task reads a model's states through."""
    if task in ("SequenceClassification", "MultipleChoice"):
        return c.task_layer, c.mean_pooling
    return (c.task_layer if c.task_layer is not None and c.task_layer.each else None,)


def with_published_bias(run: config.Run, family: Family) -> config.Run:
    """Returns the run whose head has a bias if published heads of the model's family have one, where it leaves that
    open."""
    head = OBJECTIVES.of(run.objective).head
    files = None if head is None else family.FILES.task(run.model, head.task)
    if head is None or files is None:
        return run
    return dataclasses.replace(run, objective=head.with_bias(run.objective, "task_bias" in files.names))


def with_labels_of(run: config.Run, start: Callable[[], Any], place: str) -> config.Run:
    """Returns the run with the labels of the head that it starts from, where it names none and those of its training
    data are among them. `start` gives the settings of that head's objective. ValueError: they aren't."""
    objective = OBJECTIVES.of(run.objective)
    head = objective.head
    if head is None or head.with_labels is None or (mine := head.write(run.objective)).labels:
        return run
    if type(theirs := start()) is not type(run.objective):
        return run
    if mine.problem_type != (known := head.write(theirs)).problem_type:
        return run
    of_data = head.write(objective.infer_from_data(run.objective, run.data.train)).labels
    if unknown := [label for label in of_data if label not in known.labels]:
        remedy = "name all labels in objective.labels for a new head"
        if _unnamed(known.labels):
            remedy = (
                "name its outputs in their order in objective.labels to go on from it, or other labels for a new head"
            )
        raise ValueError(f"start: {place} has a head for {_shown(known.labels)}, and the training data has "
                         f"{_shown(unknown)}; {remedy}")  # fmt: skip
    return dataclasses.replace(run, objective=head.with_labels(run.objective, known.labels))


class Continued(NamedTuple):
    """A Continued says what becomes of the head that a run starts from."""

    kept: bool
    note: str
    """A line that a user should see; empty: nothing is to be said."""


def continued(settings: Any, theirs: Any, place: str) -> Continued:
    """Returns whether a run with these settings goes on from the head of the model it starts from. ValueError: it has
    the same labels in another order."""
    head = OBJECTIVES.of(settings).head
    if head is None or type(theirs) is not type(settings):
        return Continued(True, "")
    mine, known = head.write(settings), head.write(theirs)
    if mine == known:
        return Continued(True, "")
    if mine.problem_type == known.problem_type:
        if sorted(mine.labels) == sorted(known.labels):
            raise ValueError(f"objective.labels: the head of {place} has these labels in the order "
                             f"{','.join(known.labels)}; give them so, or none to go on from it")  # fmt: skip
        if len(mine.labels) == len(known.labels) and _unnamed(known.labels):
            return Continued(True, f"head         that of {place}, whose outputs are now {_shown(mine.labels)}")
    what = _shown(mine.labels) if mine.labels != known.labels else mine.problem_type
    was = _shown(known.labels) if mine.labels != known.labels else known.problem_type
    return Continued(False, f"head         new, for {what}; that of {place} is for {was}")


def _unnamed(labels: tuple[str, ...]) -> bool:
    return all(label == f"LABEL_{i}" for i, label in enumerate(labels))


def _shown(labels: Any) -> str:
    return ", ".join(labels[:SHOWN]) + (f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else "")


# ------------------------------------------------------------------------------------------------------------ writing


class Export(NamedTuple):
    """How a model with a task's head is written."""

    config: Any
    specs: dict[str, Any]
    names: Mapping[str, Name]
    values: dict[str, Any]
    """What config.json says of the architecture and the labels."""
    left_out: list[str]
    """Weights of the model that no output of the head depends on."""


def export(family: Family, c: Any, settings: Any, weights: Any) -> Export:
    """Returns how a model with the head of these settings is written. ValueError: published files can't express it."""
    head = OBJECTIVES.of(settings).head
    assert head is not None
    files = family.FILES.task(c, head.task)
    if files is None:
        kind = c.model_type or "this family"
        raise ValueError(f"{kind}: published files have no head for {head.task}, so this model can't be exported")
    if (mine := _read(c, head.task)) != (theirs := _read(files.config, head.task)):
        raise ValueError(f"model: {files.values()['architectures'][0]} reads states through {_layer(theirs)}, and this "
                         f"model's head through {_layer(mine)}; fine-tune anew with --start")  # fmt: skip
    names = names_of(files, head)
    own = OBJECTIVES.of(settings).specs(settings, c.width)
    if extra := sorted(own.keys() - names.keys()):
        raise ValueError(f"objective.bias: {', '.join(extra)} has no place in files of {c.model_type}; fine-tune anew "
                         "without it")  # fmt: skip
    specs = family.specs(files.config) | own
    for path in (f"{head.weight}_bias",):
        if path in names and path not in own:
            raise ValueError(
                f"objective.bias: files of {c.model_type} have a bias in this head; fine-tune anew with it"
            )
    kept = tree.flatten(specs, is_spec)
    left_out = sorted(path for path in tree.flatten(weights) if path not in kept)
    values = {**files.values(), **huggingface.output_values(head.write(settings))}
    return Export(files.config, specs, names, values, left_out)


def _layer(read: tuple[Any, ...]) -> str:
    layer, *pooling = read
    words = "no layer" if layer is None else f"the layer {layer.weight} ({layer.activation})"
    return words + (" of the mean" if pooling == [True] else "")
