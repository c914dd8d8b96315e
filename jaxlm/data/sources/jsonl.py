"""Reads JSON lines, plain or compressed by gzip or Zstandard, one document a line."""

import importlib
import io
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxlm.data.sources import shard as shards
from jaxlm.data.sources.shard import (
    Document,
    Field,
    Shard,
    field_names,
    file_shard,
    missing_field,
    optional_module,
)
from jaxlm.data.text_input import MARK, decode_line, kind_of, parse_json


def cut(root: Path, files: list[Path], field: Field) -> list[Shard]:
    """Cuts files into ranges of bytes; a compressed file can't be cut and is one shard."""
    result = []
    for file in files:
        size = file.stat().st_size
        pieces = max(1, size // shards.PIECE_BYTES) if file.suffix.lower() not in OPENERS else 1
        bounds = [size * i // pieces for i in range(pieces + 1)]
        for start, stop in itertools.pairwise(bounds):
            result.append(file_shard("jsonl", root, [file], field, start=start, stop=stop, size=stop - start))
    return result


def read(shard: Shard) -> Iterator[Document]:
    """Yields the documents whose lines begin in [start, stop); a key ends with the line's byte in the plain file.

    Raises ValueError, which names the line, for what isn't a JSON record with the field, and for a damaged file.
    """
    (path,), (key,) = shard.paths, shard.keys
    opener = OPENERS.get(Path(path).suffix.lower())
    decompression_errors = _decompression_errors(path)
    with opener(path) if opener else open(path, "rb") as file:
        at = 0
        if shard.start:
            file.seek(shard.start - 1)
            at = shard.start - 1 + len(file.readline())
        lines = iter(file)
        while opener or at < shard.stop:
            try:
                line = next(lines, b"")
            except decompression_errors as error:
                raise ValueError(f"{path} is damaged after byte {at} of its text: {error}") from error
            if not line:
                return
            if line.removeprefix(MARK.encode()).strip():
                yield Document(f"{key}@{at}", *_texts(line, shard.field, path, at))
            at += len(line)


def _texts(line: bytes, field: Field, path: str, at: int) -> list[str]:
    names = field_names(field)
    try:
        return _fields(decode_line(line, ""), names)
    except ValueError as error:  # lines are counted, which takes long, only now
        raise ValueError(f"{path}:{_line_number(path, at)}{error}") from error


def _fields(line: str, names: Sequence[str]) -> list[str]:
    record = parse_json(line, "", names)
    if not isinstance(record, dict):
        raise ValueError(f": {kind_of(record)}, where an object with {names[0]!r} is due")
    for name in names:
        if name in record and not isinstance(record[name], str):
            raise ValueError(f": {name!r} is {kind_of(record[name])}, where a text is due; correct or remove the line")
        if name not in record:
            existing = [name for name, value in record.items() if isinstance(value, str)]
            raise ValueError(missing_field("", name, existing))
    return [record[name] for name in names]


def _line_number(path: str, at: int) -> int:
    """Counts the lines before byte `at` of the plain file, which is slow and done for error messages alone."""
    opener = OPENERS.get(Path(path).suffix.lower())
    number = 1
    with opener(path) if opener else open(path, "rb") as file:
        while at > 0 and (block := file.read(min(at, 1 << 20))):
            number += block.count(b"\n")
            at -= len(block)
    return number


# --------------------------------------------------------------------------------------------------------- compression


def _open_gzip(path: str) -> Any:
    return importlib.import_module("gzip").open(path, "rb")


class _Zstd(io.RawIOBase):
    """Reads Zstandard frames as a file; the library's own reader takes a file that was cut off for a whole one."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed in `close`)
        self._frame: Any = None
        self._packed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._packed = self._packed or self._file.read(1 << 16)
            if not self._packed and self._frame:
                raise EOFError("it ends in the middle of a frame")
            if not self._packed:
                return 0
            self._frame = self._frame or optional_module("zstandard").ZstdDecompressor().decompressobj()
            self._plain = self._frame.decompress(self._packed)
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zstd(path: str) -> Any:
    return io.BufferedReader(_Zstd(path), 1 << 20)


OPENERS: dict[str, Callable[[str], Any]] = {".gz": _open_gzip, ".zst": _open_zstd}


def _decompression_errors(path: str) -> tuple[type[BaseException], ...]:
    zstd = (optional_module("zstandard").ZstdError,) if path.lower().endswith(".zst") else ()
    return (OSError, EOFError, zlib.error, *zstd)
