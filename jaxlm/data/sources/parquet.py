"""Reads Parquet files, one document a row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.data.sources.shard import (
    Document,
    Field,
    Shard,
    field_names,
    file_shard,
    missing_field,
    optional_module,
)


def _open(path: str | Path) -> Any:
    try:
        return optional_module("pyarrow.parquet").ParquetFile(path)
    except (OSError, optional_module("pyarrow").ArrowException) as error:
        raise ValueError(f"{path} can't be read as Parquet: {str(error).splitlines()[0]}") from error


def cut(root: Path, files: list[Path], field: Field) -> list[Shard]:
    """Cuts files into row groups, the unit that Parquet can read on its own.

    Raises ValueError if a column is missing.
    """
    result = []
    for file in files:
        with _open(file) as opened:
            strings = [f.name for f in opened.schema_arrow if str(f.type) in ("string", "large_string", "string_view")]
            for name in field_names(field):
                if name not in strings:
                    raise ValueError(missing_field(str(file), name, strings))
                if opened.schema_arrow.names.count(name) > 1:
                    raise ValueError(f"{file}: two columns are called {name!r}; rename one of them")
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                result.append(file_shard("parquet", root, [file], field, start=group, stop=group + 1, size=rows))
    return result


def read(shard: Shard) -> Iterator[Document]:
    """Yields one document a row of a row group; a missing value is an empty text."""
    (path,), (key,) = shard.paths, shard.keys
    with _open(path) as opened:
        names = list(field_names(shard.field))
        table = opened.read_row_group(shard.start, columns=names)
        for row, texts in enumerate(zip(*(table.column(name) for name in names), strict=True)):
            try:
                yield Document(f"{key}@{shard.start}.{row}", *(text.as_py() or "" for text in texts))
            except UnicodeDecodeError as error:
                place = f"{path}: row {row} of row group {shard.start}"
                raise ValueError(f"{place}: not UTF-8 at byte {error.start}; write the file anew") from error
