"""Any source of text becomes keyed documents, cut into shards: the standard library, files, JSONL, Parquet and TFDS.

Each format has a module with two functions: `cut` makes shards of it, and `read` yields the documents of a shard.
"""

import dataclasses
import glob
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxlm.data.sources import jsonl, parallel_files, parquet, text_files, tfds
from jaxlm.data.sources.shard import Document, Field, Shard

__all__ = ["Document", "Field", "Shard", "divides", "documents", "held_out", "parts", "read", "shards"]

SHORTEST_PIECE = 64  # characters of a piece that is held out of a document

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
        result = list(text_files.cut_stdlib(field))
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


def read(shard: Shard, left_out: list[str] | None = None) -> Iterator[Document]:
    """Yields the documents of one shard in order; those without a single character, or half a pair, are left out.

    The places of pairs that are left out are added to `left_out`.
    """
    try:
        for document in READERS[shard.kind](shard):
            if document.second is None:
                if document.text:
                    yield document
            elif all(text.strip() for text in document.texts):
                yield document
            elif left_out is not None:
                left_out.append(_place(shard, document.key))
    except OSError as error:
        raise ValueError(f"{error.filename or shard.paths[0]} can't be read: {error.strerror or error}") from error


def _place(shard: Shard, key: str) -> str:
    """Returns file and line of a document where its key has them, else its key."""
    return f"{shard.paths[0]}:{int(key.rpartition('@')[2]) + 1}" if shard.kind == "parallel" else key


def documents(source: str, *, field: Field = "text", left_out: list[str] | None = None) -> Iterator[Document]:
    """Yields all documents of a source, shard after shard; see `read`."""
    for shard in shards(source, field=field):
        yield from read(shard, left_out)


def divides(shards: Sequence[Shard], holdout: float) -> bool:
    """Returns whether documents are divided for validation, for not one whole document falls to it.

    Pairs of texts can't be divided.
    """
    if not holdout or isinstance(shards[0].field, tuple):
        return False
    keys = (
        key
        for shard in shards
        for key in (shard.keys if shard.kind == "text" else (document.key for document in read(shard)))
    )
    return not any(held_out(key, holdout) for key in keys)


def parts(
    shard: Shard, holdout: float, divide: bool, left_out: list[str] | None = None
) -> Iterator[tuple[bool, Document]]:
    """Yields (whether it is for validation, document) of one shard: whole documents, or parts of `divide`d ones."""
    for document in read(shard, left_out):
        if divide:
            yield from _divided(document, holdout)
        else:
            yield held_out(document.key, holdout), document


def _divided(document: Document, holdout: float) -> Iterator[tuple[bool, Document]]:
    """Yields the parts of a document, which add up to it; those with the smallest hashes of so many are held out.

    They end at a line's end where there is one, else at a blank.
    """
    text = document.text
    count = min(math.ceil(2 / holdout), len(text) // SHORTEST_PIECE)
    if count < 2:
        yield False, document
        return
    bounds = sorted({0, len(text), *(_after_break(text, len(text) * i // count) for i in range(1, count))})
    names = [f"{document.key}#{i}" for i in range(len(bounds) - 1)]
    digests = [hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in names]
    chosen = set(sorted(digests)[: max(1, round(holdout * len(names)))])
    pieces = zip(names, digests, itertools.pairwise(bounds), strict=True)
    for is_valid, several in itertools.groupby(pieces, lambda piece: piece[1] in chosen):
        group = list(several)
        yield is_valid, Document(group[0][0], text[group[0][2][0] : group[-1][2][1]])


def _after_break(text: str, at: int) -> int:
    """Returns the place after the next line's end, or else after the next blank, that isn't far; else `at`."""
    for mark in ("\n", " "):
        if (found := text.find(mark, at, at + 2000)) >= 0:
            return found + 1
    return at


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
