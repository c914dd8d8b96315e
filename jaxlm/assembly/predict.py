"""Inputs without labels are labelled by a fine-tuned model: texts, or rows of a table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxlm.assembly import read_rows
from jaxlm.assembly.model_source import Source
from jaxlm.assembly.open_model import Place, Pretrained, open_model, program
from jaxlm.assembly.program import Program
from jaxlm.core.errors import one_line
from jaxlm.core.registry import name_of
from jaxlm.data.labelled import tables
from jaxlm.data.text_input import parse_json, read_lines
from jaxlm.objectives import OBJECTIVES
from jaxlm.objectives.objective import Use
from jaxlm.runtime import mesh

Input = str | Mapping[str, Any]
"""A text, or the named parts of an input, such as `{"question": …, "context": …}`."""


@dataclass(frozen=True)
class Labeller:
    """A Labeller is an opened model that was fine-tuned for a labelled task; its programs serve many inputs."""

    opened: Pretrained
    use: Use
    settings: Any

    def rows(self, inputs: Sequence[Input], data: str | None = None) -> list[tables.Row]:
        """Returns inputs with their parts by name. ValueError: one lacks a part, or there are none."""
        rows = list(_rows(self.use, self.settings, inputs, data))
        if not rows:
            raise ValueError(f"data: {data} holds no input" if data else "inputs: there are none")
        return rows

    def __call__(self, rows: Sequence[tables.Row]) -> list[dict[str, Any]]:
        """Returns what the model says of each input."""
        trained = self.opened.source.is_trained_here
        p = self._program(self.settings if trained else self.use.fit(self.settings, rows))
        objective = p.objective
        records = self.use.records(objective.settings, rows, objective.row, objective.tokenizer)
        with mesh.on_mesh(p.mesh):
            predictions = read_rows.predictions(p, self.opened.params, records)
        return self.use.told(objective.settings, records, predictions)

    def _program(self, settings: Any) -> Program:
        if settings not in self._programs:
            # Inputs have no labels: the run's own validation data is not read.
            self._programs[settings] = program(self.opened, ["inputs"], settings=settings)
        return self._programs[settings]

    @cached_property
    def _programs(self) -> dict[Any, Program]:
        return {}


def use_of(source: Source) -> Use | None:
    """Returns how a model labels inputs; None: it was not fine-tuned for a labelled task."""
    prediction = None if source.objective is None else OBJECTIVES.of(source.objective).prediction
    return None if prediction is None else prediction.use


def labeller(place: Place, step: int | None = None) -> Labeller:
    """Opens a model that labels inputs. ValueError: it wasn't fine-tuned for a labelled task."""
    opened = open_model(place, step)
    source, settings = opened.source, opened.source.objective
    if (use := use_of(source)) is None:
        what = "its files hold no head for a task" if settings is None else f"it was trained for {name_of(settings)}"
        raise ValueError(f"model: {source.path} predicts no labels: {what}; fine-tune it for a labelled task, or "
                         "generate text with it")  # fmt: skip
    return Labeller(opened, use, settings)


def predict(
    place: Place, inputs: Sequence[Input] | None = None, *, data: str | None = None, step: int | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the parts of each input by name, and what the model says of it. Inputs are given, or in a file `data`: a
    table, or a text a line of a .txt file.

    ValueError: the model wasn't fine-tuned for a labelled task, or an input lacks a part.
    """
    label = labeller(place, step)
    rows = label.rows(inputs or [], data)
    return [row.cells for row in rows], label(rows)


def _rows(use: Use, c: Any, inputs: Sequence[Input], data: str | None) -> Iterable[tables.Row]:
    if data is None:
        return [_row(use, c, f"input {i}", one) for i, one in enumerate(inputs)]
    if not data.lower().endswith(".txt"):
        return use.rows(c, data)
    lines = read_lines(tables.existing_file(data))
    return [_row(use, c, f"{data}:{i}", line.strip()) for i, line in lines if line.strip()]


def _row(use: Use, c: Any, where: str, one: Input) -> tables.Row:
    if isinstance(one, Mapping):
        return tables.Row(where, dict(one))
    if not isinstance(one, str):
        raise ValueError(f"{where}: a {type(one).__name__}, where a text or a mapping is due")
    if not (column := use.column(c)):
        raise ValueError(f"{where}: is one text, and this task's inputs have several parts; give them by name, as JSON")
    return tables.Row(where, {column: one})


def parse(text: str, where: str) -> Input:
    """Returns a text of the command line or of a pipe: a JSON object is named parts, and everything else is a text."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return parse_json(text, where)
    except ValueError as error:
        raise ValueError(f"{where}: begins as JSON and isn't: {one_line(error).removeprefix(f'{where}: ')}") from None
