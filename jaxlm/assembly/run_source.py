"""A run is loaded from a config file, a run directory, a function or a `Run`, and its fields are overridden."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.assembly import new_data, open_model, run_directory, run_objective, task_heads
from jaxlm.assembly.model_source import StartModel
from jaxlm.core import config, config_io, registry
from jaxlm.models import MODELS
from jaxlm.training import optimizers
from jaxlm.weights.adapters import METHODS

RunSource = str | Path | config.Run | Callable[[], config.Run]
"""A config file's path or bare name, the `config.json` of a run, a run directory, a `Run`, or a function that returns
one."""


class Base(NamedTuple):
    """A run before it is overridden, and the model that it starts from."""

    run: config.Run
    start: StartModel
    """Its place is empty where the run starts from no model."""
    written: config.Run
    """The run as its file has it, without what the model that it starts from says."""
    in_directory: bool = False
    """Whether the run was read from its run directory."""


def load_base(source: RunSource, start: str = "") -> Base:
    """Returns the run of a source; one that starts from a model has that model's architecture. `start` names another
    model to start from than the run does."""
    if isinstance(source, str | Path) and Path(source).is_dir():
        folder = Path(source)
        run = run_directory.read_config(folder)
        run = dataclasses.replace(run, name=folder.resolve().name, out=str(folder.parent))
        return Base(run, StartModel(run.start), run, in_directory=True)
    if isinstance(source, str | Path) and Path(source).suffix == ".json":
        run = run_directory.read_config_file(Path(source))
        return Base(run if start in ("", run.start) else open_model.starting(run, StartModel(start)),
                    StartModel(start or run.start), run)  # fmt: skip
    run = _run_of(source)
    model = StartModel(start or run.start)
    return Base(open_model.starting(run, model) if model.place else run, model, run)


def _run_of(source: RunSource) -> config.Run:
    if isinstance(source, str | Path):
        return config_io.load(config_io.find(source))
    run = source if isinstance(source, config.Run) else source()
    if not isinstance(run, config.Run):
        raise ValueError(f"config: the function returned {type(run).__name__}, not a Run")
    return run


def overridden(run: config.Run, changes: Mapping[str, Any]) -> config.Run:
    """Returns the run with changed fields. Keys are names of fields or of parts, with dots between them; the value of a
    part is another part, or a mapping with some of its fields. `adapter` takes a method's name too; a mapping of a
    model, an objective or an adapter may name its family, as `config.json` does.

    ValueError: there is no such field, or the value isn't of its type.
    """
    changes = dict(changes)
    for key in ("model", "objective", "adapter"):
        if not (isinstance(part := changes.get(key), Mapping) and "family" in part):
            continue
        changes[key] = {name: value for name, value in part.items() if name != "family"}
        if key == "adapter":
            run = config_io.with_adapter(run, str(part["family"]), METHODS)
        elif part["family"] != (own := registry.name_of(getattr(run, key))):
            raise ValueError(f"{key}.family: {part['family']!r}, but the run's is {own!r}; choose another config")
    if isinstance(changes.get("adapter"), str):
        run = config_io.with_adapter(run, changes.pop("adapter"), METHODS)
    return config_io.changed(run, changes)


def begun(base: Base, run: config.Run) -> tuple[config.Run, StartModel]:
    """Returns the whole run that a base becomes by changes, `run`, and the model that it starts from.

    A run directory's run that is to learn other data becomes a new one beside it, which starts from the run there.
    ValueError: that isn't finished, or as `completed`.
    """
    follows = base.in_directory and new_data.learns_anew(base.run, run)
    if follows:
        run = new_data.following(base.run, run)
    start = base.start if base.start.place == run.start else StartModel(run.start)
    if follows or not base.in_directory:
        run = open_model.with_chosen_layers(run, start)
    run = completed(run, start)
    if not base.in_directory or start.place != base.start.place:
        run = growing(run, start)
    return new_data.named(base.run, run) if follows else run, start


def growing(run: config.Run, start: StartModel) -> config.Run:
    """Returns the run with what an adapter that grows from run to run takes from the model that the run starts from."""
    if METHODS.of(run.adapter).growth is None:
        return run
    return growing_from(run, start.source.adapter if start.place else config.Adapter())


def growing_from(run: config.Run, before: config.Adapter) -> config.Run:
    """Returns the run with what an adapter that grows from run to run takes from one before."""
    growth = METHODS.of(run.adapter).growth
    return run if growth is None else dataclasses.replace(run, adapter=growth.settings(run.adapter, before))


def completed(run: config.Run, start: StartModel) -> config.Run:
    """Returns the run with what its objective takes from the training data, such as the names of labels, and from the
    head of the model that it starts from.

    ValueError: a field of the run is out of its range, or names no optimizer or schedule; or the data has other labels
    than that head.
    """
    config_io.check(run)
    optimizers.OPTIMIZERS.find(run.optim.name, "optim.name")
    optimizers.SCHEDULES.find(run.optim.schedule, "optim.schedule")
    if start.place:
        run = task_heads.with_labels_of(run, lambda: start.source.objective, start.place)
    return task_heads.with_published_bias(run_objective.infer_from_data(run), MODELS.of(run.model))
