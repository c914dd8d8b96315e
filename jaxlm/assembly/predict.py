"""Inputs without labels are labelled by a fine-tuned model: texts, or rows of a table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxlm.assembly import corpus
from jaxlm.assembly.open_model import Place, open_model, program
from jaxlm.core.errors import one_line
from jaxlm.core.registry import name_of
from jaxlm.data.labelled import tables
from jaxlm.data.text_input import parse_json, read_lines
from jaxlm.objectives import OBJECTIVES
from jaxlm.objectives.objective import Use
from jaxlm.runtime import mesh

Input = str | Mapping[str, Any]
"""A text, or the named parts of an input, such as `{"question": …, "context": …}`."""


def predict(
    place: Place, inputs: Sequence[Input] | None = None, *, data: str | None = None, step: int | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the parts of each input by name, and what the model says of it. Inputs are given, or in a file `data`: a
    table, or a text a line of a .txt file.

    ValueError: the model wasn't fine-tuned for a labelled task, or an input lacks a part.
    """
    opened = open_model(place, step)
    source = opened.source
    settings = source.objective
    prediction = None if settings is None else OBJECTIVES.of(settings).prediction
    use: Use | None = None if prediction is None else prediction.use
    if use is None:
        what = "its files hold no head for a task" if settings is None else f"it was trained for {name_of(settings)}"
        raise ValueError(f"model: {source.path} predicts no labels: {what}; fine-tune it for a labelled task, or "
                         "generate text with it")  # fmt: skip
    rows = list(_rows(use, settings, inputs or [], data))
    if not rows:
        raise ValueError(f"data: {data} holds no input" if data else "inputs: there are none")
    # Inputs have no labels: the run's own validation data is not read.
    p = program(opened, ["inputs"], settings=settings if source.is_trained_here else use.fit(settings, rows))
    objective = p.objective
    records = use.records(objective.settings, rows, objective.row, objective.tokenizer)
    with mesh.on_mesh(p.mesh):
        predictions = corpus.predictions(p, opened.params, records)
    return [row.cells for row in rows], use.told(objective.settings, records, predictions)


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
