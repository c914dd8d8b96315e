"""Reads tables as rows with named cells: CSV, TSV, JSON lines, a JSON list, or a TFDS name."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data.sources import tfds


class Row(NamedTuple):
    """A row maps the names of columns to cells."""

    where: str
    """File and line, for error messages."""
    cells: dict[str, Any]

    def text(self, name: str, field: str) -> str:
        """Returns a cell as text. Raises ValueError if it is missing; `field` is the setting that names the column."""
        value = self.cells.get(name)
        if value is None or isinstance(value, list | dict):
            columns = ", ".join(self.cells) or "none"
            raise ValueError(f"{self.where}: no text {name!r}; columns there: {columns}. Set {field} to one of them")
        return value.strip() if isinstance(value, str) else str(value)

    def words(self, name: str, field: str) -> tuple[str, ...]:
        """Returns a cell that is a list of texts. Raises ValueError if it is missing; `field` names its setting."""
        value = self.cells.get(name)
        if not isinstance(value, list) or not all(isinstance(v, str | int) for v in value):
            lists = ", ".join(k for k, v in self.cells.items() if isinstance(v, list)) or "none"
            raise ValueError(f"{self.where}: no list {name!r}; lists there: {lists}. Set {field} to one of them")
        return tuple(map(str, value))


def read(source: str, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yields the rows of a table in order.

    `columns` names the cells of a CSV or TSV file whose first line is no header. Raises ValueError, which names file
    and line, for what isn't a table.
    """
    if source.startswith("tfds:"):
        yield from _tfds(source)
        return
    path = existing_file(source)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"data source {source} is no table: known are {', '.join(READERS)} and tfds:NAME")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from reader(str(path), file, list(columns))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: convert it (iconv -t utf-8)") from error


def existing_file(source: str) -> Path:
    """Returns the path of a source that must be a file. Raises ValueError if it doesn't exist."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"data source {source!r} does not exist: give a file, or tfds:NAME/CONFIG[:split] for a table")
    return path


def _csv(path: str, file: Any, columns: list[str]) -> Iterator[Row]:
    lines = csv.reader(file)
    # A quoted cell may hold line breaks, so the line that names a row is its last.
    yield from _rows(path, ((lines.line_num, cells) for cells in lines), columns)


def _tsv(path: str, file: Any, columns: list[str]) -> Iterator[Row]:
    """Reads cells that hold neither tabs nor line breaks; quotes are part of the text, as in GLUE's files."""
    yield from _rows(path, ((n, line.rstrip("\r\n").split("\t")) for n, line in _lines(file)), columns)


def _lines(file: Any) -> Iterator[tuple[int, str]]:
    """Yields numbered lines that aren't blank. They end in "\\n" alone: other separators are part of a text."""
    return ((n, line) for n, line in enumerate(file, 1) if line.strip())


def _rows(path: str, numbered: Iterator[tuple[int, list[str]]], columns: list[str]) -> Iterator[Row]:
    for number, cells in numbered:
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
        yield _record(f"{path}:{number}", value)


def _json(path: str, file: Any, columns: list[str]) -> Iterator[Row]:
    try:
        values = json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(values, list):
        raise ValueError(f"{path}: a {type(values).__name__}, where a list of records is due")
    for number, value in enumerate(values):
        yield _record(f"{path}[{number}]", value)


def _record(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a {type(value).__name__}, where an object is due")
    return Row(where, value)


def _tfds(source: str) -> Iterator[Row]:
    """Yields the rows of a TFDS split; numbers of classes become their names."""
    name, _, part = source.removeprefix("tfds:").partition(":")
    features = tfds.builder(name).info.features
    for number, row in enumerate(tfds.rows(name, part or "train")):
        yield Row(f"{source}[{number}]", {key: _plain(value, features[key]) for key, value in row.items()})


def _plain(value: Any, feature: Any) -> Any:
    # Values and features are NumPy's and TFDS's: only some have `tolist`, `feature` (of a sequence) and `int2str`.
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list | tuple):
        return [_plain(v, getattr(feature, "feature", feature)) for v in value]
    if isinstance(value, dict):
        inner = getattr(feature, "feature", feature)
        return {key: _plain(v, inner[key]) for key, v in value.items()}
    if hasattr(feature, "int2str") and isinstance(value, int):
        return feature.int2str(value) if value >= 0 else None  # TFDS marks a missing label by -1
    return value


READERS = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".json": _json}
