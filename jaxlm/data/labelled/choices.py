"""Reads multiple choice from tables: a context, its choices in one list or in columns, and which choice is right."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxlm.data.labelled import Choice, Split, make_split, tables


class Names(NamedTuple):
    """Names of the columns that are read; several `choices` are one choice each."""

    context: tuple[str, ...] = ("context",)
    choices: tuple[str, ...] = ("choices",)
    answer: str = "answer"


def read(source: str, names: Names | None = None, columns: Sequence[str] = (), first: int = 0) -> Split:
    """Reads the choices of a table.

    Answers are numbers counted from `first`, letters, or names of choices. `columns` names the cells of a CSV or TSV
    file whose first line is no header. Raises ValueError if an answer names no choice.
    """
    return make_split(source, (choice(row, names or Names(), first) for row in tables.read(source, columns)))


def choice(row: tables.Row, names: Names, first: int, labelled: bool = True) -> Choice:
    """Returns the choices of a row; the right one is -1 where it isn't `labelled`. ValueError: says what is wrong."""
    context = " ".join(row.text(name, "objective.context") for name in names.context)
    labels, texts = _labels_and_texts(row, names.choices)
    if len(texts) < 2:
        raise ValueError(f"{row.where}: {len(texts)} choices leave nothing to choose; correct or remove it")
    if not labelled:
        return Choice(row.where, context, tuple(texts), -1)
    answer = row.label(names.answer, "objective.answer")
    if answer in labels:
        number = labels.index(answer)
    elif len(answer) == 1 and answer.isalpha():
        number = ord(answer.upper()) - ord("A")
    else:
        number = int(answer) - first if answer.removeprefix("-").isdecimal() else -1
    if not 0 <= number < len(texts):
        known = ", ".join(labels) or f"{first} to {first + len(texts) - 1}, or A to {chr(ord('A') + len(texts) - 1)}"
        raise ValueError(
            f"{row.where}: {names.answer} {answer!r} is none of the {len(texts)} choices ({known}); correct it, or set "
            f"objective.first to the number of the first choice"
        )
    return Choice(row.where, context, tuple(texts), number)


def _labels_and_texts(row: tables.Row, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns (the names of the choices, empty if they have none, their texts)."""
    if len(names) > 1:
        return [], [row.text(name, "objective.choices") for name in names]
    value: Any = row.cells.get(names[0])
    if isinstance(value, list) and value and all(isinstance(v, dict) and {"label", "text"} <= v.keys() for v in value):
        value = {key: [v[key] for v in value] for key in ("label", "text")}
    if isinstance(value, dict) and {"label", "text"} <= value.keys():
        parts = tables.Row(row.where, value)
        labels, texts = (list(parts.words(key, "objective.choices")) for key in ("label", "text"))
        if len(labels) != len(texts):
            raise ValueError(f"{row.where}: {names[0]} has {len(labels)} labels and {len(texts)} texts; correct it")
        return labels, texts
    return [], list(row.words(names[0], "objective.choices"))
