"""Reads data sets of TensorFlow Datasets without TensorFlow, one document a row."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.data.sources.shard import Document, Field, Shard, field_names, missing_field, optional_module
from jaxlm.data.text_input import decode

MAX_SHARDS = 64


def builder(name: str) -> Any:
    """Returns the builder of a data set, by its name or prepared folder, and prepares it if it isn't yet.

    Its files are array_record's, the format that is read without TensorFlow. Raises ValueError if that fails.
    """
    library = optional_module("tensorflow_datasets")
    optional_module("array_record")
    path = Path(name).expanduser()
    if path.is_absolute() or path.is_dir():
        try:
            return library.builder_from_directory(str(path))
        except Exception as error:
            raise ValueError(
                f"data source tfds:{name}: no prepared data set in that folder: {_first_line(error)}"
            ) from error
    try:
        result = library.builder(name, file_format="array_record")
        result.download_and_prepare()  # does nothing when the data is there
    except Exception as error:  # tfds raises dozens of kinds: no such name, no network, no space, a format mismatch
        raise ValueError(f"data source tfds:{name} can't be prepared: {_first_line(error)}") from error
    return result


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def rows(name: str, split: str) -> Any:
    """Returns the rows of a split as a random-access sequence. Raises ValueError if there is no such split."""
    source = builder(name)
    if split.partition("[")[0] not in source.info.splits:
        raise ValueError(f"data source tfds:{name}: no split {split!r}; splits there: {', '.join(source.info.splits)}")
    try:
        return source.as_data_source(split=split)
    except Exception as error:
        remedy = "prepare it with file_format='array_record'"
        raise ValueError(f"data source tfds:{name}: {remedy} ({_first_line(error)})") from error


def cut(source: str, field: Field) -> list[Shard]:
    """Cuts `tfds:NAME[:split]` into at most `MAX_SHARDS` ranges of rows."""
    name, _, split = source.removeprefix("tfds:").partition(":")
    split = split or "train"
    if not name:
        raise ValueError(
            "data source 'tfds:' names no data set: tfds:NAME/CONFIG[:split] or tfds:/prepared/folder[:split]"
        )
    info, table = builder(name).info, rows(name, split)
    if len(table):
        _texts(table[0], field, f"tfds:{name}")
    identity = (info.full_name, split, len(table), _stored_files(info, split))
    stamp = hashlib.sha256(repr(identity).encode()).hexdigest()
    pieces = max(1, min(MAX_SHARDS, len(table)))
    bounds = [len(table) * i // pieces for i in range(pieces + 1)]
    key = f"{info.full_name}/{split}"
    return [
        Shard("tfds", "", (name, split), (key, ""), field, start, stop, stamp, size=stop - start)
        for start, stop in itertools.pairwise(bounds)
    ]


def _stored_files(info: Any, split: str) -> Any:
    split_info = info.splits[split.partition("[")[0]]
    times = [Path(f).stat().st_mtime_ns for f in split_info.filepaths]
    return split_info.num_bytes, list(split_info.shard_lengths or ()), times


def _texts(row: dict[str, Any], field: Field, where: str) -> list[str]:
    values = [row.get(name) for name in field_names(field)]
    for name, value in zip(field_names(field), values, strict=True):
        if not isinstance(value, bytes | str):
            raise ValueError(missing_field(where, name, [n for n, v in row.items() if isinstance(v, bytes | str)]))
    return [decode(value, where) if isinstance(value, bytes) else str(value) for value in values]


def read(shard: Shard) -> Iterator[Document]:
    """Yields one document a row."""
    name, split = shard.paths
    table = rows(name, split)
    for row in range(shard.start, shard.stop):
        yield Document(f"{shard.keys[0]}@{row}", *_texts(table[row], shard.field, f"tfds:{name} row {row}"))
