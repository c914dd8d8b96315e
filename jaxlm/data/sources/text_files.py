"""Reads text files, one document a file; the standard library of Python is a corpus that every machine has."""

import dataclasses
import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from jaxlm.data.sources.shard import Document, Field, Shard, file_shard
from jaxlm.data.text_input import read_text

_EXTENSIONS = """
txt text md rst tex html xml csv tsv en de fr zh
py pyi c h cc cpp hpp cu rs go java kt js ts rb pl sh lua r jl scala sql
toml yaml yml cfg ini
"""
SUFFIXES = frozenset("." + extension for extension in _EXTENSIONS.split())
GROUPS = 64  # small files are grouped into about so many shards of similar size


def cut(root: Path, files: list[Path], field: Field) -> list[Shard]:
    """Groups neighbouring files into shards of similar size. Raises ValueError if a pair of fields is asked for."""
    if isinstance(field, tuple):
        raise ValueError(
            f"data source {files[0]} is plain text, which has no fields {field[0]!r} and {field[1]!r}: give JSONL, or "
            f"the stem of two files STEM.{field[0]} and STEM.{field[1]} with a text a line"
        )
    sizes = [f.stat().st_size for f in files]
    share = max(sum(sizes) / GROUPS, 1)
    groups: list[list[Path]] = []
    total = 0
    for file, size in zip(files, sizes, strict=True):
        if not groups or total >= share * len(groups):
            groups.append([])
        groups[-1].append(file)
        total += size
    return [file_shard("text", root, group, field) for group in groups]


def read(shard: Shard) -> Iterator[Document]:
    """Yields one document a file. Raises ValueError, which names the file, if it isn't UTF-8."""
    for key, path in zip(shard.keys, shard.paths, strict=True):
        # Bytes, not text mode: universal newlines would change what is learnt and scored.
        yield Document(key, read_text(path))


@functools.cache
def cut_stdlib(field: Field) -> tuple[Shard, ...]:
    """Cuts Python's own library into shards; its few test files in other encodings are left out and counted.

    All files are read for that, once in a process: a running Python's own library stays as it is.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files, skipped = [], 0
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(file.parts[len(root.parts) :]):
            continue
        try:
            read_text(file)
            files.append(file)
        except ValueError:
            skipped += 1
    if not files:
        raise ValueError(f"data source 'stdlib': {root} holds no .py files; this Python came without its sources")
    first, *rest = cut(root, files, field)
    return (dataclasses.replace(first, skipped=skipped), *rest)
