"""Rows with named cells: CSV, TSV, JSON lines, a JSON list, or a TFDS name."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data import sources


class Row(NamedTuple):
    where: str
    """File and line."""
    cells: dict[str, Any]

    def text(self, name: str, field: str) -> str:
        """A cell that must be there; `field` is the setting that names it."""
        value = self.cells.get(name)
        if value is None or isinstance(value, list | dict):
            there = ", ".join(self.cells) or "none"
            raise ValueError(f"{self.where}: no text {name!r}; columns there: {there}. Set {field} to one of them")
        return value.strip() if isinstance(value, str) else str(value)

    def words(self, name: str, field: str) -> tuple[str, ...]:
        """A list of texts that must be there."""
        value = self.cells.get(name)
        if not isinstance(value, list) or not all(isinstance(v, str | int) for v in value):
            there = ", ".join(k for k, v in self.cells.items() if isinstance(v, list)) or "none"
            raise ValueError(f"{self.where}: no list {name!r}; lists there: {there}. Set {field} to one of them")
        return tuple(map(str, value))


def read(source: str, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of a table in order. `columns` names the cells of a CSV or TSV file whose first line is no header."""
    if source.startswith("tfds:"):
        yield from _tfds(source)
        return
    path = existing(source)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"data source {source} is no table: known are {', '.join(READERS)} and tfds:NAME")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from reader(str(path), file, list(columns))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: convert it (iconv -t utf-8)") from error


def existing(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"data source {source!r} does not exist: give a file, or tfds:NAME/CONFIG[:split] for a table")
    return path


def _csv(path: str, file: Any, columns: list[str]) -> Iterator[Row]:
    lines = csv.reader(file)
    # A quoted cell may hold line breaks: a row is named by its last line.
    yield from _named(path, ((lines.line_num, cells) for cells in lines), columns)


def _tsv(path: str, file: Any, columns: list[str]) -> Iterator[Row]:
    """Cells can hold neither tabs nor line breaks, and quotes are text, as GLUE's files have it."""
    yield from _named(path, ((n, line.rstrip("\r\n").split("\t")) for n, line in _lines(file)), columns)


def _lines(file: Any) -> Iterator[tuple[int, str]]:
    """Lines that end in "\\n" alone: other separators are part of a text."""
    return ((n, line) for n, line in enumerate(file, 1) if line.strip())


def _named(path: str, rows: Iterator[tuple[int, list[str]]], columns: list[str]) -> Iterator[Row]:
    for number, cells in rows:
        if not cells:
            continue
        if not columns:
            columns = [cell.strip() for cell in cells]
        elif len(cells) != len(columns):
            raise ValueError(
                f"{path}:{number}: {len(cells)} cells, where {len(columns)} are due ({', '.join(columns)}); "
                f"correct the line, or the columns' names in objective.columns"
            )
        else:
            yield Row(f"{path}:{number}", dict(zip(columns, cells, strict=True)))


def _jsonl(path: str, file: Any, columns: list[str]) -> Iterator[Row]:
    for number, line in _lines(file):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON record: {error}") from error
        yield _object(f"{path}:{number}", value)


def _json(path: str, file: Any, columns: list[str]) -> Iterator[Row]:
    try:
        values = json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(values, list):
        raise ValueError(f"{path}: a {type(values).__name__}, where a list of records is due")
    for number, value in enumerate(values):
        yield _object(f"{path}[{number}]", value)


def _object(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a {type(value).__name__}, where an object is due")
    return Row(where, value)


def _tfds(source: str) -> Iterator[Row]:
    """Numbers of classes become their names."""
    name, _, part = source.removeprefix("tfds:").partition(":")
    part = part or "train"
    features = sources._tfds_builder(name).info.features
    for number, row in enumerate(sources._tfds_rows(name, part)):
        yield Row(f"{source}[{number}]", {key: _plain(value, features[key]) for key, value in row.items()})


def _plain(value: Any, feature: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(v, getattr(feature, "feature", feature)) for v in value]
    if isinstance(value, dict):
        inner = getattr(feature, "feature", feature)
        return {key: _plain(v, inner[key]) for key, v in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    named = hasattr(feature, "int2str") and isinstance(value, int)
    return (feature.int2str(value) if value >= 0 else None) if named else value


READERS = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".json": _json}
