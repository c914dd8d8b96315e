"""Reads tables as rows with named cells: CSV, TSV, JSON lines, a JSON list, or a TFDS name."""

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data.sources import tfds
from jaxlm.data.text_input import decode, kind_of, parse_json, read_json, read_lines, read_text

LONGEST_CELL = 1 << 30  # characters of a CSV cell; Python's own limit of 131,072 is less than an article may have


class Row(NamedTuple):
    """A row maps the names of columns to cells."""

    where: str
    """File and line, for error messages."""
    cells: dict[str, Any]

    def text(self, name: str, field: str) -> str:
        """Returns a cell as text. Raises ValueError if it is missing; `field` is the setting that names the column."""
        value = self.cells.get(name)
        if not isinstance(value, str):
            raise self._missing(name, field)
        return value.strip()

    def label(self, name: str, field: str) -> str:
        """Returns a cell that is a text or a number as text. Raises ValueError as `text` does."""
        value = self.cells.get(name)
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise self._missing(name, field)
        return value.strip() if isinstance(value, str) else str(value)

    def _missing(self, name: str, field: str) -> ValueError:
        columns = ", ".join(self.cells) or "none"
        there = f" but {kind_of(self.cells[name])}" if name in self.cells else ""
        remedy = ", or correct the row" if there else ""
        if not there and re.search(r"\.(csv|tsv)(\.gz)?:", self.where):
            remedy = "; if the first line is no header, name the columns: objective.columns"
        return ValueError(
            f"{self.where}: no text {name!r}{there}; columns there: {columns}. Set {field} to one of them{remedy}"
        )

    def words(self, name: str, field: str) -> tuple[str, ...]:
        """Returns a cell that is a list of texts. Raises ValueError if it is missing; `field` names its setting."""
        value = self.cells.get(name)
        if isinstance(value, list) and (odd := [v for v in value if not isinstance(v, str | int)]):
            raise ValueError(f"{self.where}: {name!r} holds {kind_of(odd[0])} among its texts; correct the row")
        if not isinstance(value, list):
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
    _check_names("objective.columns", list(columns))
    yield from reader(path, list(columns))


def existing_file(source: str) -> Path:
    """Returns the path of a source that must be a file. Raises ValueError if it doesn't exist."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"data source {source!r} does not exist: give a file, or tfds:NAME/CONFIG[:split] for a table")
    return path


def _csv(path: Path, columns: list[str]) -> Iterator[Row]:
    lines = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    limit = csv.field_size_limit(LONGEST_CELL)  # of the whole process, so it is put back
    try:
        # A quoted cell may hold line breaks, so the line that names a row is its last.
        numbered = [(lines.line_num, cells) for cells in lines]
    except csv.Error as error:
        raise ValueError(f"{path}:{lines.line_num}: not CSV: {error}; correct the line's quotes") from error
    finally:
        csv.field_size_limit(limit)
    yield from _rows(path, iter(numbered), columns)


def _tsv(path: Path, columns: list[str]) -> Iterator[Row]:
    """Reads cells that hold neither tabs nor line breaks; quotes are part of the text, as in GLUE's files."""
    yield from _rows(path, ((n, line.split("\t")) for n, line in read_lines(path) if line.strip()), columns)


def _rows(path: Path, numbered: Iterator[tuple[int, list[str]]], columns: list[str]) -> Iterator[Row]:
    for number, cells in numbered:
        if not cells:
            continue
        if not columns:
            columns = [cell.strip() for cell in cells]
            _check_names(f"{path}:{number}", columns)
        elif len(cells) != len(columns):
            raise ValueError(
                f"{path}:{number}: {len(cells)} cells, where {len(columns)} are due ({', '.join(columns)}); "
                f"correct the line, or the columns' names in objective.columns"
            )
        else:
            yield Row(f"{path}:{number}", dict(zip(columns, cells, strict=True)))


def _check_names(where: str, columns: list[str]) -> None:
    if twice := next((name for name in columns if name and columns.count(name) > 1), None):
        raise ValueError(f"{where}: two columns are called {twice!r}; rename one of them")


def _jsonl(path: Path, columns: list[str]) -> Iterator[Row]:
    for number, line in read_lines(path):
        if line.strip():
            yield _record(f"{path}:{number}", parse_json(line, f"{path}:{number}"))


def _json(path: Path, columns: list[str]) -> Iterator[Row]:
    values = read_json(path)
    if not isinstance(values, list):
        raise ValueError(f"{path}: {kind_of(values)}, where a list of records is due")
    for number, value in enumerate(values):
        yield _record(f"{path}[{number}]", value)


def _record(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {kind_of(value)}, where an object is due")
    return Row(where, value)


def _tfds(source: str) -> Iterator[Row]:
    """Yields the rows of a TFDS split; numbers of classes become their names."""
    name, _, part = source.removeprefix("tfds:").partition(":")
    features = tfds.builder(name).info.features
    for number, row in enumerate(tfds.rows(name, part or "train")):
        where = f"{source}[{number}]"
        yield Row(where, {key: _plain(value, features[key], where) for key, value in row.items()})


def _plain(value: Any, feature: Any, where: str) -> Any:
    # Values and features are NumPy's and TFDS's: only some have `tolist`, `feature` (of a sequence) and `int2str`.
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        return decode(value, where)
    if isinstance(value, list | tuple):
        return [_plain(v, getattr(feature, "feature", feature), where) for v in value]
    if isinstance(value, dict):
        inner = getattr(feature, "feature", feature)
        return {key: _plain(v, inner[key], where) for key, v in value.items()}
    if hasattr(feature, "int2str") and isinstance(value, int):
        return feature.int2str(value) if value >= 0 else None  # TFDS marks a missing label by -1
    return value


READERS = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".json": _json}
