"""Any source of text becomes keyed documents, cut into shards: the standard library, files, JSONL, Parquet and TFDS.

Each format has a module with two functions: `cut` makes shards of it, and `read` yields the documents of a shard.
"""

import dataclasses
import glob
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.data.sources import jsonl, parallel_files, parquet, text_files, tfds
from jaxlm.data.sources.shard import Document, Field, Shard

__all__ = ["Document", "Field", "Shard", "documents", "held_out", "read", "shards"]

SUFFIXES = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".jsonl.zst": "jsonl", ".parquet": "parquet"}
CUTTERS = {"text": text_files.cut, "jsonl": jsonl.cut, "parquet": parquet.cut}
READERS: dict[str, Callable[[Shard], Iterator[Document]]] = {
    "text": text_files.read,
    "parallel": parallel_files.read,
    "jsonl": jsonl.read,
    "parquet": parquet.read,
    "tfds": tfds.read,
}


def shards(source: str, *, field: Field = "text") -> tuple[Shard, ...]:
    """Cuts a source into units of work, in an order that depends on the names alone.

    `source` is `stdlib`, a file, a folder, a glob, `tfds:NAME/CONFIG[:split]` or `tfds:/prepared/folder[:split]`; for
    pairs of texts also the `STEM` of two files `STEM.FIELD` that hold a text a line. Raises ValueError if the source
    doesn't exist, is of an unknown kind, or holds no text.
    """
    if not source:
        raise ValueError("data source is empty: name a file, a folder, a glob, 'stdlib' or 'tfds:NAME'")
    if isinstance(field, tuple) and any(file.is_file() for file in parallel_files.sides(source, field)):
        result = parallel_files.cut(source, field)
    elif source == "stdlib":
        result = text_files.cut_stdlib(field)
    elif source.startswith("tfds:"):
        result = tfds.cut(source, field)
    else:
        root, files = _expand(source)
        by_kind: dict[str, list[Path]] = {}
        for file in files:
            by_kind.setdefault(_kind_of(file), []).append(file)
        result = [shard for kind in sorted(by_kind) for shard in CUTTERS[kind](root, by_kind[kind], field)]
    if not sum(shard.size for shard in result):
        raise ValueError(f"data source {source!r} is empty: it holds no text at all")
    return tuple(dataclasses.replace(shard, name=f"{i:05d}-of-{len(result):05d}") for i, shard in enumerate(result))


def read(shard: Shard) -> Iterator[Document]:
    """Yields the documents of one shard in order; those without a single character, or half a pair, are left out."""
    try:
        yield from (document for document in READERS[shard.kind](shard) if all(document.texts))
    except OSError as error:
        raise ValueError(f"{error.filename or shard.paths[0]} can't be read: {error.strerror or error}") from error


def documents(source: str, *, field: Field = "text") -> Iterator[Document]:
    """Yields all documents of a source, shard after shard."""
    for shard in shards(source, field=field):
        yield from read(shard)


def held_out(key: str, share: float) -> bool:
    """Returns whether a document belongs to validation: a hash of its key decides, so every machine agrees."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


def _kind_of(file: Path) -> str:
    name = file.name.lower()
    for suffix, kind in SUFFIXES.items():
        if name.endswith(suffix):
            return kind
    if file.suffix.lower() in text_files.SUFFIXES:
        return "text"
    raise ValueError(
        f"data source {file} is of an unknown kind: known are {', '.join(SUFFIXES)} and text such as .txt .md .py"
    )


def _expand(source: str) -> tuple[Path, list[Path]]:
    """Returns (the folder that keys are relative to, the sorted files) of a path or glob."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in text_files.SUFFIXES and f.is_file()]
        files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        if not files:
            raise ValueError(
                f"data source {source!r} holds no text files; for others give a glob, e.g. '{path}/*.jsonl'"
            )
        return path, files
    if path.is_file():
        return path.parent, [path]
    if not glob.has_magic(source):
        raise ValueError(
            f"data source {source!r} does not exist: give a file, a folder, a glob, 'stdlib' or 'tfds:NAME'"
        )
    files = [Path(f) for f in sorted(glob.glob(str(path), recursive=True)) if Path(f).is_file()]
    if not files:
        raise ValueError(
            f"data source {source!r} matches no file: check the pattern (quote it, so that the shell leaves it alone)"
        )
    fixed_parts = path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))]
    return Path(*fixed_parts), files
