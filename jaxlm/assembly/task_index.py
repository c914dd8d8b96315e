"""Names the tasks that a run's model learned before the run: what each was, and which weights of the model are its."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxlm.core import config, config_io, registry
from jaxlm.objectives import OBJECTIVES

FOLDER = "memory"
INDEX = "tasks.json"
STATISTICS = "states.npz"


@dataclass(frozen=True)
class Task:
    """A task is what the model learned before a run."""

    name: str
    objective: Any
    """The settings of its objective."""
    seq_len: int
    template: str | None = None
    data: tuple[str, ...] = ()
    """The sources that it was trained on."""
    own_head: bool = True
    """It has a head besides that of the run; else it shares that, or has none."""
    adapter: Literal["shared", "own", "column", "none"] = "shared"
    """shared: it is used with the run's adapter, if that has one; own: with one besides; column: with columns of the
    run's; none: with the base alone."""
    column: int = 0
    """Of an adapter in columns, its own."""
    packed: int = 0
    """Its number, from 1, among the tasks that own weights (PackNet); 0: it owns none."""
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    holdout: float = 0.0
    text_field: str = "text"

    @property
    def kept_whole(self) -> bool:
        """Says whether all that it is used with stays as it was."""
        return self.adapter != "shared"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        name = registry.name_of(self.objective)
        return dataclasses.asdict(self) | {"objective": {"family": name} | dataclasses.asdict(self.objective)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Task":
        """Returns the task of what `to_dict` returned."""
        objective = config_io.objective_from_dict(values["objective"], OBJECTIVES)
        lists = {name: tuple(value) for name, value in values.items() if name in ("data", "valid", "test")}
        return cls(**{**values, **lists, "objective": objective})


def task_of(run: config.Run, template: str | None) -> Task:
    """Returns what a run trained as a task that is over."""
    data = run.data
    return Task(
        run.name, run.objective, run.train.seq_len, template, data.train, valid=data.valid, test=data.test,
        holdout=data.holdout, text_field=data.text_field,
    )  # fmt: skip


def read_index(folder: Path) -> list[Task]:
    """Returns the earlier tasks that a run directory names; none where it has no memory."""
    file = folder / FOLDER / INDEX
    if not file.is_file():
        return []
    return [Task.from_dict(values) for values in json.loads(file.read_text("utf-8"))["tasks"]]
