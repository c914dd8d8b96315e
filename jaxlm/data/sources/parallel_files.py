"""Reads pairs of texts from two files STEM.FIELD with a text a line; line i of one belongs to line i of the other."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from jaxlm.data.sources import shard as shards
from jaxlm.data.sources.shard import Document, Shard, file_shard
from jaxlm.data.text_input import check_narrow, decode_line


def sides(stem: str, ends: tuple[str, str]) -> list[Path]:
    """Returns the paths of the two files of a stem, whether they exist or not."""
    return [Path(f"{stem}.{end}").expanduser() for end in ends]


def cut(stem: str, field: tuple[str, str]) -> list[Shard]:
    """Cuts the two files into runs of lines. Raises ValueError if one is missing or they differ in length."""
    files = sides(stem, field)
    for file in files:
        if not file.is_file():
            raise ValueError(f"data source {stem!r}: {file} is missing; pairs of texts need a file for each side")
    first, second = (_count_lines(file) for file in files)
    if first != second:
        raise ValueError(
            f"data source {stem!r}: {files[0]} has {first} lines and {files[1]} {second}; line i must belong to line i"
        )
    pieces = max(1, sum(f.stat().st_size for f in files) // shards.PIECE_BYTES)
    bounds = [first * i // pieces for i in range(pieces + 1)]
    return [
        file_shard("parallel", files[0].parent, files, field, start=start, stop=stop, size=stop - start)
        for start, stop in itertools.pairwise(bounds)
    ]


def _count_lines(path: Path) -> int:
    """Counts lines as `read` sees them: "\\n" alone ends one, and the last may lack it."""
    count, last = 0, b"\n"
    with open(path, "rb") as file:
        check_narrow(file.read(4), str(path))
        file.seek(0)
        while block := file.read(1 << 20):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def read(shard: Shard) -> Iterator[Document]:
    """Yields one document a pair of lines. Raises ValueError, which names the line, if one isn't UTF-8."""
    with open(shard.paths[0], "rb") as first, open(shard.paths[1], "rb") as second:
        pairs = itertools.islice(zip(first, second, strict=True), shard.start, shard.stop)
        for number, lines in enumerate(pairs, shard.start):
            texts = [decode_line(line, f"{path}:{number + 1}")
                     for path, line in zip(shard.paths, lines, strict=True)]  # fmt: skip
            yield Document(f"{shard.keys[0]}@{number}", *texts)
