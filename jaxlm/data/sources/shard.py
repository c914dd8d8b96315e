"""A source is cut into shards, and a shard is read as documents; what the readers of all formats share is here."""

import dataclasses
import hashlib
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PIECE_BYTES = 32 << 20  # large files that can be cut anywhere are cut into pieces of about this size
PACKAGES = {
    "tensorflow_datasets": "tensorflow-datasets",
    "array_record": "array-record",
    "pyarrow.parquet": "pyarrow",
    "zstandard": "zstandard",
}


@dataclasses.dataclass(frozen=True)
class Document:
    """A document is one text, or a pair of texts, with a key that is the same on every machine."""

    key: str
    text: str
    second: str | None = None
    """The other text of a pair."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Returns the document's one text or two."""
        return (self.text,) if self.second is None else (self.text, self.second)


Field = str | tuple[str, str]
"""The field of records that holds the text, or the two that hold a pair of texts."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard is a picklable unit of work: whole files, or rows or bytes `start` to `stop` of one file or data set."""

    kind: str
    """Key of its format in `sources.READERS`."""
    name: str
    paths: tuple[str, ...]
    keys: tuple[str, ...]
    """One for each path, relative to the source."""
    field: Field = "text"
    start: int = 0
    stop: int = 0
    stamp: str = ""
    """Changes when the content does: a digest of sizes and modification times."""
    size: int = 0
    """Bytes, or rows where bytes aren't known."""
    skipped: int = 0
    """Files left out because they aren't UTF-8 (standard library only)."""


def file_shard(kind: str, root: Path, files: list[Path], field: Field, **extra: Any) -> Shard:
    """Returns a shard of files without its name. Keys are relative to `root`; `extra` sets other fields."""
    extra.setdefault("size", sum(f.stat().st_size for f in files))
    keys = tuple(f.relative_to(root).as_posix() for f in files)
    paths = tuple(str(f.absolute()) for f in files)
    return Shard(kind, "", paths, keys, field, stamp=_stamp(files), **extra)


def _stamp(files: Iterable[Path]) -> str:
    parts = ((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()


def field_names(field: Field) -> tuple[str, ...]:
    """Returns the one or two names of a field."""
    return (field,) if isinstance(field, str) else field


def missing_field(where: str, name: str, existing: Iterable[str]) -> str:
    """Returns the error message about records that lack a text field."""
    return f"{where}: no text field {name!r}; text fields there: {', '.join(sorted(existing)) or 'none'}"


def optional_module(name: str) -> Any:
    """Imports a reader that only its format needs. Raises ValueError, which names the package to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"this data source needs {PACKAGES[name]}: pip install {PACKAGES[name]} ({error})") from error
